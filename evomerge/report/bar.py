"""How far a row of tasks is: a bar on a terminal, lines elsewhere; always to stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def counting_bar(console: Console) -> Progress:
    """A bar of how many are done, with the time that is left and a `note` behind it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=4,  # the engine shares this process
    )


class TaskBar:
    """Tells how many of `total` tasks are done and how many answers were cut; a context manager."""

    def __init__(self, total: int, what: str = "tasks", console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._total = total
        self._what = what
        self._cut = 0
        self._bar = counting_bar(self._console)
        self._task = self._bar.add_task(what, total=total, note="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:  # else stopping writes an empty line
            self._bar.stop()

    def __call__(self, done: int, cut: int = 0) -> None:
        """`done` tasks are done; `cut` more answers were cut at their most tokens."""
        self._cut += cut
        note = f"{self._cut} cut at max_tokens" if self._cut else ""
        self._bar.update(self._task, completed=done, note=note)
        if not self._console.is_terminal and done:
            line = f"{done} of {self._total} {self._what}" + (f", {note}" if note else "")
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
