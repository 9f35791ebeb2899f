"""Adjusted scores: what candidates that saw different tasks are compared by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from evomerge.optimizer.history import Grades, History, trial_label

Array = npt.NDArray[np.float64]

# Tasks that no chain of candidates connects compare with nobody: they get no difference.
_RIDGE = 1e-9


def adjusted_scores(grades: Mapping[str, Grades], tasks: Sequence[str]) -> dict[str, float]:
    """candidate -> its score less the difficulty of its tasks, on the scale of all `tasks`.

    A grade is taken for a candidate's part plus a task's, by least squares over all `grades`; what
    is reported is the candidate's part plus the mean of the tasks'. A candidate with a grade for
    each of `tasks` keeps its score to the last bit; one without any grade is left out.
    """
    place = {task: index for index, task in enumerate(tasks)}
    found = {
        label: {task: grade for task, grade in row.items() if grade is not None and task in place}
        for label, row in grades.items()
    }
    found = {label: row for label, row in found.items() if row}
    scores = {label: math.fsum(row.values()) / len(row) for label, row in found.items()}
    if len({frozenset(row) for row in found.values()}) <= 1:
        return scores
    difficulty = _difficulty(list(found.values()), place)
    return {
        label: scores[label]
        if len(row) == len(place)
        else scores[label] - float(difficulty[[place[task] for task in row]].mean())
        for label, row in found.items()
    }


def adjusted_trials(history: History, tasks: Sequence[str]) -> dict[int, float]:
    """number -> adjusted score, of all trials that have grades and did not fail."""
    scores = adjusted_candidates(history, tasks)
    return {
        number: scores[label]
        for number in history.genomes
        if (label := trial_label(number)) in scores
    }


def adjusted_candidates(history: History, tasks: Sequence[str]) -> dict[str, float]:
    """candidate -> adjusted score of greedy answers, of all that have grades and did not fail."""
    blocks = {
        trial_label(number): block
        for block, numbers in history.generations.items()
        for number in numbers
    }
    grades = {}
    for (label, attempt), row in history.grades.items():
        if attempt or history.has_failed(label):
            continue
        asked = history.tasks[blocks[label]] if label in blocks else None
        # The winner answers more at the end; among the trials it keeps to its generation's tasks.
        grades[label] = row if asked is None else {task: row.get(task) for task in asked}
    return adjusted_scores(grades, tasks)


def _difficulty(rows: Sequence[Mapping[str, float]], place: Mapping[str, int]) -> Array:
    """(t,) each task's part in the grades, 0 in the mean over the tasks that have grades."""
    number = len(place)
    matrix, right = np.zeros((number, number)), np.zeros(number)
    for row in rows:
        at = np.array([place[task] for task in row])
        values = np.fromiter(row.values(), dtype=np.float64)
        # The normal equations with the candidates' own parts eliminated.
        matrix[np.ix_(at, at)] -= 1 / len(at)
        matrix[at, at] += 1
        right[at] += values - values.mean()
    seen = matrix.diagonal() > 0
    matrix[~seen, ~seen] = 1
    parts = np.linalg.solve(matrix + _RIDGE * np.eye(number), right)
    parts[~seen] = parts[seen].mean() if seen.any() else 0.0
    return np.asarray(parts - parts.mean(), dtype=np.float64)
