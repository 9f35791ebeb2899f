"""What can be said of a winner: its score afresh, its lead over the others, how sure both are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.optimizer.adjusted import adjusted_trials
from evomerge.optimizer.history import History, trial_label
from evomerge.optimizer.plan import Plan
from evomerge.optimizer.pool import best_trials, fresh_grades, uniforms
from evomerge.optimizer.selection import (
    Grades,
    optimism,
    paired_interval,
    repetition_interval,
    within,
)

# The range of grades where it is not known.
ANY_GRADE = (-math.inf, math.inf)
_DECIMALS = 6


def summary_of(
    plan: Plan,
    history: History,
    winner: str,
    models: Sequence[str],
    grade_range: tuple[float, float] = ANY_GRADE,
) -> dict[str, Any]:
    """The summary of a finished study, as plain values; `models` are the names of its inputs.

    fresh: the winner's score on the search tasks in fresh attempts, with the 95 % interval of this
    score on these tasks under repetition, within the range of grades; None where there were none.
    differences: the winner less base, each model and the best uniform merge, greedy answers, with
    95 % intervals by the bootstrap over tasks, on the held-out tasks where there are any (`part`).
    optimism: by how much the best value that the search saw exceeds the same candidate's fresh
    score.
    """
    part = "holdout" if plan.holdout else "search"
    differences = _differences(plan, history, winner)
    titles = dict(zip(plan.inputs, models, strict=True))
    for one in differences:
        one["model"] = titles.get(one["candidate"], one["candidate"])
    return {
        "part": part,
        "fresh": fresh_score(plan, history, winner, grade_range),
        "differences": differences,
        "optimism": _optimism(plan, history),
        "verdict": _verdict(plan, history, winner, differences, titles),
    }


def fresh_score(
    plan: Plan, history: History, winner: str, grade_range: tuple[float, float] = ANY_GRADE
) -> dict[str, Any] | None:
    """The mean grade in fresh attempts and its interval under repetition; None without attempts."""
    grades = fresh_grades(plan.tasks, history, winner, plan.attempts) if plan.attempts else None
    if grades is None or not np.isfinite(grades).any():
        return None
    score = mean_of_tasks(grades)
    repeated = (np.isfinite(grades).sum(axis=0) > 1).any()
    low, high = within(repetition_interval(grades), grade_range) if repeated else (None, None)
    return {"score": score, "low": low, "high": high, "attempts": plan.attempts}


def mean_of_tasks(grades: Grades) -> float:
    """The mean over the tasks of (attempts, tasks) of the mean over their attempts."""
    seen = np.isfinite(grades).any(axis=0)
    return float(np.nanmean(grades[:, seen], axis=0).mean())


def _differences(plan: Plan, history: History, winner: str) -> list[dict[str, Any]]:
    tasks = plan.holdout or plan.tasks
    best_uniform = uniforms(plan, history)[:1]
    found = []
    for label in dict.fromkeys([*plan.references, *best_uniform]):
        own, other = _greedy(history, winner, tasks), _greedy(history, label, tasks)
        shared = int((np.isfinite(own) & np.isfinite(other)).sum())
        if label == winner or not shared:
            continue
        difference, low, high = paired_interval(own, other, plan.seed)
        numbers = {"difference": difference, "low": low, "high": high}
        rounded = {key: _rounded(value) for key, value in numbers.items()}
        found.append({"candidate": label, **rounded, "tasks": shared})
    return found


def _greedy(history: History, label: str, tasks: Sequence[str]) -> Grades:
    row = history.grades.get((label, 0), {})
    grades = [row.get(task) for task in tasks]
    return np.array([[math.nan if grade is None else grade for grade in grades]])


def _optimism(plan: Plan, history: History) -> dict[str, Any] | None:
    """Of the best observed trial; None where it was not measured afresh."""
    best = best_trials(plan, history)[:1]
    if not best or not plan.attempts:
        return None
    fresh = fresh_grades(plan.tasks, history, best[0], plan.attempts)
    fresh = fresh[np.isfinite(fresh).any(axis=1)]
    if not len(fresh):
        return None
    scores = {
        trial_label(number): one for number, one in adjusted_trials(history, plan.tasks).items()
    }
    observed = scores[best[0]]
    return {
        "candidate": best[0],
        "observed": observed,
        "fresh": mean_of_tasks(fresh),
        "difference": optimism(observed, fresh),
    }


def _verdict(
    plan: Plan,
    history: History,
    winner: str,
    differences: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
) -> str:
    """One sentence: whether the winner beats the best input, as far as can be told."""
    if winner in titles:
        return f"No merge was found that is better than an input: the winner is {titles[winner]}."
    tasks = plan.holdout or plan.tasks
    scores = {label: history.greedy_score(label, tasks) for label in plan.inputs}
    measured = {label: score for label, score in scores.items() if score is not None}
    against = {one["candidate"]: one for one in differences}
    best = max(measured, key=lambda label: measured[label], default=None)
    if best is None or best not in against:
        return "How the winner compares with the inputs could not be measured."
    one = against[best]
    where = f"{one['tasks']} {'held-out' if plan.holdout else 'search'} tasks"
    lead = (
        f"{one['difference']:+.3f} (95 % interval {_shown(one['low'])} to {_shown(one['high'])}) "
        f"on {where}"
    )
    if one["low"] is not None and one["low"] > 0:
        return f"The winner beats the best input, {titles[best]}: {lead}."
    return f"Nothing beats the best input, {titles[best]}, significantly: the winner is {lead}."


def _rounded(value: float) -> float | None:
    return round(value, _DECIMALS) if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f}"
