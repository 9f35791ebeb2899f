"""Where the time of a search goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# What candidates cost by their nature (engine: starting it again), and what comes on top of it:
# proposing and learning (ask), the log and the best recipe's file (log), whatever else (other).
WORK = ("switch", "generate", "score", "engine")
OVERHEAD = ("ask", "log", "other")
KINDS = (*WORK, *OVERHEAD)


class Stopwatch:
    """Seconds by kind since the last `take`; the rest of the time that passed is "other"."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._spent: dict[str, float] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as `kind`."""
        started = self._clock()
        try:
            yield
        finally:
            self.add(kind, self._clock() - started)

    def add(self, kind: str, seconds: float) -> None:
        """Counts `seconds`, measured by somebody else, as `kind`."""
        self._spent[kind] = self._spent.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds of every kind since the last `take`; their sum is the time that passed."""
        now = self._clock()
        passed, self._started = now - self._started, now
        spent, self._spent = self._spent, {}
        spent["other"] = max(0.0, passed - sum(spent.values()))
        return {kind: round(spent.get(kind, 0.0), 6) for kind in KINDS}


def overhead_share(seconds: Mapping[str, float]) -> float:
    """The part of the time after engine start that no switching, generation or scoring took."""
    total = sum(seconds.get(kind, 0.0) for kind in KINDS if kind != "engine")
    return sum(seconds.get(kind, 0.0) for kind in OVERHEAD) / total if total else 0.0
