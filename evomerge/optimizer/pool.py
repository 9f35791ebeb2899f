"""Who may win a search: the pool that is measured afresh, and the race that it is measured in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.optimizer import events
from evomerge.optimizer.adjusted import adjusted_scores, adjusted_trials
from evomerge.optimizer.events import Event
from evomerge.optimizer.history import History, Payload, trial_label
from evomerge.optimizer.plan import Plan
from evomerge.optimizer.selection import Choice, Grades, choose, gp_argmax, paired_test
from evomerge.optimizer.telling import block_of
from evomerge.space import Genome

# The mean lags behind where the search moves, its average of more generations even more.
_MEANS = 5


def pool_event(plan: Plan, history: History, means: Sequence[Genome], left: int | None) -> Event:
    """The pool after all that was told; `means` are the sampler's after each block, if it has such.

    `left` is how many tasks may still be answered for it; None: as many as it takes. Who comes
    later among the challengers is left out first.
    """
    made: dict[str, Genome] = {}
    told = sum(len(history.told[block]) for block in history.told)
    # The peak leads: over nine kinds of landscapes it was better than the mean, which lags behind.
    peak = _peak(plan, history)
    if peak is not None:
        made[f"peak {told}"] = peak
    if means:
        made[f"mean {told}"] = means[-1]
        made[f"mean of means {told}"] = _average(plan, means[-_MEANS:])
    made = {label: np.clip(genome, plan.low, plan.high) for label, genome in made.items()}
    best = best_trials(plan, history)
    others = [*made, *best[:1], *by_score(plan, history, list(plan.warm)), *uniforms(plan, history)]
    names = list(dict.fromkeys([*others, *by_score(plan, history, plan.inputs)]))
    names = _different(made, names)
    incumbent, *challengers = names
    kept = [incumbent, *challengers[: _affordable(plan, left)]]
    genomes = {label: made[label].tolist() for label in kept if label in made}
    return events.pool(len(history.told), incumbent, kept[1:], genomes, left)


def best_trials(plan: Plan, history: History) -> list[str]:
    """The trials that were measured to their end, the best adjusted score first."""
    scores = adjusted_trials(history, plan.tasks)
    whole = [number for number in scores if trial_label(number) not in history.futile]
    return [trial_label(number) for number in sorted(whole, key=lambda n: (-scores[n], n))]


def uniforms(plan: Plan, history: History) -> list[str]:
    """The best uniform merge of the sweep, and its first: the weights are 1 / number of models."""
    best = history.start["candidate"] if history.start else None
    found = [best, *list(plan.sweep)[:1]]
    return [label for label in dict.fromkeys(found) if label is not None]


@dataclass(frozen=True)
class Race:
    """Who of a pool is measured in which attempt; all of it follows from the grades so far."""

    plan: Plan
    history: History
    pool: Payload

    def runners(self, attempt: int) -> list[str]:
        """Who takes part in this attempt (from 1), the incumbent first.

        After the first, only challengers that lead the incumbent so far: the others could hardly
        beat it any more.
        """
        names = [name for name in self._names if not self.history.has_failed(name, "selection")]
        if not names:
            return []
        incumbent, *running = names
        left = self.pool["left"]
        size = len(self.plan.tasks)
        money = math.inf if left is None else left - self.plan.attempts * size
        for done in range(1, attempt):
            money -= size * len(running)
            running = [name for name in running if self._lead(name, incumbent, done) > 0]
            running.sort(key=lambda name: -self._lead(name, incumbent, done))
            if math.isfinite(money):
                running = running[: max(0, int(money // (size * (self.plan.attempts - done))))]
        return [incumbent, *running]

    def result(self) -> tuple[str, Choice] | None:
        """The winner and the tests that decided; None where nobody could be measured."""
        names = self.runners(self.plan.attempts)
        if not names:
            return None
        incumbent, *challengers = names
        choice = choose(self.grades(incumbent), {name: self.grades(name) for name in challengers})
        return choice.label or incumbent, choice

    def grades(self, name: str, attempts: int | None = None) -> Grades:
        """(attempts, tasks) the fresh grades of a candidate, NaN where there is none."""
        return fresh_grades(self.plan.tasks, self.history, name, attempts or self.plan.attempts)

    @property
    def _names(self) -> list[str]:
        return [self.pool["incumbent"], *self.pool["challengers"]]

    def _lead(self, name: str, incumbent: str, attempts: int) -> float:
        lead, _ = paired_test(self.grades(name, attempts), self.grades(incumbent, attempts))
        return -math.inf if math.isnan(lead) else lead


def fresh_grades(tasks: Sequence[str], history: History, name: str, attempts: int) -> Grades:
    """(attempts, tasks) the grades of attempts 1, 2, … of a candidate, NaN where there is none."""
    rows = [history.grades.get((name, attempt), {}) for attempt in range(1, attempts + 1)]
    return np.array([[_number(row.get(task)) for task in tasks] for row in rows])


def chosen_event(after: int, winner: str, choice: Choice) -> Event:
    """The choice, for the log."""
    tests = {
        name: {"difference": _finite(choice.differences[name]), "z": _finite(choice.z[name])}
        for name in choice.differences
    }
    return events.chosen(after, winner, tests)


def _peak(plan: Plan, history: History) -> Genome | None:
    blocks = [block_of(plan, history, block) for block in sorted(history.told)]
    place = gp_argmax(blocks) if blocks else None
    return None if place is None else plan.scaling.genome(place)


def _average(plan: Plan, means: Sequence[Genome]) -> Genome:
    places = np.array([plan.scaling.place(mean) for mean in means])
    return plan.scaling.genome(places.mean(axis=0))


def by_score(plan: Plan, history: History, labels: Sequence[str]) -> list[str]:
    """Those with a score, the best adjusted one first, the earlier of equals."""
    grades = {
        label: row
        for (label, attempt), row in history.grades.items()
        if attempt == 0 and not history.has_failed(label)
    }
    scores = adjusted_scores(grades, plan.tasks)
    return sorted((label for label in labels if label in scores), key=lambda one: -scores[one])


def _different(made: Mapping[str, Genome], labels: Sequence[str]) -> list[str]:
    """The labels without those whose genome an earlier one has."""
    kept: dict[object, str] = {}
    for label in labels:
        genome = made.get(label)
        kept.setdefault(label if genome is None else tuple(genome.tolist()), label)
    return list(kept.values())


def _affordable(plan: Plan, left: int | None) -> int | None:
    """How many challengers can be measured once, beside the incumbent's attempts; None: all."""
    size = len(plan.tasks)
    return None if left is None else max(0, (left - plan.attempts * size) // size)


def _number(grade: float | None) -> float:
    return math.nan if grade is None else grade


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
