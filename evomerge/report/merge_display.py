"""A running merge on a terminal: a bar with bytes per second, and what it came to at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SECONDS_BETWEEN = 0.1  # a merge tells of thousands of pieces per second


class MergeDisplay:
    """Shows how far a merge is, on a terminal, and one line at its end, anywhere.

    It is told how many bytes of how many are written. A context manager, because it owns the last
    line of `stream`; after an error there is no closing line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._shown_at = self._began
        self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

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
        if kind is None:
            seconds = time.monotonic() - self._began
            unit, size = ("GB", 1e9) if self._done >= 1e9 else ("MB", 1e6)
            done = self._done / size
            rate = f"{done / seconds:.2f} {unit}/s"
            print(f"{done:.2f} {unit} in {seconds:.1f} s: {rate}", file=self._stream)

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are written."""
        self._done = done
        now = time.monotonic()
        if self._stream.isatty() and now - self._shown_at >= _SECONDS_BETWEEN:
            self._shown_at = now
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("merging", total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done)
