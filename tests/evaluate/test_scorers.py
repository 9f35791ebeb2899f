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


# What rouge-score 0.1.2 gives with a tokenizer of the same words.
@pytest.mark.parametrize(
    ("answer", "reference", "grade"),
    [
        ("猫は庭で寝ています。", "猫が庭で寝ている。", 0.705882),
        ("the dog sat on a mat today", "the cat sat on the mat", 0.615385),
        ("b d c a b a", "a b c b d a b", 0.615385),
        ("大阪", "東京は日本の首都です。", 0.0),
        ("答えは 42 だ", "答えは42です", 0.727273),
        ("同じ文です", "同じ文です", 1.0),
        ("", "文", 0.0),
    ],
)
def test_rouge_l_is_that_of_rouge_score_with_words_of_japanese(
    answer: str, reference: str, grade: float
) -> None:
    assert SCORERS["rouge_l"].grade(task_with(reference), answer) == pytest.approx(grade, abs=1e-6)


def test_chrf_is_that_of_sacrebleu_in_zero_to_one() -> None:
    import sacrebleu

    answer, reference = "猫は庭で寝ています。", "猫が庭で寝ている。"
    expected = sacrebleu.sentence_chrf(answer, [reference]).score / 100
    assert SCORERS["chrf"].grade(task_with(reference), answer) == pytest.approx(expected)
    assert SCORERS["chrf"].grade(task_with(reference), reference) == pytest.approx(1.0)
    assert SCORERS["chrf"].grade(task_with(reference), "") == 0.0


@pytest.mark.parametrize("name", ["chrf", "rouge_l", "exact"])
def test_what_compares_with_a_reference_objects_to_an_empty_one(name: str) -> None:
    assert SCORERS[name].objection(task_with(" ")) is not None
    assert SCORERS[name].objection(task_with("文")) is None
