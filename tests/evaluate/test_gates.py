"""Gates: answers that are wrong on their face, and those that only look it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.gates import count_gates, gates_of, japanese_share
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.evaluate.task import Task
from tests.evaluate.test_suite import EchoEngine, write_rows
from tests.shared_data import shared_data

JAPANESE = Task("1", "猫について教えて。", "猫は動物です。" * 9, "all", "猫について教えて。")
ENGLISH = "The cat is a small animal that many people keep at home, and it likes to sleep a lot."
CHINESE = (
    "猫是一种常见的家养动物,喜欢睡觉并且善于捕捉老鼠。许多人把猫当作宠物饲养,因为它们可爱。" * 2
)
CODE = (
    "```python\nimport collections\n\ndef count(words):\n    return collections.Counter(words)\n```"
)
LIST = "\n".join(f"- {name}" for name in ("Apple Banana Cherry", "Durian Elderberry", "Fig Grape"))


@pytest.mark.parametrize(
    ("answer", "closed"),
    [
        ("猫は小さな動物で、よく家で飼われています。", ()),
        (" \n", ("empty",)),
        (ENGLISH, ("language",)),
        (CHINESE, ("language",)),
        (f"次の通りです。\n{CODE}", ()),
        (CODE, ()),
        (LIST, ()),
        ("OK", ()),
        ("答えです。" * 20, ("repetition",)),
        ("はじめに。" + "同じことを何度も言います。" * 30, ("repetition",)),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20", ()),
        ("-" * 80, ()),
    ],
)
def test_gates_close_for_what_is_wrong_on_its_face(answer: str, closed: tuple[str, ...]) -> None:
    assert gates_of(JAPANESE, answer, cut=False) == closed


def test_a_translation_into_english_is_no_wrong_language() -> None:
    task = Task("1", "英語にしてください。", ENGLISH, "all", "英語にしてください。")
    assert gates_of(task, ENGLISH, cut=False) == ()


def test_an_english_task_may_be_answered_in_english() -> None:
    assert gates_of(Task("1", "Cats?", "", "all", "Cats?"), ENGLISH, cut=False) == ()


def test_length_is_a_cut_or_four_thousand_characters() -> None:
    text = "".join(f"{number}番目の文です。" for number in range(500))
    assert gates_of(JAPANESE, text, cut=False) == ("length",)
    assert gates_of(JAPANESE, "短い文です。", cut=True) == ("length",)


def test_the_share_of_japanese_is_none_where_too_little_is_said() -> None:
    assert japanese_share("はい") is None
    assert japanese_share("これは日本語の文です。" * 9) == 1.0
    assert japanese_share(ENGLISH) == 0.0


def suite_of(folder: Path, **settings: object) -> Suite:
    rows = [{"input": "猫 は", "output": "は"}, {"input": "は は", "output": "は"}]
    write_rows(folder, rows)
    return load_suite(SuiteConfig.model_validate({"data": "tasks.jsonl", **settings}), folder)


class SilentEngine(EchoEngine):
    """Says what it is asked, but nothing to the first prompt of all."""

    def generate(self, *given: object, **further: object):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        first, *others = super().generate(*given, **further)  # type: ignore[arg-type]
        return [replace(first, text=" "), *others]


@pytest.mark.parametrize(("gates", "grades"), [({}, [1.0, 1.0]), ({"empty": 0.5}, [0.5, 1.0])])
def test_a_gate_is_counted_and_changes_a_grade_only_where_the_suite_says_so(
    tmp_path: Path, gates: dict[str, float], grades: list[float]
) -> None:
    (tmp_path / "always.py").write_text("def one(task, answer):\n    return 1\n")
    rows = [{"input": "猫 は", "output": "は"}, {"input": "は は", "output": "は"}]
    write_rows(tmp_path, rows)
    config = SuiteConfig.model_validate(
        {"data": "tasks.jsonl", "scorer": "always.py:one", "gates": gates},
        context={"trust_code": True},
    )
    suite = load_suite(config, tmp_path)
    results = Evaluation(SilentEngine(), suite).begin(["1", "2"]).result()
    assert [result.gates for result in results] == [("empty",), ()]
    assert [result.grade for result in results] == grades
    assert count_gates(results) == {"empty": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"gates": {"empty": 1.5}},
        {"gates": {"language": 0}, "scorer": "judge"},
    ],
)
def test_a_gates_grade_must_be_one_of_the_suites(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"gates\.\w+: .* is no grade of this suite"):
        suite_of(tmp_path, **settings)


def test_real_answers_of_good_models_pass_the_gates(tmp_path: Path) -> None:
    tasks = load_suite("elyza-tasks-100", tmp_path, shared_data("elyza_tasks_100.csv")).tasks
    by_id = {task.id: task for task in tasks}
    lines = shared_data("bench_elyza_answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    closed = [
        gate
        for answer in answers
        for gate in gates_of(by_id[str(answer["task_id"])], answer["answer"] or "", cut=False)
    ]
    assert len(answers) == 800
    # Three are empty; two say the Japanese part in a list, and all around it in English.
    assert sorted(closed) == ["empty"] * 3 + ["language"] * 2
    references = [gates_of(task, task.reference, cut=False) for task in tasks]
    assert set(references) == {()}
