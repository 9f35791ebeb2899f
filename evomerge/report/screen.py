"""What results are printed on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

# Wider than any table: nothing in it has to be broken where nobody's screen ends.
_UNBOUNDED = 10_000


def columns(rows: Iterable[Sequence[str]]) -> Table:
    """Rows without lines between them; the last column takes the width that is left."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        if not table.columns:
            for _ in row[:-1]:
                table.add_column(no_wrap=True)
            table.add_column()
        table.add_row(*row)
    return table


class Screen:
    """Stdout: a terminal's width, else $COLUMNS, else as wide as its tables are.

    `page`: what fills its width keeps to rich's 80 columns where no terminal has another. Texts
    are shown as they are: `[x]` in a name is no markup.
    """

    def __init__(self, *, page: bool = False) -> None:
        self._console = Console(markup=False, highlight=False, emoji=False)
        if not page and not self._console.is_terminal and "COLUMNS" not in os.environ:
            self._console.width = _UNBOUNDED

    def show(self, *parts: RenderableType | None) -> None:
        """The tables that there are, one below the other."""
        for part in parts:
            if part is not None:
                self._console.print(part)

    def tell(self, sentences: Iterable[str]) -> None:
        """A line each; a terminal's are broken between words, not within them."""
        for sentence in sentences:
            self._console.print(sentence, soft_wrap=not self._console.is_terminal)
