"""What the events of a study add up to: proposals, grades, tells, choices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

# What was measured for the search itself; afresh, to choose the winner; for the table at the end,
# those search tasks that a candidate had not answered; the held-out tasks.
Part: TypeAlias = Literal["search", "selection", "table", "holdout"]
Payload: TypeAlias = Mapping[str, Any]
Grades: TypeAlias = Mapping[str, float | None]


def trial_label(number: int) -> str:
    """The candidate name of a trial in log and ledger."""
    return f"trial {number}"


@dataclass(frozen=True)
class Measurement:
    """The scored tasks of one candidate.

    `cut` answers ended at max_tokens; `unscored` ones have no grade and are not in `score`.
    `seconds` says where the time went since the measurement before: keys of `timing.KINDS`.
    """

    score: float
    tasks: int
    unscored: int
    cut: int
    recipe_digest: str
    seconds: Mapping[str, float]

    def plus(self, other: Measurement) -> Measurement:
        """This one and another of the same candidate, as one."""
        graded, more = self.tasks - self.unscored, other.tasks - other.unscored
        seconds = dict(self.seconds)
        for kind, spent in other.seconds.items():
            seconds[kind] = seconds.get(kind, 0.0) + spent
        return Measurement(
            score=(graded * self.score + more * other.score) / (graded + more),
            tasks=self.tasks + other.tasks,
            unscored=self.unscored + other.unscored,
            cut=self.cut + other.cut,
            recipe_digest=other.recipe_digest,
            seconds=seconds,
        )


@dataclass
class History:
    """What the events of a study add up to. Keys of scores and failures: (candidate, part).

    `grades` has what each candidate got for each task in each attempt (from 0), and `named` the
    genomes of candidates that are no trials. `tasks` are those of a generation; None: all.
    `futile` are the candidates that were stopped before the end of their tasks, and why. `pools`
    and `choices` go by the number of blocks that had been told. `spent` counts the tasks paid for.
    `answered` are units whose answers are kept without grades: (candidate, part, attempt).
    `spent_before` and `spent_at` say what was spent when a generation was proposed, and when a
    candidate's part was last scored or failed.
    """

    begun: Payload | None = None
    opened: Payload | None = None
    finished: Payload | None = None
    stopped: str | None = None
    start: Payload | None = None
    generations: dict[int, list[int]] = field(default_factory=dict)
    tasks: dict[int, list[str] | None] = field(default_factory=dict)
    genomes: dict[int, tuple[float, ...]] = field(default_factory=dict)
    named: dict[str, tuple[float, ...]] = field(default_factory=dict)
    scores: dict[tuple[str, Part], Measurement] = field(default_factory=dict)
    failures: dict[tuple[str, Part], str] = field(default_factory=dict)
    futile: dict[str, Payload] = field(default_factory=dict)
    grades: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)
    told: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    pools: dict[int, Payload] = field(default_factory=dict)
    choices: dict[int, Payload] = field(default_factory=dict)
    # Who killed the engine since the last score, in order.
    engine_deaths: list[tuple[str, Part]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    spent: int = 0
    answered: set[tuple[str, Part, int]] = field(default_factory=set)
    spent_before: dict[int, int] = field(default_factory=dict)
    spent_at: dict[tuple[str, Part], int] = field(default_factory=dict)

    def apply(self, kind: str, payload: Payload) -> None:
        """Takes one more event into account; kinds of a later version's making are passed over."""
        change = getattr(self, f"_on_{kind}", None)
        if change is not None:
            change(payload)

    def note_grades(self, candidate: str, attempt: int, grades: Grades) -> None:
        """Takes the grades of one more unit into account (before its event)."""
        self.grades.setdefault((candidate, attempt), {}).update(grades)

    def has_failed(self, candidate: str, part: Part = "search") -> bool:
        """Whether there is a failure that counts."""
        return (candidate, part) in self.failures

    def missing(self, candidate: str, attempt: int, tasks: Collection[str]) -> tuple[str, ...]:
        """Which of `tasks` the candidate has not answered in this attempt."""
        answered = self.grades.get((candidate, attempt), {})
        return tuple(task for task in tasks if task not in answered)

    def score(self, candidate: str, part: Part = "search") -> float | None:
        """The score of a candidate; None where it has none, or failed."""
        measurement = self.scores.get((candidate, part))
        if measurement is None or (candidate, part) in self.failures:
            return None
        return measurement.score

    def greedy_score(self, candidate: str, tasks: Collection[str]) -> float | None:
        """The mean grade in attempt 0 over these tasks; None where one is missing."""
        answered = self.grades.get((candidate, 0), {})
        grades = [answered[task] for task in tasks if answered.get(task) is not None]
        if not grades or self.missing(candidate, 0, tasks):
            return None
        return math.fsum(grade for grade in grades if grade is not None) / len(grades)

    def trials_ended(self) -> int:
        """How many trials are told, or have all their answers, or were stopped, or failed."""
        if not self.generations:
            return 0
        last = max(self.generations)
        told = sum(len(self.generations[block]) for block in self.told)
        return told if last in self.told else told + sum(self._ended(last))

    def ended_trials(self) -> list[int]:
        """The numbers of all trials that have all their answers, or were stopped, or failed."""
        return [
            number
            for block, numbers in self.generations.items()
            for number, ended in zip(numbers, self._ended(block), strict=True)
            if ended
        ]

    def _ended(self, block: int) -> list[bool]:
        tasks = self.tasks[block] or (self.begun or {}).get("search_tasks", ())
        labels = [trial_label(number) for number in self.generations[block]]
        return [
            self.has_failed(label) or label in self.futile or not self.missing(label, 0, tasks)
            for label in labels
        ]

    def _on_begun(self, payload: Payload) -> None:
        self.begun = payload

    def _on_opened(self, payload: Payload) -> None:
        self.opened, self.finished, self.stopped = payload, None, None
        self._spend({"engine": payload["engine_start"]})

    def _on_named(self, payload: Payload) -> None:
        for label, genome in payload["genomes"].items():
            self.named[label] = tuple(genome)

    def _on_start(self, payload: Payload) -> None:
        self.start = payload

    def _on_generation(self, payload: Payload) -> None:
        self.generations[payload["block"]] = list(payload["numbers"])
        self.tasks[payload["block"]] = payload["tasks"]
        self.spent_before[payload["block"]] = self.spent

    def _on_proposed(self, payload: Payload) -> None:
        self.genomes[payload["number"]] = tuple(payload["genome"])

    def _on_scored(self, payload: Payload) -> None:
        key = (payload["candidate"], payload["part"])
        measurement = Measurement(
            score=payload["score"],
            tasks=payload["tasks"],
            unscored=payload["unscored"],
            cut=payload["cut"],
            recipe_digest=payload["recipe_digest"],
            seconds=payload["seconds"],
        )
        before = self.scores.get(key)
        self.scores[key] = measurement if before is None else before.plus(measurement)
        self.failures.pop(key, None)
        self.engine_deaths.clear()
        self.answered.discard((*key, payload["attempt"]))
        self.spent += payload["tasks"]
        self.spent_at[key] = self.spent
        self._spend(payload["seconds"])

    def _on_failed(self, payload: Payload) -> None:
        key = (payload["candidate"], payload["part"])
        self.failures[key] = payload["reason"]
        self.spent_at[key] = self.spent
        if "attempt" in payload:
            self._on_answered(payload)
        if payload.get("engine_died"):
            self.engine_deaths.append(key)
        self._spend(payload["seconds"])

    def _on_answered(self, payload: Payload) -> None:
        self.answered.add((payload["candidate"], payload["part"], payload["attempt"]))

    def _on_futile(self, payload: Payload) -> None:
        self.futile[payload["candidate"]] = payload

    def _on_told(self, payload: Payload) -> None:
        self.told[payload["block"]] = [(number, value) for number, value in payload["values"]]

    def _on_pool(self, payload: Payload) -> None:
        self.pools[payload["after"]] = payload
        self._on_named(payload)

    def _on_chosen(self, payload: Payload) -> None:
        self.choices[payload["after"]] = payload

    def _on_stopped(self, payload: Payload) -> None:
        self.stopped = payload["reason"]
        for candidate, part in payload["void"]:
            self.failures.pop((candidate, part), None)
        self.engine_deaths.clear()

    def _on_finished(self, payload: Payload) -> None:
        self.finished = payload
        self._spend(payload["seconds"])

    def _spend(self, seconds: Mapping[str, float]) -> None:
        for kind, spent in seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + spent


def told_numbers(history: History) -> Sequence[int]:
    """The numbers of all trials that the sampler was told of, in order."""
    return [number for block in sorted(history.told) for number, _ in history.told[block]]
