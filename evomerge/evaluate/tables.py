"""Tables of tasks and examples: JSONL, CSV, TSV, Parquet and XLSX files, row by row."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, nearest, reason_of, shown

if TYPE_CHECKING:
    from openpyxl.cell.cell import Cell, MergedCell
    from openpyxl.worksheet.worksheet import Worksheet

# What texts are often written in here beside UTF-8; the first that fits is named, none is guessed.
_OTHER_ENCODINGS = ("cp932", "euc_jp")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PRIVATE_USE = re.compile("[\ue000-\uf8ff]")


# How Excel writes what XML cannot hold: a carriage return of Windows is _x000D_.
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")

_NEEDED = "a text or a number is needed"

WORKBOOKS = (".xlsx", ".xlsm")


@dataclass(frozen=True)
class Unreadable:
    """A cell that cannot be read as it is meant; `reason` says where and why, once it is needed."""

    reason: str


@dataclass(frozen=True)
class Row:
    """One row: where it stands (for messages), its number, and column -> value.

    `number` is the line of a JSONL file, else the row's place below the header, from 1. Values are
    as the file has them: of CSV files all are texts, an empty cell of a sheet is None. Columns
    without a name are left out.
    """

    where: str
    number: int
    cells: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of the table in `path`, in its order; the suffix says what kind it is.

    Raises ConfigError naming file and place where it cannot be read, or is not in UTF-8.
    """
    kind = path.suffix.lower()
    if path.is_dir():
        raise ConfigError(f"{path}: this table is a folder")
    if kind not in _READERS:
        raise ConfigError(f"{path}: {kind or 'no suffix'} is no kind of table{_kinds()}")
    if not path.is_file():
        raise ConfigError(f"{path}: this table does not exist")
    try:
        return list(_READERS[kind](path))
    except OSError as error:
        raise ConfigError(f"{path}: the table cannot be read: {error.strerror or error}") from error


def cell(row: Row, column: str, key: str) -> Any:
    """The value in `column`; ConfigError where the row has no such column (`key` asks for it).

    Also where the cell cannot be read. `turns.0` is the first of the list in `turns`, unless a
    column has that very name.
    """
    if column in row.cells:
        return readable(row.cells[column])
    value: Any = row.cells
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal():
            if int(part) >= len(value):
                raise ConfigError(f"{row.where}: {column!r} ({key}): there are {len(value)} only")
            value = value[int(part)]
        else:
            raise ConfigError(
                f"{row.where}: no column {column!r} ({key}); this row has "
                f"{', '.join(row.cells) or 'none'}{_did_you_mean(column, row.cells)}"
            )
    return value


def readable(value: Any) -> Any:
    """A cell's value. Raises ConfigError where it cannot be read as it is meant."""
    if isinstance(value, Unreadable):
        raise ConfigError(value.reason)
    return value


