"""The futility stop: a candidate that credibly is among the worse half is not graded further.

What it saves is spent on other candidates. Which of the worse half it is matters little: samplers
learn from the better half.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

TaskId = TypeVar("TaskId", bound=Hashable)

EARLIEST = 8
# One-sided, for each comparison; half of all comparisons have to say so.
_Z = 1.64
_FEWEST_OTHERS = 3


@dataclass(frozen=True)
class Futility:
    """Why a candidate is stopped: `behind` of `compared` others are credibly better."""

    tasks: int
    planned: int
    behind: int
    compared: int
    difference: float

    @property
    def reason(self) -> str:
        """The reason in words."""
        return (
            f"stopped after {self.tasks} of {self.planned} tasks: on shared tasks {self.behind} of "
            f"{self.compared} others of its generation are better beyond chance (it is "
            f"{-self.difference:.2f} behind their median)"
        )


def earliest_stop(planned: int) -> int:
    """After how many of its `planned` tasks a candidate may be stopped first."""
    return max(EARLIEST, math.ceil(planned / 4))


def futility(
    own: Mapping[TaskId, float], others: Sequence[Mapping[TaskId, float]], planned: int
) -> Futility | None:
    """Whether a candidate with grades `own` can be stopped before its `planned` tasks are done.

    `others` are the grades of candidates of the same generation, those stopped before included.
    None, go on, unless at least half of them, and three, are better on the shared tasks by 1.64
    standard errors of the paired difference.
    """
    if not earliest_stop(planned) <= len(own) < planned:
        return None
    differences = [_differences(own, other) for other in others]
    differences = [each for each in differences if len(each) >= EARLIEST]
    if len(differences) < _FEWEST_OTHERS:
        return None
    means = np.array([each.mean() for each in differences])
    counts = np.array([len(each) for each in differences])
    # One spread for all comparisons: that of eight whole grades alone may well be 0.
    spread = math.sqrt(float(np.mean([each.var(ddof=1) for each in differences])))
    behind = int((means + _Z * spread / np.sqrt(counts) < 0).sum())
    if behind < max(_FEWEST_OTHERS, len(differences) / 2):
        return None
    return Futility(len(own), planned, behind, len(differences), float(np.median(means)))


def _differences(own: Mapping[TaskId, float], other: Mapping[TaskId, float]) -> np.ndarray:
    return np.array([grade - other[task] for task, grade in own.items() if task in other])
