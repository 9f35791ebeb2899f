"""A second suite that is held out: read strictly, never searched on, told apart everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.evaluate.suite import load_suite
from evomerge.recipe import Recipe
from evomerge.report.comparison import comparison_lines, comparison_table
from evomerge.report.results import write_results
from evomerge.search.answers import study_answers
from evomerge.search.compare import compare_studies
from evomerge.search.evaluator import Evaluators
from evomerge.search.held_out import HeldOutSuite
from evomerge.search.loop import run_search
from evomerge.search.resolve import resolve_study, what_changed
from evomerge.search.status import stored_study, study_status, trial_recipe
from evomerge.search.study import StudyConfig, read_study
from tests.evaluate import judge_server as faults
from tests.evaluate.judge_server import ScriptedJudge, scripted
from tests.search.formula import formula_grade, opener

SECOND = {"scorer": "numeric", "data": "second.jsonl", "category": "kind", "max_tokens": 3}

Study = Callable[..., StudyConfig]


@pytest.fixture
def second(tmp_path: Path) -> Callable[..., Path]:
    """Writes the second suite's tasks, which are numbered as those of the first one are."""

    def write(*inputs: str) -> Path:
        rows = [
            {"id": str(number), "input": text, "output": "7", "kind": ("a", "b")[number % 2]}
            for number, text in enumerate(inputs or ("two", "three", "four"))
        ]
        path = tmp_path / "second.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return path

    return write


def grade(recipe: Recipe, task_id: str) -> float:
    """The held-out tasks have grades of another scale, and another optimum."""
    number = task_id.removeprefix("holdout/")
    return formula_grade(recipe, number) if number == task_id else -5.0 * float(number)


