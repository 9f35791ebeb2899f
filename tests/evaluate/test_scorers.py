"""Grades of answers, against hand-made cases."""

from __future__ import annotations

import pytest

from evomerge.evaluate.scorers import SCORERS, last_number
from evomerge.evaluate.task import Task


def task_with(reference: str) -> Task:
    return Task("1", "in", reference, "all", "in")


@pytest.mark.parametrize(
    ("answer", "reference", "grade"),
    [
        ("cat", "cat", 1.0),
        (" cat\n", "cat", 1.0),
        ("Cat", "cat", 0.0),
        ("１２", "12", 1.0),
        ("cats", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_exact_wants_the_same_text(answer: str, reference: str, grade: float) -> None:
    assert SCORERS["exact"].grade(task_with(reference), answer) == grade


@pytest.mark.parametrize(
    ("answer", "reference", "grade"),
    [
        ("The answer is 42.", "42", 1.0),
        ("7-3 = 4", "4", 1.0),
        ("4, not 5", "4", 0.0),
        ("1,234.50 yen", "1234.5", 1.0),
        ("-3", "3", 0.0),
        ("1e3", "1000", 1.0),
        ("答えは１２です", "12", 1.0),
        ("none", "0", 0.0),
    ],
)
def test_numeric_compares_the_last_number(answer: str, reference: str, grade: float) -> None:
    assert SCORERS["numeric"].grade(task_with(reference), answer) == grade


def test_a_minus_after_a_digit_is_no_sign() -> None:
    assert last_number("7-3") == 3.0


def test_references_that_no_answer_could_meet_are_named() -> None:
    assert SCORERS["exact"].objection(task_with("  ")) == "the reference is empty"
    assert SCORERS["numeric"].objection(task_with("six")) == "'six' holds no number"
    assert SCORERS["numeric"].objection(task_with("6")) is None
