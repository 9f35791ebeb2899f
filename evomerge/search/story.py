"""What a search tells while it runs: one line for each thing that happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from evomerge.optimizer.history import Part

_PARTS: Mapping[Part, str] = {
    "search": "",
    "selection": ", measured afresh",
    "table": ", remaining tasks",
    "holdout": ", held-out tasks",
}


@dataclass(frozen=True)
class Started:
    """The engine is up; `done` of `total` trials were measured before."""

    study: str
    done: int
    total: int
    population: int
    genes: int
    search_tasks: int
    holdout_tasks: int
    tasks_per_candidate: int

    @property
    def line(self) -> str:
        """The event as one line of the run's story."""
        goes_on = f"goes on at trial {self.done} of" if self.done else "begins:"
        return (
            f"study {self.study} {goes_on} {self.total} trials, generations of {self.population}, "
            f"{self.genes} genes, {self._tasks} + {self.holdout_tasks} held out"
        )

    @property
    def _tasks(self) -> str:
        if self.tasks_per_candidate == self.search_tasks:
            return f"{self.search_tasks} tasks"
        return f"{self.tasks_per_candidate} of {self.search_tasks} tasks at a time"


@dataclass(frozen=True)
class Measured:
    """A candidate came to its end on the tasks of `part`: a score, or a reason why there is none.

    `candidate` is its name in the log, `title` that for readers (a model as the study writes it);
    `number` and `generation` are those of a trial, else None; `done` of `total` trials have ended;
    `best_score` and `best_number` are of the best trial so far. `limits` are the most tokens that
    its answers could have, each number once, rising; empty where that is not known.
    """

    candidate: str
    title: str
    part: Part
    number: int | None
    generation: int | None
    score: float | None
    reason: str | None
    tasks: int
    unscored: int
    cut: int
    limits: tuple[int, ...]
    seconds: Mapping[str, float]
    best_score: float | None
    best_number: int | None
    done: int
    total: int

    @property
    def line(self) -> str:
        """The event as one line of the run's story."""
        name = self.title if self.generation is None else f"{self.title} gen {self.generation}"
        name += _PARTS[self.part]
        ended = f"failed: {self.reason}" if self.score is None else f"score {self.score:.3f}"
        parts = [name, *self._work(), ended]
        if self.best_score is not None and self.number is not None:
            parts.append(f"best {self.best_score:.3f} (#{self.best_number})")
        return " | ".join(parts)

    def _work(self) -> list[str]:
        if self.score is None:
            return []
        answers = f"{self.tasks} answers {self.seconds['generate']:.2f} s"
        if self.cut:
            answers += f", {self.cut} cut at {_limits(self.limits)}"
        if self.unscored:
            answers += f", {self.unscored} unscored"
        return [f"merge {1000 * self.seconds['switch']:.0f} ms", answers]


def _limits(limits: Sequence[int]) -> str:
    """`1024 tokens`; categories and routed tasks may have limits of their own."""
    if not limits:
        return "their most tokens"
    return " to ".join(dict.fromkeys(map(str, (limits[0], limits[-1])))) + " tokens"


@dataclass(frozen=True)
class Said:
    """Something worth a line that changes nothing."""

    line: str


Story: TypeAlias = Started | Measured | Said
Report: TypeAlias = Callable[[Story], None]
