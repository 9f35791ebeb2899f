"""A running search on a terminal: its story in lines, under it a bar with ETA and best score."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

from evomerge.report.bar import counting_bar
from evomerge.search.story import Measured, Started, Story


class SearchDisplay:
    """Shows each story of a search as it comes; a context manager, because it owns the last line.

    Where the console is no terminal there is no bar, only the lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, story: Story) -> None:
        """Tells one story: a line, and the bar moved where a trial ended."""
        # A terminal's lines are broken between words, never within a number.
        log = not self._console.is_terminal
        self._console.print(story.line, markup=False, highlight=False, soft_wrap=log)
        if isinstance(story, Started) and self._console.is_terminal:
            self._start(story)
        if isinstance(story, Measured) and self._bar is not None:
            self._bar.update(self._task, completed=story.done, note=_best(story))

    def _start(self, story: Started) -> None:
        self._bar = counting_bar(self._console)
        self._task = self._bar.add_task("trials", total=story.total, completed=story.done, note="")
        self._bar.start()


def _best(story: Measured) -> str:
    if story.best_score is None:
        return ""
    return f"best {story.best_score:.3f} (trial {story.best_number})"
