"""Tables of tasks and examples: JSONL, CSV, TSV, Parquet and XLSX files, row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, nearest, shown

# What texts are often written in here beside UTF-8; the first that fits is named, none is guessed.
_OTHER_ENCODINGS = ("cp932", "euc_jp", "utf-16")


@dataclass(frozen=True)
class Row:
    """One row: where it stands (for messages), its number, and column -> value.

    `number` is the line of a JSONL file, else the row's place below the header, from 1. Values are
    as the file has them: of CSV files all are texts, an empty cell of a sheet is None.
    """

    where: str
    number: int
    cells: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of the table in `path`, in its order; the suffix says what kind it is.

    Raises ConfigError naming file and place where it cannot be read, or is not in UTF-8.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise ConfigError(f"{path}: {kind or 'no suffix'} is no kind of table{_kinds()}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: this table {what}")
    try:
        return list(_READERS[kind](path))
    except OSError as error:
        raise ConfigError(f"{path}: the table cannot be read: {error.strerror or error}") from error


def cell(row: Row, column: str, key: str) -> Any:
    """The value in `column`; ConfigError where the row has no such column (`key` asks for it).

    `turns.0` is the first of the list in `turns`, unless a column has that very name.
    """
    if column in row.cells:
        return row.cells[column]
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


def text_in(row: Row, column: str, key: str) -> str:
    """The text in `column`; a number as JSON writes it. ConfigError for any other value."""
    value = cell(row, column, key)
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value)) if _is_of_sheet(row) else json.dumps(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    written = "empty" if value is None and _is_of_sheet(row) else shown(_as_json(value), longest=40)
    raise ConfigError(f"{row.where}: {column!r} ({key}) is {written}; a text or a number is needed")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; ConfigError names another encoding."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fits = next((name for name in _OTHER_ENCODINGS if _reads(raw, name)), None)
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
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not a JSON object: {error}") from error
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
        number = 0
        for values in lines:
            if not values:
                continue
            number += 1
            where = f"{path}:{lines.line_num}"
            if len(values) != len(header):
                raise ConfigError(
                    f"{where}: {len(values)} cells under {len(header)} columns; a cell with "
                    "commas, quotes or line breaks must stand in double quotes"
                )
            yield Row(where, number, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{path}:{lines.line_num}: not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    for number, cells in enumerate(rows, start=1):
        yield Row(f"{path}, row {number}", number, cells)


def _xlsx(path: Path) -> Iterator[Row]:
    """The rows of the first sheet; formulas by the values that were saved with them."""
    import zipfile

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as XLSX: {error}") from error
    try:
        lines = book.worksheets[0].iter_rows(values_only=True)
        names = ["" if name is None else str(name).strip() for name in next(lines, ())]
        while names and not names[-1]:
            names.pop()  # formatted, and empty
        _check_header(path, names)
        for number, values in enumerate(lines, start=1):
            cells = [_unescaped(value) for value in values[: len(names)]]
            cells += [None] * (len(names) - len(cells))
            if any(value is not None for value in cells):
                # The header is row 1 of the sheet.
                cells_by_name = dict(zip(names, cells, strict=True))
                yield Row(f"{path}, sheet row {number + 1}", number, cells_by_name)
    finally:
        book.close()


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".xlsx": _xlsx,
}


def _kinds() -> str:
    return f"; right are {', '.join(_READERS)}"


def _unescaped(value: object) -> object:
    """A cell's text with the line breaks that spreadsheets write as `_x000D_` as they were."""
    if not isinstance(value, str):
        return value
    return value.replace("_x000D_\n", "\n").replace("_x000D_", "\n").replace("\r\n", "\n")


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raises ConfigError unless every column has a name of its own."""
    if not any(names):
        raise ConfigError(f"{path}: holds no table: the first row names the columns")
    repeated = next((name for name in names if names.count(name) > 1 or not name), None)
    if repeated is not None:
        what = f"{repeated!r} names two columns" if repeated else "a column has no name"
        raise ConfigError(f"{path}: the header is {', '.join(map(repr, names))}: {what}")


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
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _did_you_mean(column: str, known: Mapping[str, Any]) -> str:
    hint = nearest(column, known) if known else ""
    return hint if hint.startswith("; did") else ""
