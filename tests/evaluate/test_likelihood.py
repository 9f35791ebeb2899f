"""Grades without an answer: choices and references by their likelihood, in a real small model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.engine.base import Engine
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.likelihood import LIKELIHOOD_SCORERS, Likelihood, likelihoods
from evomerge.evaluate.suite import Suite, SuiteConfig, check_prompt_lengths, load_suite
from evomerge.evaluate.task import Task
from tests import tiny
from tests.engine.conftest import start
from tests.evaluate.test_suite import EchoEngine, write_rows

QUESTION = Task("1", "q", "b", "all", "q", choices=("a", "b", "cccc"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny.llama(tmp_path_factory.mktemp("model") / "base", layers=2)
    with start("transformers", model, []) as opened:
        yield opened


def suite_of(folder: Path, rows: list[dict[str, object]], **settings: object) -> Suite:
    write_rows(folder, rows)
    return load_suite(SuiteConfig.model_validate({"data": "tasks.jsonl", **settings}), folder)


@pytest.mark.parametrize(
    ("scorer", "totals", "grade", "answer"),
    [
        ("choice", (-3.0, -2.0, -4.0), 1.0, "b"),
        ("choice", (-1.0, -2.0, -4.0), 0.0, "a"),
        ("choice_norm", (-3.0, -2.0, -4.0), 0.0, "cccc"),
        ("choice_norm", (-3.0, -0.5, -4.0), 1.0, "b"),
    ],
)
def test_a_choice_is_the_likeliest_as_a_whole_or_for_each_byte(
    scorer: str, totals: tuple[float, ...], grade: float, answer: str
) -> None:
    found = [
        Likelihood(text, total, 1) for text, total in zip(QUESTION.choices, totals, strict=True)
    ]
    assert LIKELIHOOD_SCORERS[scorer].judge(QUESTION, found) == (grade, answer)


def test_a_reference_is_as_likely_as_its_tokens_are_in_the_geometric_mean() -> None:
    found = [Likelihood("b", math.log(0.5) + math.log(0.125), 2)]
    grade, _ = LIKELIHOOD_SCORERS["reference_likelihood"].judge(QUESTION, found)
    assert grade == pytest.approx(0.25)


def test_the_sum_is_that_of_the_tokens_after_the_prompt(engine: Engine) -> None:
    prompt, text = "Question 1:", " 1 plus 3"
    (whole,) = engine.log_probabilities([prompt + text], add_special_tokens=True)
    before = len(engine.encode([prompt], add_special_tokens=True)[0])
    ((found,),) = likelihoods(
        engine, [prompt], [["1 plus 3"]], delimiter=" ", add_special_tokens=True
    )
    assert found.total == pytest.approx(math.fsum(whole[before - 1 :]))
    assert found.tokens == len(whole) - before + 1


def test_a_suite_of_likelihoods_writes_nothing(engine: Engine, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"input": "1+1=", "label": 0, "options": ["2", "3", "4"]},
        {"input": "1+2=", "label": 1, "options": ["2", "3", "4"]},
    ]
    suite = suite_of(
        tmp_path,
        rows,
        scorer={"choice": 1, "reference_likelihood": 1},
        reference="label",
        choice_index=True,
        choices="options",
    )
    assert [task.reference for task in suite.tasks] == ["2", "3"]
    results = Evaluation(engine, suite).begin(["1", "2"]).result()
    for result in results:
        choice, likely = (each.grade for each in result.details)
        assert choice is not None
        assert likely is not None
        assert 0 < likely < 1
        assert result.grade == pytest.approx((choice + likely) / 2)
        assert result.finish_reason == "none"
        assert result.gates == ()
        assert result.version == engine.version


def test_an_answer_and_a_likelihood_make_one_grade(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"input": "say x", "output": "x"}]
    suite = suite_of(tmp_path, rows, scorer={"exact": 3, "reference_likelihood": 1})

    class SureEngine(EchoEngine):
        def log_probabilities(self, prompts, *, add_special_tokens):  # type: ignore[no-untyped-def]
            return [[math.log(0.5)] * 8 for _ in prompts]

    (result,) = Evaluation(SureEngine(), suite).begin(["1"]).result()
    assert result.answer == "x"
    assert result.grade == pytest.approx((3 * 1.0 + 0.5) / 4)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"output": "a"}, {}, "a choice needs two answers"),
        ({"output": "x", "c": ["a", "b"]}, {"choices": "c"}, "'x' is none of the choices$"),
        ({"output": 1, "c": ["a", "b"]}, {"choices": "c"}, "place, from 0: choice_index: true"),
        ({"output": "a", "c": ["a", "a"]}, {"choices": "c"}, "two of the choices are the same"),
        (
            {"output": 2, "c": ["a", "b"]},
            {"choices": "c", "choice_index": True},
            "'2' is no place from 0 to 1",
        ),
    ],
)
def test_choices_that_cannot_be_graded_are_refused(
    tmp_path: Path, row: dict[str, object], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(tmp_path, [{"input": "q", **row}], scorer="choice", **settings)


def test_references_count_where_their_likelihood_is_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"input": "a b c", "output": "d e f g h i"}]
    suite = suite_of(tmp_path, rows, scorer="reference_likelihood", delimiter=" ")
    # 3 + 6 words, the first special token, and one that the engine writes.
    with pytest.raises(ConfigError, match=r"8 tokens.*: 1 \(3 too many\)"):
        check_prompt_lengths(EchoEngine(), suite, suite.tasks)
