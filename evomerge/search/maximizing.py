"""The search without models: the same course, samplers and selection on any graded problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from evomerge.database import open_database
from evomerge.errors import CandidateError, ConfigError, RunError
from evomerge.evaluate.ledger import UnitKey, mean_grade
from evomerge.evaluate.task import TaskResult
from evomerge.optimizer import defaults, events
from evomerge.optimizer.course import Course, GiveUp, Measure, Unit, Write
from evomerge.optimizer.events import Event
from evomerge.optimizer.history import History, Measurement
from evomerge.optimizer.names import COURSE, SamplerName, resolved_sampler
from evomerge.optimizer.plan import Budget, Plan, check_budget, with_tasks_for
from evomerge.optimizer.samplers import Scaling
from evomerge.optimizer.summary import fresh_score
from evomerge.search.candidates import genome_of
from evomerge.search.log import EventLog, Log, MemoryLog, begun_with
from evomerge.search.resolve import what_changed
from evomerge.search.storage import held
from evomerge.search.study import study_directory
from evomerge.space import Genome

Bounds: TypeAlias = tuple[float, float] | tuple[Sequence[float], Sequence[float]]
Grade: TypeAlias = Callable[[Genome, Sequence[int], int], Sequence[float | None]]

_NAME = "maximize"
_SCORER = "grade"
# The bounds of a weight are this wide: what sigma0 and the scales of a sweep are meant for.
_WIDTH = 2.5
# Uniform merges of weights .25, .5, .75, 1 and 1.25 within [-0.5, 2], as shares of the way.
_SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Maximum:
    """What a search found: `weights` (dimension,) and their `score`, measured afresh.

    `interval`: the 95 % interval of this score on these tasks under repetition. `spent` task
    evaluations of the budget; `trials` candidates of the sampler; `source` is the winner's name.
    """

    weights: Genome
    score: float
    interval: tuple[float, float]
    spent: int
    trials: int
    source: str
    history: History


def maximize(
    grade: Grade,
    *,
    dimension: int,
    bounds: Bounds,
    tasks: int,
    budget: int,
    seed: int = 0,
    sampler: SamplerName = "auto",
    storage: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Maximum:
    """The weights whose mean grade over the tasks is highest, as a search of merges finds them.

    `grade(weights, task_ids, attempt)` gives one number for each task (None: unscored), higher is
    better; it is called in this thread, task ids run from 0, and attempts above 0 are wanted
    repetitions. `bounds` are the lowest and the highest weight, numbers or one for each. `budget`
    counts task evaluations, all of them. With `storage`, a folder, the search can be killed and
    called again with the same arguments: it goes on where it stopped. `settings` are fields of
    `Plan` other than the defaults. Raises ConfigError where the arguments do not fit together.
    """
    plan = _plan(
        dimension,
        bounds,
        tasks,
        budget=budget,
        seed=seed,
        sampler=sampler,
        settings=settings or {},
    )
    total = Budget(task_evaluations=budget)
    check_budget(plan, total, "maximize: budget")
    with _opened(storage, _fingerprint(plan, settings or {})) as log:
        course = Course(plan, total, log.history)
        _drive(course, log, grade)
        return _found(plan, log.history, course.winner)


def _plan(
    dimension: int,
    bounds: Bounds,
    tasks: int,
    *,
    budget: int,
    seed: int,
    sampler: SamplerName,
    settings: Mapping[str, Any],
) -> Plan:
    if dimension < 1 or tasks < 1:
        raise ConfigError(
            f"maximize: dimension ({dimension}) and tasks ({tasks}) should be 1 at least"
        )
    low, high = _bounds(bounds, dimension)
    sweep = {f"uniform {share:g}": low + share * (high - low) for share in _SWEEP}
    asked: dict[str, Any] = {
        "sampler": resolved_sampler(sampler, COURSE),
        "start": low + _SWEEP[1] * (high - low),
        "sigma0": defaults.SIGMA0,
        "population": defaults.population(dimension),
        "seed": seed,
        "scaling": Scaling((high - low) / _WIDTH, np.zeros(dimension, dtype=np.bool_)),
        "low": low,
        "high": high,
        "categories": {str(task): "all" for task in range(tasks)},
        "tasks_per_candidate": defaults.tasks_per_candidate(tasks),
        "sweep": sweep,
        "sweep_tasks": defaults.sweep_tasks(tasks),
        "attempts": defaults.SELECTION_REPETITIONS,
    }
    plan = Plan(**{**asked, **settings})
    if "tasks_per_candidate" in settings:
        return plan
    return with_tasks_for(plan, Budget(task_evaluations=budget))


def _bounds(bounds: Bounds, dimension: int) -> tuple[Genome, Genome]:
    """(dimension,) each. Raises ConfigError where they leave no room."""
    try:
        low, high = (np.broadcast_to(np.asarray(end, float), (dimension,)) for end in bounds)
    except ValueError as error:
        raise ConfigError(
            f"maximize: bounds: {bounds!r} should be (low, high), numbers or {dimension} of each"
        ) from error
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ConfigError(f"maximize: bounds: {bounds!r} should be finite, with low < high")
    return low.copy(), high.copy()


@contextmanager
def _opened(storage: Path | str | None, says: Mapping[str, str]) -> Iterator[Log]:
    """The log, in memory or in a folder's database; ConfigError where it is of another search."""
    with ExitStack() as stack:
        if storage is None:
            yield MemoryLog()
            return
        folder = Path(storage)
        stack.enter_context(held(study_directory(folder, _NAME)))
        log = EventLog(open_database(folder), _NAME)
        stack.callback(log.close)
        if log.history.begun is None:
            log.append(events.begun({"fingerprint": says, "course": COURSE}))
        changes = what_changed(begun_with(log)["fingerprint"], says)
        if changes:
            raise ConfigError(
                f"{folder}: the search there began with other settings:\n  " + "\n  ".join(changes)
            )
        yield log


