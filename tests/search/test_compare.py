"""Two real searches by formula, compared: numbers against a second reckoning from the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sql

from evomerge.database import open_database
from evomerge.errors import ConfigError
from evomerge.optimizer.selection import paired_interval
from evomerge.recipe import Recipe
from evomerge.report.comparison import comparison_lines
from evomerge.schema import answers
from evomerge.search.compare import compare_studies
from evomerge.search.loop import run_search
from evomerge.search.status import trial_recipe
from evomerge.search.study import read_study
from tests.search.formula import formula_grade, opener
from tests.test_cli import run

SUITE = {"scorer": "exact", "data": "tasks.jsonl", "category": "kind"}


@pytest.fixture
def searched(study_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Runs a search by formula; its storage. `grade` grades recipes, `rows` changes tasks."""

    def search(name: str, grade: Any = formula_grade, rows: Any = None, **changes: Any) -> Path:
        path = study_file(f"{name}.yaml", study=name, **{"suite": SUITE, **changes})
        tasks = [
            {"id": str(n), "input": f"say {n}", "output": "!", "kind": ("even", "odd")[n % 2]}
            for n in range(20)
        ]
        lines = [json.dumps(row) for row in (rows(tasks) if rows else tasks)]
        (tmp_path / "tasks.jsonl").write_text("\n".join(lines) + "\n")
        storage = tmp_path / "storage"
        run_search(read_study(str(path)), storage=storage, open_evaluator=opener(grade=grade))
        return storage

    return search


def lower(recipe: Recipe, task_id: str) -> float | None:
    return formula_grade(recipe, task_id) - 0.25 - 0.01 * int(task_id)


def test_winners_are_compared_task_by_task(searched: Callable[..., Path]) -> None:
    searched("one", sampler={"population": 6, "seed": 5})
    storage = searched("two", grade=lower)
    found = compare_studies(storage, "one", "two")
    recipes = [trial_recipe(storage, name) for name in ("one", "two")]
    expected = {
        str(n): (formula_grade(recipes[0], str(n)), lower(recipes[1], str(n))) for n in range(20)
    }
    assert {one["task"]: (one["first"], one["second"]) for one in found["tasks"]} == expected
    differences = {task: second - first for task, (first, second) in expected.items()}
    sizes = [abs(one["difference"]) for one in found["tasks"]]
    assert sizes == sorted(map(abs, differences.values()), reverse=True)
    assert found["all"]["difference"] == pytest.approx(np.mean(list(differences.values())))
    assert (found["holdout"]["tasks"], found["searched"]["tasks"]) == (6, 14)
    odd = [difference for task, difference in differences.items() if int(task) % 2]
    assert found["categories"]["odd"]["difference"] == pytest.approx(np.mean(odd))
    assert found["categories"]["odd"]["tasks"] == 10
    grades = np.array([expected[task] for task in sorted(expected)]).T
    interval = paired_interval(grades[[1]], grades[[0]], seed=0)
    assert (found["all"]["difference"], *found["all"]["interval"]) == pytest.approx(interval)
    assert found["all"]["interval"][1] < 0
    assert (found["differs"], found["notes"], set(found["left_out"].values())) == ([], [], {0})
    lines = "\n".join(comparison_lines(found))
    assert "one is better than two on the 6 tasks that both held out" in lines


def test_tasks_that_are_not_the_same_are_left_out_and_what_differs_is_listed(
    searched: Callable[..., Path],
) -> None:
    def others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*rows[2:], {"id": "21", "input": "say 21", "output": "!", "kind": "odd"}]

    searched("one")
    storage = searched(
        "two",
        rows=others,
        grade=lambda recipe, task: None if task == "6" else formula_grade(recipe, task),
        suite={**SUITE, "max_tokens": 9},
        engine={"name": "transformers", "dtype": "float32"},
    )
    engine = open_database(storage)
    with engine.begin() as connection:
        last = connection.scalar(sql.select(sql.func.max(answers.c.study_id)))
        of_two = (answers.c.study_id == last) & (answers.c.task == "4")
        connection.execute(sql.update(answers).where(of_two).values(prompt="another"))
    engine.dispose()
    found = compare_studies(storage, "one", "two")
    left_out = {"only_first": 2, "only_second": 1, "other_prompt": 1, "unscored": 1}
    assert found["left_out"] == left_out
    assert {one["task"] for one in found["tasks"]} == {str(n) for n in range(2, 20)} - {"4", "6"}
    assert "suite.max_tokens: one has 256, two has 9" in found["differs"]
    assert 'engine.dtype: one has "bfloat16", two has "float32"' in found["differs"]
    assert {one["category"] for one in found["tasks"]} == {"even", "odd"}


def test_what_cannot_be_compared_is_refused(searched: Callable[..., Path]) -> None:
    storage = searched("one")
    with pytest.raises(ConfigError, match="there is no study two"):
        compare_studies(storage, "one", "two")
    with pytest.raises(ConfigError, match="one: a study is compared with another one"):
        compare_studies(storage, "one", "one")
    searched("two", suite={**SUITE, "scorer": "numeric"}, rows=numbers)
    with pytest.raises(ConfigError, match="one by exact; two by numeric"):
        compare_studies(storage, "one", "two")
    searched("three", rows=lambda rows: [{**row, "id": f"{row['id']}000"} for row in rows])
    with pytest.raises(ConfigError, match="share no graded task with the same prompt\n  suite"):
        compare_studies(storage, "one", "three")


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "output": row["id"]} for row in rows]


def test_the_command_prints_a_table_or_one_document(searched: Callable[..., Path]) -> None:
    searched("one")
    storage = searched("two", grade=lower, sampler={"population": 6, "seed": 4})
    ran = run("compare", "one", "two", "--storage", storage)
    assert (ran.status, ran.err) == (0, "")
    assert "held out in both" in ran.out
    assert "one is better than two" in ran.out
    assert "one: the winner is " in ran.out
    document = json.loads(run("compare", "one", "two", "--storage", storage, "--json").out)
    assert document == compare_studies(storage, "one", "two")
    assert run("compare", "one", "none", "--storage", storage).status == 2
