"""Reading a judge's reply: hand-made cases, and 200 recorded ones where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.evaluate.judge_reply import Verdict, read_verdict

RECORDED = next(
    (
        file
        for folder in Path(__file__).resolve().parents
        if (file := folder / "shared" / "data" / "shaberi_judge_outputs_sample.jsonl").is_file()
    ),
    None,
)


@pytest.mark.skipif(RECORDED is None, reason="the recorded judge texts are not at hand")
def test_every_recorded_reply_gives_the_recorded_grade() -> None:
    assert RECORDED is not None
    rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    found = [read_verdict(row["judge_output"], 1, 5) for row in rows]
    assert len(rows) == 200
    assert [verdict and verdict.grade for verdict in found] == [row["score"] for row in rows]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("4", 4),
        ("４点", 4),
        ('{"reason": "5つの点で良い", "grade": 3}', 3),
        ('```json\n{"reason": "1 and 2", "grade": "3"}\n```', 3),
        ('{"grade": 2, "reason": "only 5 of 9"}', 2),
        ('I say {"a": 1} and {"reason": "line\nend", "Grade": 4.0} at 5', 4),
        ('{"score": 4.5, "reason": ""}', 4.5),
        ("Rubric: 1 wrong, 5 right.\n\nFINAL SCORE: 3\n\nI keep my 5 rules.", 3),
        ("FINAL SCORE: 2\n…\n**FINAL SCORE: 4**", 4),
        ("Rating: [[7]] because 3 points are missing", 7),
        ("<score>2</score> of 5", 2),
        ("評価：4\n理由は3つあります", 4),
        ("**Score:** 4/5", 4),
        ("The answer has 2 mistakes. I give it 3 out of 5.", 3),
        ("基準は5段階。回答は4点満点中3点です", 3),
        ("1. good\n2. long\nSo it is a 4.", 4),
        ("3.5 would be too much in 2024; 2", 2),
        ("<think>maybe 5, or 4?</think>\n2", 2),
        ("so a 5? no.</think> FINAL SCORE: 1", 1),
    ],
)
def test_the_grade_that_the_judge_decided_on_is_found(reply: str, grade: float) -> None:
    verdict = read_verdict(reply, 1, 10 if "[[" in reply else 5)
    assert verdict is not None
    assert verdict.grade == grade


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "I cannot grade this.",
        "FINAL SCORE: 7",
        "FINAL SCORE: -2",
        '{"reason": "3 of 5 are right", "gra',
        '{"reason": "fine", "grade": 9}',
        '```json\n{"reason": "4 is too much',
        "<think>it is a 4, surely 4",
        "GPT-4 would say v1.5",
        "{" * 5000,
        '{"grade": 1' + "0" * 400 + "}",
        '{"grade": 1' + "0" * 5000 + "}",
        '{"grade": NaN}',
    ],
)
def test_a_reply_without_a_grade_in_the_range_has_none(reply: str) -> None:
    assert read_verdict(reply, 1, 5) is None


def test_the_reason_comes_with_the_grade() -> None:
    assert read_verdict('{"reason": "short", "grade": 4}', 1, 5) == Verdict(4.0, "short")
    assert read_verdict("Too short.\nGRADE: 2", 1, 5) == Verdict(2.0, "Too short.\nGRADE: 2")