def _fingerprint(plan: Plan, settings: Mapping[str, Any]) -> dict[str, str]:
    """What decides a search, but for the function that grades, and for the budget."""
    return {
        "sampler": plan.sampler,
        "sigma0": str(plan.sigma0),
        "population": str(plan.population),
        "seed": str(plan.seed),
        "bounds": f"{plan.low.tolist()} to {plan.high.tolist()}",
        "tasks": str(len(plan.tasks)),
        "tasks_per_candidate": str(settings.get("tasks_per_candidate", "by the budget")),
        "smoothing": str(plan.smoothing),
        "futility_stop": str(plan.futility_stop),
        "attempts": str(plan.attempts),
    }


def _drive(course: Course, log: Log, grade: Grade) -> None:
    while (step := course.next()) is not None:
        if isinstance(step, GiveUp):
            raise RunError(f"maximize: {step.reason}")
        if isinstance(step, Write):
            log.append(*step.events)
        else:
            _measure(step, log, grade)


def _measure(step: Measure, log: Log, grade: Grade) -> None:
    for unit in step.units:
        weights = np.array(genome_of(log.history, unit.label))
        log.append(_measured(unit, weights, grade))


def _measured(unit: Unit, weights: Genome, grade: Grade) -> Event:
    """The event of a unit; a CandidateError of `grade` is a failure of its weights."""
    try:
        results = _graded(unit, weights, grade)
        score = mean_grade(results)
        if score is None:
            raise CandidateError(f"none of its {len(results)} tasks could be graded")
    except CandidateError as error:
        return events.failed(unit.label, unit.part, str(error), {})
    measurement = Measurement(
        score=score,
        tasks=len(results),
        unscored=sum(result.grade is None for result in results),
        cut=0,
        recipe_digest="",
        seconds={},
    )
    key = UnitKey(unit.label, unit.attempt, "", "", _SCORER)
    return events.scored(unit.part, measurement, key, results, unit.answered)


def _graded(unit: Unit, weights: Genome, grade: Grade) -> list[TaskResult]:
    grades = list(grade(weights, [int(task) for task in unit.tasks], unit.attempt))
    if len(grades) != len(unit.tasks):
        raise ConfigError(
            f"maximize: grade gave {len(grades)} grades for {len(unit.tasks)} tasks; one for each "
            "is needed, None where there is none"
        )
    return [
        TaskResult(task, "", "", "none", _number(one, task), 0.0, "", unit.attempt)
        for task, one in zip(unit.tasks, grades, strict=True)
    ]


def _number(grade: float | None, task: str) -> float | None:
    if grade is not None and not math.isfinite(grade):
        raise ConfigError(f"maximize: grade gave {grade} for task {task}; None means no grade")
    return None if grade is None else float(grade)


def _found(plan: Plan, history: History, winner: str | None) -> Maximum:
    if winner is None:
        raise RunError("maximize: nothing could be scored")
    fresh = fresh_score(plan, history, winner)
    if fresh is not None and fresh["low"] is not None:
        score, interval = fresh["score"], (fresh["low"], fresh["high"])
    else:
        found = history.score(winner) if fresh is None else fresh["score"]
        score, interval = (math.nan if found is None else found), (-math.inf, math.inf)
    return Maximum(
        weights=np.array(genome_of(history, winner)),
        score=score,
        interval=interval,
        spent=history.spent,
        trials=len(history.genomes),
        source=winner,
        history=history,
    )
