"""Tables of texts as people keep them: Excel workbooks, CSV, JSON lines; read, never written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from evomerge.errors import ConfigError
from evomerge.evaluate.tables import read_rows

if TYPE_CHECKING:
    from openpyxl.cell.cell import Cell, MergedCell
    from openpyxl.worksheet.worksheet import Worksheet

EXCEL = (".xlsx", ".xlsm")
KINDS = (*EXCEL, ".csv", ".tsv", ".jsonl", ".parquet")
# How Excel writes what XML cannot hold: a carriage return of Windows is _x000D_.
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")


# In a text file a line break at the end is meant (a prompt may end in one); in a cell of Excel it
# is where somebody pressed Alt-Enter.
_BLANKS = " \t\u3000"


@dataclass(frozen=True)
class TextRow:
    """One row: `where` says which ("prompts.xlsx:3"), `cells` have a text for every column.

    Line breaks are \\n, outer blanks are gone (in workbooks outer line breaks, too), an empty cell
    is "". Whole numbers are written without a point.
    """

    where: str
    cells: Mapping[str, str]


def read_table(path: Path) -> list[TextRow]:
    """The rows of an .xlsx (its first sheet), .csv, .tsv or .jsonl file that are not blank.

    The first row of a sheet or CSV file names the columns. Raises ConfigError that names file, row
    and column of what cannot be read as it is meant.
    """
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(f"{path}: a table is an .xlsx, .csv, .tsv, .jsonl or .parquet file")
    if suffix in EXCEL:
        rows = list(_excel_rows(path))
    else:
        rows = [
            one
            for row in read_rows(path)
            for one in _row(
                row.where, list(row.cells), [*map(_json_text, row.cells.values())], _BLANKS
            )
        ]
    if not rows:
        raise ConfigError(f"{path}: the table holds no row")
    return rows


def _excel_rows(path: Path) -> Iterator[TextRow]:
    import openpyxl

    try:
        # Formulas' results and, beside them, the formulas: openpyxl gives one or the other.
        values = openpyxl.load_workbook(path, data_only=True).worksheets[0]
        formulas = openpyxl.load_workbook(path).worksheets[0]
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: this table does not exist") from error
    except (OSError, BadZipFile, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: cannot be read as an Excel workbook: {error}") from error
    merged = _merged(values)
    lines = [
        [
            _excel_text(cell, formula, merged, f"{path}:{values.title}!{cell.coordinate}")
            for cell, formula in zip(row, formula_row, strict=True)
        ]
        for row, formula_row in zip(values.iter_rows(), formulas.iter_rows(), strict=True)
    ]
    if lines:
        header = _header(lines[0], f"{path}:1")
        for number, cells in enumerate(lines[1:], start=2):
            yield from _row(f"{path}:{number}", header, cells[: len(header)])


def _merged(sheet: Worksheet) -> dict[tuple[int | None, int | None], Any]:
    """The value of every cell that is merged into another one: that one's."""
    return {
        place: sheet.cell(area.min_row, area.min_col).value
        for area in sheet.merged_cells.ranges
        for place in area.cells
    }


def _excel_text(
    cell: Cell | MergedCell,
    formula: Cell | MergedCell,
    merged: Mapping[tuple[int | None, int | None], Any],
    where: str,
) -> str:
    value: Any = merged.get((cell.row, cell.column), cell.value)
    if formula.data_type == "f" and (value is None or cell.data_type == "e"):
        # A text that begins with = is a formula to Excel, and mostly a broken one.
        raise ConfigError(
            f"{where}: {str(formula.value)[:40]!r} is a formula without a result; a text that "
            "begins with = needs ' before it, a formula a workbook that Excel has saved"
        )
    if value is None:
        return ""
    if isinstance(value, str):
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, bool | int | float):
        return _json_text(value)
    raise ConfigError(
        f"{where}: {value} is a date or a time; a text or a number is needed: format the cell as "
        "text"
    )


def _header(cells: Sequence[str], where: str) -> list[str]:
    """The columns' names, without the empty ones at the end."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise ConfigError(f"{where}: the first row names the columns; it is empty")
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{where}: the column {repeated[0]!r} is there twice")
    return names


def _row(
    where: str, header: Sequence[str], cells: Sequence[str], outer: str | None = None
) -> Iterator[TextRow]:
    texts = {name: _clean(cell, outer) for name, cell in zip(header, cells, strict=True) if name}
    if any(text.strip() for text in texts.values()):
        yield TextRow(where, texts)


def _clean(text: str, outer: str | None) -> str:
    """A cell's text with \\n for line breaks of all kinds, without `outer` at its ends."""
    breaks = text.replace("_x000D_", "\r").replace("\r\n", "\n").replace("\r", "\n")
    return breaks.strip(outer)


def _json_text(value: object) -> str:
    """A JSON value as a text: texts as they are, 3.0 as 3, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)