def text_in(row: Row, column: str, key: str) -> str:
    """The text in `column`; a number as JSON writes it. ConfigError for any other value."""
    value = cell(row, column, key)
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{row.where}: {column!r} ({key}) is {value}; {_NEEDED}")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value)) if _is_of_sheet(row) else json.dumps(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    written = "empty" if value is None and _is_of_sheet(row) else shown(_as_json(value), longest=40)
    raise ConfigError(f"{row.where}: {column!r} ({key}) is {written}; {_NEEDED}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; ConfigError names another encoding."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        others = ("utf-16",) if raw[:2] in _UTF16_MARKS else _OTHER_ENCODINGS
        fits = next((name for name in others if _reads(raw, name)), None)
        hint = (
            f"it may be {fits}: iconv -f {fits.upper()} -t UTF-8 {path.name} > NEW"
            if fits
            else "save it as UTF-8"
        )
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte {error.start}); {hint}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines(): it also breaks at U+2028 and others that may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            cells = json.loads(line)
            if "\\u" in line:
                json.dumps(cells, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not a JSON object: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{where}: not a JSON object that can be read: too deep") from error
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise ConfigError(f"{where}: {half} is half of a character") from error
        if not isinstance(cells, dict):
            raise ConfigError(f"{where}: {line.strip()[:40]!r} is not a JSON object")
        yield Row(where, number, cells)


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # newline="": a line break inside a cell stays what it was.
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        _check_header(path, header)
        if len(header) == 1 and (other := next((one for one in ";\t" if one in header[0]), None)):
            raise ConfigError(
                f"{path}: its cells are parted by {other!r}; right are commas, or tabs in a .tsv"
            )
        number = 0
        for values in lines:
            if not any(values):
                continue  # a spreadsheet writes rows of commas alone
            number += 1
            where = f"{path}:{lines.line_num}"
            if len(values) != len(header):
                raise ConfigError(
                    f"{where}: {len(values)} cells under {len(header)} columns; a cell with "
                    "commas, quotes or line breaks must stand in double quotes"
                )
            yield Row(where, number, _named(header, values))
    except csv.Error as error:
        hint = ""
        if "field limit" in str(error):
            hint = " (a quote that is not closed, or a text that a JSONL file has room for)"
        raise ConfigError(f"{path}:{lines.line_num}: not CSV: {error}{hint}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    for number, cells in enumerate(rows, start=1):
        yield Row(f"{path}, row {number}", number, cells)


def _workbook(path: Path) -> Iterator[Row]:
    """The rows of the first sheet; formulas by the values that were saved with them.

    A cell that is merged with others has their value in each row. A text's line breaks are \\n.
    """
    values, formulas = _sheets(path)
    merged = _merged(values)
    lines = zip(values.iter_rows(), formulas.iter_rows(), strict=True)
    names: list[str] = []
    for number, (cells, written) in enumerate(lines):
        found = [
            _cell_value(path, cell, formula, merged)
            for cell, formula in zip(cells, written, strict=True)
        ]
        if number == 0:
            names = ["" if value is None else str(value).strip() for value in found]
            _check_header(path, names)
        elif any(value is not None for value in found):
            # The header is row 1 of the sheet.
            yield Row(f"{path}, sheet row {number + 1}", number, _named(names, found))
    if not names:
        _check_header(path, names)


def _sheets(path: Path) -> tuple[Worksheet, Worksheet]:
    """The first sheet with the results of its formulas, and with the formulas themselves."""
    from openpyxl import load_workbook

    try:
        with warnings.catch_warnings():
            # Of what it does not read: how cells look, what may be entered.
            warnings.simplefilter("ignore")
            # openpyxl gives one or the other.
            return (
                load_workbook(path, data_only=True).worksheets[0],
                load_workbook(path).worksheets[0],
            )
    except OSError:
        raise
    except Exception as error:  # of all that may be wrong in an archive of XML files
        raise ConfigError(
            f"{path}: cannot be read as an Excel workbook: {reason_of(error)} (one with a "
            "password, or in the old format .xls, has to be saved anew as .xlsx)"
        ) from error


def _merged(sheet: Worksheet) -> dict[tuple[int | None, int | None], Any]:
    """The value of every cell that is merged into another one: that one's."""
    return {
        place: sheet.cell(area.min_row, area.min_col).value
        for area in sheet.merged_cells.ranges
        for place in area.cells
    }


def _cell_value(
    path: Path,
    cell: Cell | MergedCell,
    formula: Cell | MergedCell,
    merged: Mapping[tuple[int | None, int | None], Any],
) -> Any:
    """A text, number, truth or None; an `Unreadable` for what is neither."""
    value: Any = merged.get((cell.row, cell.column), cell.value)
    place = f"{path}, {formula.parent.title}!{cell.coordinate}"
    if formula.data_type == "f" and (value is None or cell.data_type == "e"):
        # A text that begins with = is a formula to Excel, and mostly a broken one.
        return Unreadable(
            f"{place}: {str(formula.value)[:40]!r} is a formula without a result; a text that "
            "begins with = needs ' before it, a formula a workbook that Excel has saved"
        )
    if isinstance(value, str):
        return _unescaped(value) or None
    if value is None or isinstance(value, bool | int | float):
        return value
    return Unreadable(
        f"{place}: {value} is a date or a time; a text or a number is needed: format the cell as "
        "text"
    )


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    **dict.fromkeys(WORKBOOKS, _workbook),
}


KINDS = tuple(_READERS)


def _kinds() -> str:
    return f"; right are {', '.join(KINDS)}"


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The values of a row by the names of their columns; a column without a name is left out."""
    return {name: value for name, value in zip(names, values, strict=True) if name}


def _unescaped(text: str) -> str:
    """A cell's text with the characters that it stands for, and line breaks of one kind."""
    found = _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), text)
    return found.replace("\r\n", "\n").replace("\r", "\n")


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raises ConfigError unless there are names of columns, each once."""
    if not any(names):
        raise ConfigError(f"{path}: holds no table: the first row names the columns")
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(
            f"{path}: the header is {', '.join(map(repr, names))}: {repeated!r} names two columns"
        )


def _is_of_sheet(row: Row) -> bool:
    """Sheets know no whole numbers: what is shown as 7 may be read as 7.0."""
    return ", sheet row " in row.where


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)


def _reads(raw: bytes, encoding: str) -> bool:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    # What Python's cp932 makes of single bytes that stand for nothing.
    return _PRIVATE_USE.search(text) is None


def _did_you_mean(column: str, known: Mapping[str, Any]) -> str:
    hint = nearest(column, known) if known else ""
    return hint if hint.startswith("; did") else ""
