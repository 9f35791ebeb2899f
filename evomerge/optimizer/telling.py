"""What a sampler is told of a generation: scores, smoothed, and something for who has none."""

from __future__ import annotations

import math

import numpy as np

from evomerge.optimizer.defaults import SMOOTHING_WINDOW
from evomerge.optimizer.history import History, trial_label
from evomerge.optimizer.plan import Plan
from evomerge.optimizer.smoothing import Block, adjusted_scores, smoothed


def values_to_tell(plan: Plan, history: History, block: int) -> list[tuple[int, float]] | None:
    """(number, value) of a whole generation, higher is better; None where nobody has a score.

    A candidate that failed has the worst value there is, one that was stopped at most that of the
    worst of those that were not.
    """
    numbers = history.generations[block]
    values = _values(plan, history, block)
    if all(math.isnan(value) for value in values):
        return None
    futile = [trial_label(number) in history.futile for number in numbers]
    whole = [value for value, stopped in zip(values, futile, strict=True) if not stopped]
    worst = _lowest(whole) if whole else math.inf
    values = [
        min(value, worst) if stopped else value
        for value, stopped in zip(values, futile, strict=True)
    ]
    lowest = _lowest(values)
    filled = [lowest if math.isnan(value) else value for value in values]
    return list(zip(numbers, filled, strict=True))


def block_of(plan: Plan, history: History, block: int) -> Block:
    """A generation's places (of the genomes that count, clipped) and grades."""
    numbers = history.generations[block]
    tasks = tuple(history.tasks[block] or plan.tasks)
    places = [
        plan.scaling.place(np.clip(history.genomes[number], plan.low, plan.high))
        for number in numbers
    ]
    grades = [_row(history, number, tasks) for number in numbers]
    return Block(np.array(places), np.array(grades), tasks)


def _values(plan: Plan, history: History, block: int) -> list[float]:
    """The value of each candidate by its grades; NaN for one without."""
    if plan.smooths:
        first = max(0, block - SMOOTHING_WINDOW + 1)
        return list(smoothed([block_of(plan, history, each) for each in range(first, block + 1)]))
    here = block_of(plan, history, block)
    graded = np.isfinite(here.grades)
    if graded[graded.any(axis=1)].all():  # the scores as they are, to the last bit
        scores = [history.score(trial_label(number)) for number in history.generations[block]]
        return [math.nan if score is None else score for score in scores]
    return [float(value) for value in adjusted_scores(here.grades)]


def _row(history: History, number: int, tasks: tuple[str, ...]) -> list[float]:
    label = trial_label(number)
    if history.has_failed(label):
        return [math.nan] * len(tasks)
    found = history.grades.get((label, 0), {})
    grades = [found.get(task) for task in tasks]
    return [math.nan if grade is None else grade for grade in grades]


def _lowest(values: list[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.inf)