def test_the_search_never_sees_the_second_suite(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    second()
    asked: list[tuple[str, int]] = []

    def noted(recipe: Recipe, task_id: str) -> float:
        asked.append((task_id, len(asked)))
        return grade(recipe, task_id)

    config = study(holdout=SECOND, selection={"attempts": 2}, budget={"trials": 12})
    outcome = run_search(config, storage=tmp_path / "s", open_evaluator=opener(grade=noted))
    held_out = [place for task, place in asked if task.startswith("holdout/")]
    searched = [place for task, place in asked if not task.startswith("holdout/")]
    # Base, two models, a uniform merge and the winner, once all the rest of the search is over.
    assert len(held_out) == 5 * 3
    assert min(held_out) > max(searched)
    assert {task for task, _ in asked} == {str(n) for n in range(10)} | {
        f"holdout/{n}" for n in range(3)
    }
    ended = outcome.status["outcome"]
    assert ended["holdout"]["evolved"] == ended["holdout"]["base"] == -5.0
    assert (ended["part"], {one["tasks"] for one in ended["differences"]}) == ("holdout", {3})
    assert 0 < ended["search"]["evolved"] <= 1


def test_tables_name_the_second_suite(
    study_file: Callable[..., Path], second: Callable[..., Path], tmp_path: Path
) -> None:
    second()
    (tmp_path / "other-tasks.yaml").write_text(yaml.safe_dump(SECOND))
    file = study_file(holdout="other-tasks.yaml", budget={"trials": 6})
    storage = tmp_path / "s"
    run_search(read_study(str(file)), storage=storage, open_evaluator=opener(grade=grade))
    report = write_results(storage, "formula", lambda line: None).report.read_text()
    assert "| search (10 tasks) | held out: other-tasks (3 tasks) |" in report
    # What was asked is kept as it was written, and stands for the same study.
    assert stored_study(storage, "formula").holdout == "other-tasks.yaml"


def test_a_changed_second_suite_is_another_study(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    second()
    before = resolve_study(study(holdout=SECOND), tmp_path)
    assert [task.id for task in before.holdout_tasks] == ["holdout/0", "holdout/1", "holdout/2"]
    assert len(before.search_tasks) == 10
    assert before.suite_of("holdout").digest != before.suite_of("table").digest
    assert before.suite_of("table") is before.suite_of("search") is before.suite
    second("two", "three", "five")
    (change,) = what_changed(
        before.fingerprint, resolve_study(study(holdout=SECOND), tmp_path).fingerprint
    )
    assert change.startswith("holdout (tasks, prompt, scorer, settings): was ")
    shared = resolve_study(study(holdout=0.3), tmp_path)
    changes = "\n".join(what_changed(before.fingerprint, shared.fingerprint))
    assert "holdout: was absent, is 0.3" in changes


@pytest.mark.parametrize(
    ("holdout", "complaint"),
    [
        (1.5, "holdout: Input should be less than 1 (given: 1.5)"),
        ("1.5", "holdout: Input should be less than 1 (given: 1.5)"),
        ({"scorer": "exact", "dat": "x"}, "holdout.dat: unknown key; did you mean 'data'?"),
        ([0.3], "holdout: Input should be a valid number (given: [0.3])"),
    ],
    ids=str,
)
def test_a_holdout_that_is_none_is_refused(study: Study, holdout: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study(holdout=holdout)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("holdout", "complaint"),
    [
        ("no-such-suite", "holdout: no-such-suite"),
        ({"scorer": "exact", "data": "absent.jsonl"}, "holdout: "),
        ({"scorer": "judge", "data": "second.jsonl"}, "judge: is missing"),
        (
            "jsonl-exact",
            "holdout: jsonl-exact: it has no tasks of its own; name it by "
            "`holdout: {like: jsonl-exact, data: FILE}`",
        ),
        (
            "japanese-mt-bench",
            ", then name it by `holdout: {like: japanese-mt-bench, data: question_full.jsonl}`",
        ),
        # The very tasks of the search, put and graded otherwise.
        (
            {"scorer": "chrf", "data": "tasks.jsonl", "prompt": "So: {{ input }}"},
            "holdout: suite: 10 of its 10 tasks ('0' for one) are among those that are searched on",
        ),
    ],
    ids=str,
)
def test_a_second_suite_that_cannot_be_held_out_is_refused(
    study: Study, second: Callable[..., Path], tmp_path: Path, holdout: Any, complaint: str
) -> None:
    second()
    with pytest.raises(ConfigError) as caught:
        resolve_study(study(holdout=holdout), tmp_path)
    assert str(tmp_path / "study.yaml") in str(caught.value)
    assert complaint in str(caught.value)


def test_a_searched_task_without_its_right_answer_is_the_same_task(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    second()
    searched = load_suite(study(suite=SECOND).suite, tmp_path)
    judged = {"scorer": "judge", "data": "second.jsonl", "reference": None}
    judged_alone = load_suite(study(suite=judged).suite, tmp_path)
    for one, other in ((searched, judged_alone), (judged_alone, searched)):
        with pytest.raises(ConfigError, match="3 of its 3 tasks"):
            HeldOutSuite(one).check_apart_from(other)


def test_ids_that_look_like_those_of_a_second_suite_are_refused(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    path = second()
    suite = load_suite(study(suite=SECOND).suite, tmp_path)
    path.write_text(json.dumps({"id": "holdout/1", "input": "x", "output": "1", "kind": "a"}))
    odd = load_suite(study(suite=SECOND).suite, tmp_path)
    with pytest.raises(ConfigError, match=r"suite: the id 'holdout/1' begins as those of a second"):
        HeldOutSuite(suite).check_apart_from(odd)


def test_comparisons_mix_no_grades_of_two_suites(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    second()
    storage = tmp_path / "s"
    for name, seed in (("one", 3), ("two", 5)):
        config = study(
            study=name,
            holdout=SECOND,
            sampler={"population": 6, "seed": seed},
            budget={"trials": 6},
        )
        run_search(config, storage=storage, open_evaluator=opener(grade=grade))
    found = compare_studies(storage, "one", "two")
    assert (found["holdout"]["tasks"], found["searched"]["tasks"], found["all"]) == (3, 10, None)
    expected = [formula_grade(trial_recipe(storage, "two"), str(n)) for n in range(10)]
    assert found["searched"]["second"] == pytest.approx(math.fsum(expected) / 10)
    assert found["holdout"]["second"] == -5.0
    categories = set(found["categories"])
    assert {"a (held out)", "b (held out)"} < categories
    assert comparison_table(found).row_count == 2 + len(categories)
    assert any("3 tasks that both held out" in line for line in comparison_lines(found))


def test_each_suite_is_asked_and_graded_in_its_own_way(
    study: Study, second: Callable[..., Path], tmp_path: Path
) -> None:
    """By one judge over real HTTP, with a rubric for each suite."""
    second()
    rubric = {"prompt": "Rate {{ answer }} for {{ input }} from 1 to 10.", "low": 1, "high": 10}
    judged = {"scorer": "judge", "max_tokens": 2}
    with scripted(ScriptedJudge(reply=reply_to)) as server:
        config = study(
            suite={**judged, "data": "tasks.jsonl"},
            holdout={**judged, "data": "second.jsonl", "rubric": rubric, "category": "kind"},
            judge={"model": faults.MODEL, "base_url": server.url},
            budget={"trials": 6},
        )
        with Evaluators() as evaluators:
            run_search(config, storage=tmp_path / "s", open_evaluator=evaluators.open)
    outcome = study_status(tmp_path / "s", "formula")["outcome"]
    assert outcome["holdout"]["evolved"] == outcome["holdout"]["base"] == 9.0
    assert outcome["search"]["evolved"] == 3.0
    rows = study_answers(tmp_path / "s", "formula", task="holdout/1")
    assert {(row.task, row.grade) for row in rows} == {("holdout/1", 9.0)}
    assert all("three" in row.prompt for row in rows)


def reply_to(prompt: str) -> str:
    """3 by the first suite's rubric, 9 by the second one's."""
    return json.dumps({"reason": "so", "grade": 9 if prompt.startswith("Rate ") else 3})
