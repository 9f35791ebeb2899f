"""The course of a search: what is to be measured, proposed, told or chosen next.

A pure function of the plan and the log: whoever drives it (`loop`, `maximize`) measures what it
asks for, writes what it says, and asks again. So a search that is resumed takes the same course.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from evomerge.optimizer import events
from evomerge.optimizer.events import Event
from evomerge.optimizer.history import History, Part, trial_label
from evomerge.optimizer.plan import Budget, Plan
from evomerge.optimizer.pool import (
    Race,
    best_trials,
    by_score,
    chosen_event,
    pool_event,
    uniforms,
)
from evomerge.optimizer.sampler_by_name import make_sampler
from evomerge.optimizer.samplers import Sampler, Told
from evomerge.optimizer.stopping import earliest_stop, futility
from evomerge.optimizer.tasks import draw_tasks
from evomerge.optimizer.telling import values_to_tell
from evomerge.space import Genome

# Which draw of tasks it is: generations count from 0.
_SWEEP_DRAW = -1


@dataclass(frozen=True)
class Unit:
    """Tasks that one candidate is to answer in one go; `answered` ones of its part came before.

    `number` and `block` are those of a trial; `whole`: with it the trial has all its tasks.
    """

    label: str
    part: Part
    tasks: tuple[str, ...]
    attempt: int = 0
    answered: int = 0
    number: int | None = None
    block: int | None = None
    whole: bool = True


@dataclass(frozen=True)
class Measure:
    """These units can be measured now, one after the other in this order."""

    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Write:
    """These events are to be logged, in one transaction."""

    events: tuple[Event, ...]


@dataclass(frozen=True)
class GiveUp:
    """The search cannot go on; `failures` are not the candidates' own."""

    reason: str
    failures: tuple[tuple[str, Part], ...]


Step: TypeAlias = Measure | Write | GiveUp


