"""What tables look like on screens that are narrow, wide, or none."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from evomerge.report.importance import importance_table
from evomerge.report.screen import Screen
from evomerge.report.side_by_side import categories_table, evaluation_notes, evaluation_table
from evomerge.report.table import Row, outcome_table, short_names

MODELS = ["models/base", "models/[red]expert", f"owner/{'long-' * 12}name"]
SCORES = [0.613, 0.681, 0.969]


def found(*, unscored: int = 0) -> dict[str, Any]:
    """The document of `eval --json` of three models on 160 tasks."""
    return {
        "suite": "s",
        "scorer": "exact",
        "judge": None,
        "models": [
            {
                "model": model,
                "score": score,
                "interval": [score - 0.05, score + 0.03],
                "difference": None
                if model == MODELS[0]
                else {"to": MODELS[0], "mean": 0.125, "interval": [-0.25, 0.5]},
                "tasks": 160,
                "unscored": unscored,
                "categories": {"数学": score, "code": 0.5},
            }
            for model, score in zip(MODELS, SCORES, strict=True)
        ],
    }


def drawn(table: RenderableType | None, width: int) -> list[str]:
    """The lines of a table on a terminal of `width` columns."""
    assert table is not None
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("unscored", [0, 3])
def test_no_number_is_broken_and_no_name_cut_on_80_columns(unscored: int) -> None:
    document = found(unscored=unscored)
    scores = drawn(evaluation_table(document), 80)
    text = "\n".join(scores)
    assert all(f"{score:.3f} [{score - 0.05:.2f}, {score + 0.03:.2f}]" in text for score in SCORES)
    assert text.count("+0.125 [-0.25, +0.50]") == 2
    assert ("unscored" in text) == (unscored > 0)
    assert ("on 160 tasks" in text) == (unscored == 0)
    categories = drawn(categories_table(document), 80)
    assert "[red]" in text
    assert any("[red]expert" in line for line in categories)
    for line in (*scores, *categories):
        assert len(line) <= 80
        assert "…" not in line


def test_grades_that_another_run_paid_for_took_nothing() -> None:
    document = found()
    for row in document["models"]:
        took = {"grades": 160, "reused": 160, "prompt_tokens": 0, "completion_tokens": 0}
        row |= {"reason": None, "cut": 0, "gates": {}, "judging": {**took, "cost": None}}
    notes = evaluation_notes(document)
    assert f"{MODELS[0]}: its 160 grades were there already, and cost nothing." in notes


def test_what_was_cut_and_closed_for_is_told_of_how_many() -> None:
    document = found()
    for row in document["models"]:
        row |= {"reason": None, "cut": 1, "gates": {"empty": 1}, "judging": None}
    notes = evaluation_notes(document)
    assert f"{MODELS[0]}: 1 of 160 answers were cut at max_tokens." in notes
    assert f"{MODELS[0]}: the gate empty closed for 1 of 160 answers." in notes


def test_where_there_is_no_terminal_a_table_is_as_wide_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    name = f"{'deep/' * 40}[bold]model"
    screen = Screen()
    screen.show(outcome_table([Row(name, 0.5, 0.25)], (8, 4)), None)
    screen.tell(["word " * 40 + "[end]"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(name in line and "0.500" in line for line in lines) == 1
    assert lines[-1] == "word " * 40 + "[end]"


def test_a_short_name_is_as_much_of_its_end_as_tells_it_apart() -> None:
    assert short_names(["a/b/base", "a/b/tuned/"]) == ["base", "tuned"]
    assert short_names(["a/model", "b/model"]) == ["a/model", "b/model"]
    assert short_names(["x/a/model", "x/b/model", "c"]) == ["a/model", "b/model", "c"]
    assert short_names(["model"]) == ["model"]


def test_a_mean_has_as_many_places_as_its_spread() -> None:
    spread = [(0.0548, 0.1234), (0.276, 0.0987), (31.4, 12.0), (0.5, 0.0)]
    genes = [
        {
            "gene": f"g{number}",
            "importance": 0.25,
            "effect": 0.0,
            "best": {"mean": mean, "spread": deviation},
            "all": {"mean": mean, "spread": deviation},
        }
        for number, (mean, deviation) in enumerate(spread)
    ]
    text = "\n".join(drawn(importance_table({"genes": genes, "chance": 1.0}), 100))
    for words in ("0.05 ± 0.12", "0.276 ± 0.099", "31 ± 12", "0.500 ± 0.000"):
        assert text.count(f" {words} ") == 2
