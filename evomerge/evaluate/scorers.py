"""What turns one answer into a grade; a suite names its scorer."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Protocol

from evomerge.evaluate.task import Task

# A sign counts only where no digit stands before it: "7-3" holds 7 and 3, not 7 and -3.
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Scorer(Protocol):
    """Grades answers against references, in [low, high]; higher is better."""

    name: str
    low: float
    high: float

    def objection(self, task: Task) -> str | None:
        """Why no answer to `task` can be graded; None where that is possible."""

    def grade(self, task: Task, answer: str) -> float:
        """The grade of `answer` to `task`."""


class ExactScorer:
    """1.0 where answer and reference are the same text but for outer white space, else 0.0.

    Both are put in Unicode's NFKC form first, so that "１２" is "12" (as Japanese models write it).
    """

    name = "exact"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        return None if _normal(task.reference) else "the reference is empty"

    def grade(self, task: Task, answer: str) -> float:
        return float(_normal(answer) == _normal(task.reference))


class NumericScorer:
    """1.0 where the last number in the answer is the reference's to 1e-6 of its size, else 0.0.

    Numbers may have a sign, thousands commas, decimals and an exponent.
    """

    name = "numeric"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        found = last_number(task.reference)
        return None if found is not None else f"{task.reference!r} holds no number"

    def grade(self, task: Task, answer: str) -> float:
        given, right = last_number(answer), last_number(task.reference)
        if given is None or right is None:
            return 0.0
        return float(math.isclose(given, right, rel_tol=1e-6, abs_tol=1e-9))


SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (ExactScorer(), NumericScorer())}


def last_number(text: str) -> float | None:
    """The last number written in `text` (in NFKC form); None where there is none."""
    numbers = _NUMBER.findall(_normal(text))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()