class Course:
    """The course of one search. `history` is that of its log, and grows with it."""

    def __init__(self, plan: Plan, budget: Budget, history: History) -> None:
        self._plan = plan
        self._budget = budget
        self._history = history
        self._sampler: Sampler | None = None
        self._learned = 0
        # The last generation whose stops are decided.
        self._decided = -1
        self._means: list[Genome] = []

    def next(self) -> Step | None:
        """What comes next; None where the winner is chosen and nothing is left to measure."""
        return (
            self._first_measurements()
            or self._start()
            or self._generation()
            or self._selection()
            or self._table()
        )

    @property
    def winner(self) -> str | None:
        """The name of who won, once that is decided; None before, and where nobody has a score."""
        choice = self._history.choices.get(len(self._history.told))
        if choice is not None:
            return str(choice["candidate"])
        return best_observed(self._plan, self._history) if not self._plan.attempts else None

    @property
    def most_trials(self) -> int:
        """About how many trials the budget allows, were none of them stopped."""
        plan, budget = self._plan, self._budget
        if budget.task_evaluations is None:
            return budget.trials or 0
        left = budget.task_evaluations - plan.start_cost - plan.end_cost
        return max(0, left // plan.generation_cost) * plan.population

    def _first_measurements(self) -> Step | None:
        """Base, models and uniform merges."""
        plan, history = self._plan, self._history
        if any(label not in history.named for label in plan.starts):
            return _write(events.named({label: g.tolist() for label, g in plan.starts.items()}))
        sweep = draw_tasks(plan.categories, plan.sweep_tasks, plan.seed, _SWEEP_DRAW)
        return self._measure(
            *(self._unit(label, "search", plan.tasks) for label in plan.references),
            *(self._unit(label, "search", sweep) for label in plan.starts),
        )

    def _start(self) -> Step | None:
        """Where the sampler starts, and the sampler, with all that it was told."""
        if self._sampler is None:
            if self._history.start is None and not self._history.generations:
                return _write(self._start_event())
            self._sampler = self._new_sampler()
        for block in sorted(self._history.told)[self._learned :]:
            self._sampler.tell(self._told(block))
            self._learned += 1
            if self._sampler.mean is not None:
                self._means.append(self._sampler.mean)
        return None

    def _start_event(self) -> Event:
        """The best of a sweep that has a choice, else what the plan says; or a warm start."""
        plan = self._plan
        best = self._best_of(plan.sweep)
        choice = best if len(plan.sweep) > 1 else None
        genome = plan.start if choice is None else plan.sweep[choice]
        # Of equals the sweep's: the earlier of the names.
        warm = self._best_of(plan.starts)
        if warm is None or warm == best:
            return events.start(choice, np.clip(genome, plan.low, plan.high).tolist())
        return events.start(choice, plan.warm[warm].tolist(), warm)

    def _best_of(self, labels: Iterable[str]) -> str | None:
        """The one with the highest score, the earliest of equals; None where none has one."""
        scores = {label: self._history.score(label) for label in labels}
        found = {label: score for label, score in scores.items() if score is not None}
        return max(found, key=lambda label: found[label], default=None)

    def _new_sampler(self) -> Sampler:
        plan, start = self._plan, self._history.start
        return make_sampler(
            plan.sampler,
            start=plan.start if start is None else np.array(start["genome"]),
            sigma0=plan.sigma0,
            population=plan.population,
            seed=plan.seed,
            scaling=plan.scaling,
            low=plan.low,
            high=plan.high,
        )

    def _generation(self) -> Step | None:
        block = len(self._history.told)
        if block not in self._history.generations:
            return self._propose(block) if fits(self._plan, self._budget, self._history) else None
        step = self._measure_generation(block)
        if step is not None:
            return step
        values = values_to_tell(self._plan, self._history, block)
        return self._no_score(block) if values is None else _write(events.told(block, values))

    def _propose(self, block: int) -> Step:
        plan, sampler = self._plan, self._sampler
        assert sampler is not None
        first = block * plan.population
        numbers = range(first, first + plan.population)
        genomes = {number: sampler.propose(number).tolist() for number in numbers}
        tasks = draw_tasks(plan.categories, plan.tasks_per_candidate, plan.seed, block)
        whole = len(tasks) == len(plan.tasks)
        return _write(*events.generation(block, genomes, None if whole else tasks))

    def _measure_generation(self, block: int) -> Step | None:
        """The first tasks of all candidates, then the rest of those worth it."""
        tasks = tuple(self._history.tasks[block] or self._plan.tasks)
        first = self._first_tasks(block, tasks)
        whole = len(first) == len(tasks)
        step = self._measure(*self._trials(block, first, whole))
        if step is not None or whole:
            return step
        stops = self._stops(block, first, len(tasks)) if self._decided < block else []
        self._decided = block
        return _write(*stops) if stops else self._measure(*self._trials(block, tasks, True))

    def _first_tasks(self, block: int, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The tasks after which a candidate may be stopped; all, where it cannot."""
        number = earliest_stop(len(tasks))
        # A second unit of a few tasks costs another switch, and saves next to nothing.
        if not self._plan.futility_stop or 2 * number > len(tasks):
            return tasks
        categories = {task: self._plan.categories[task] for task in tasks}
        return draw_tasks(categories, number, self._plan.seed, _SWEEP_DRAW - 1 - block)

    def _trials(self, block: int, tasks: Sequence[str], whole: bool) -> list[Unit | None]:
        units = []
        for number in self._history.generations[block]:
            label = trial_label(number)
            unit = None if label in self._history.futile else self._unit(label, "search", tasks)
            units.append(unit and replace(unit, number=number, block=block, whole=whole))
        return units

    def _stops(self, block: int, first: Sequence[str], planned: int) -> list[Event]:
        """Who is stopped after the first tasks and not yet known to be."""
        history = self._history
        labels = [trial_label(number) for number in history.generations[block]]
        grades = {
            label: {
                task: grade
                for task in first
                if (grade := history.grades[label, 0].get(task)) is not None
            }
            for label in labels
            # Not whether it failed since: a search that is resumed then decides the same again.
            if not history.missing(label, 0, first)
        }
        stops = []
        for label, own in grades.items():
            others = [other for name, other in grades.items() if name != label]
            found = futility(own, others, planned)
            if found is not None and label not in history.futile:
                stops.append(events.futile(label, found.reason))
        return stops

    def _no_score(self, block: int) -> GiveUp:
        """A generation without any score says nothing about its genomes."""
        labels = [trial_label(number) for number in self._history.generations[block]]
        reason = self._history.failures[labels[-1], "search"]
        return GiveUp(
            f"no candidate of a whole generation could be scored: {reason}",
            tuple((label, "search") for label in labels),
        )

    def _told(self, block: int) -> list[Told]:
        genomes = self._history.genomes
        return [Told(number, genomes[number], value) for number, value in self._history.told[block]]

    def _selection(self) -> Step | None:
        """The pool, measured afresh, and the choice."""
        plan, history, after = self._plan, self._history, len(self._history.told)
        if not plan.attempts or after in history.choices:
            return None
        if after not in history.pools:
            return _write(pool_event(plan, history, self._means, self._left()))
        race = Race(plan, history, history.pools[after])
        for attempt in range(1, plan.attempts + 1):
            runners = race.runners(attempt)
            step = self._measure(
                *(self._unit(label, "selection", plan.tasks, attempt) for label in runners)
            )
            if step is not None:
                return step
        result = race.result()
        if result is None:
            return GiveUp("nothing could be measured afresh", tuple(self._failed_afresh()))
        return _write(chosen_event(after, *result))

    def _left(self) -> int | None:
        """How many tasks may be answered to choose the winner; None: as many as it takes."""
        total = self._budget.task_evaluations
        return None if total is None else total - self._history.spent - self._plan.table_cost

    def _failed_afresh(self) -> list[tuple[str, Part]]:
        return [key for key in self._history.failures if key[1] == "selection"]

    def _table(self) -> Step | None:
        """What the table at the end shows, on all search tasks and on the held-out ones."""
        plan, winner = self._plan, self.winner
        if not plan.references or winner is None:
            return None
        labels = [*plan.references, *uniforms(plan, self._history), winner]
        shown = list(dict.fromkeys(labels))
        return self._measure(
            *(self._unit(label, "table", plan.tasks) for label in shown),
            *(self._unit(label, "holdout", plan.holdout) for label in shown),
        )

    def _unit(self, label: str, part: Part, tasks: Sequence[str], attempt: int = 0) -> Unit | None:
        """What is left of these tasks for a candidate; None where nothing is, or it has failed."""
        missing = self._history.missing(label, attempt, tasks)
        if self._history.has_failed(label, part) or not missing:
            return None
        return Unit(label, part, missing, attempt, len(tasks) - len(missing))

    def _measure(self, *units: Unit | None) -> Measure | None:
        wanted = tuple(unit for unit in units if unit is not None)
        return Measure(wanted) if wanted else None


def fits(plan: Plan, budget: Budget, history: History) -> bool:
    """Whether the budget allows one more generation, and all that must follow it."""
    trials = (len(history.told) + 1) * plan.population
    if budget.trials is not None and trials > budget.trials:
        return False
    if budget.task_evaluations is None:
        return True
    return history.spent + plan.generation_cost + plan.end_cost <= budget.task_evaluations


def best_observed(plan: Plan, history: History) -> str | None:
    """The best of trials, inputs, uniform merges and warm starts; a trial wins a tie.

    By adjusted score.
    """
    trials = best_trials(plan, history)[:1]
    ranked = by_score(plan, history, [*trials, *plan.starts, *plan.inputs])
    return ranked[0] if ranked else None


def _write(*written: Event) -> Write:
    return Write(tuple(written))
