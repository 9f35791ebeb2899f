"""Tables of texts as people keep them: Excel workbooks, CSV, JSON lines; read, never written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.evaluate.tables import WORKBOOKS, Row, read_rows, readable

# In a text file a line break at the end is meant (a prompt may end in one); in a cell of Excel it
# is where somebody pressed Alt-Enter.
_BLANKS = " \t\u3000"


@dataclass(frozen=True)
class TextRow:
    """One row: `where` says which ("prompts.csv:3"), `cells` have a text for every column.

    Line breaks are \\n, outer blanks are gone (in workbooks outer line breaks, too), an empty cell
    is "". Whole numbers are written without a point.
    """

    where: str
    cells: Mapping[str, str]


def read_table(path: Path) -> list[TextRow]:
    """The rows of a table (`tables.read_rows`) that are not blank, at least one.

    Raises ConfigError that names file, row and column of what cannot be read as it is meant.
    """
    outer = None if path.suffix.lower() in WORKBOOKS else _BLANKS
    rows = [TextRow(row.where, _texts(row, outer)) for row in read_rows(path)]
    found = [row for row in rows if any(text.strip() for text in row.cells.values())]
    if not found:
        raise ConfigError(f"{path}: the table holds no row")
    return found


def _texts(row: Row, outer: str | None) -> dict[str, str]:
    """The row's cells as texts with \\n for line breaks of all kinds, without `outer` around."""
    found = {}
    for name, value in row.cells.items():
        text = _text(readable(value), row, name)
        # A carriage return that Excel wrote into a CSV file as it does into workbooks.
        text = text.replace("_x000D_", "\r").replace("\r\n", "\n").replace("\r", "\n")
        found[name] = text.strip(outer)
    return found


def _text(value: object, row: Row, column: str) -> str:
    """A value as a text: texts as they are, 3.0 as 3, lists as JSON, null as nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # a date, a picture
        raise ConfigError(f"{row.where}: {column!r} is {value!r}, which is no text") from error
