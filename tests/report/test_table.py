"""The table of a finished study, on a terminal and in Markdown."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from evomerge.report.progress import SearchDisplay
from evomerge.report.results import time_split
from evomerge.report.table import Row, outcome_markdown, outcome_rows, outcome_table
from evomerge.search.story import Measured, Said, Started

STATUS: dict[str, Any] = {
    "outcome": {
        "search": {"base": 0.1, "uniform": 0.3, "evolved": 0.6, "models": {"a": 0.2, "b": None}},
        "holdout": {"base": 0.0, "uniform": 0.25, "evolved": 0.5, "models": {"a": 0.1, "b": 0.4}},
    }
}


def test_the_rows_are_base_models_uniform_evolved() -> None:
    assert outcome_rows(STATUS) == [
        Row("base", 0.1, 0.0),
        Row("a", 0.2, 0.1),
        Row("b", None, 0.4),
        Row("uniform merge", 0.3, 0.25),
        Row("evolved merge", 0.6, 0.5),
    ]


def test_markdown_shows_missing_scores_as_dashes() -> None:
    assert outcome_markdown(outcome_rows(STATUS), (8, 4)).splitlines() == [
        "| model | search (8 tasks) | held out (4 tasks) |",
        "|---|---:|---:|",
        "| base | 0.100 | 0.000 |",
        "| a | 0.200 | 0.100 |",
        "| b | – | 0.400 |",
        "| uniform merge | 0.300 | 0.250 |",
        "| evolved merge | 0.600 | 0.500 |",
    ]


def test_without_held_out_tasks_there_is_one_column() -> None:
    rows = outcome_rows({"outcome": {**STATUS["outcome"], "holdout": None}})
    assert outcome_markdown(rows, (8, 0)).splitlines()[0] == "| model | search (8 tasks) |"
    assert [str(column.header) for column in outcome_table(rows, (8, 0)).columns] == [
        "model",
        "search (8 tasks)",
    ]


def test_the_split_of_time_covers_all_of_it() -> None:
    seconds = {"engine": 2.0, "switch": 1.0, "generate": 5.0, "score": 0.5, "other": 1.5}
    split = time_split(seconds)
    assert [spent for _, spent, _ in split] == [2.0, 1.0, 5.0, 0.5, 1.5]
    assert sum(share for _, _, share in split) == pytest.approx(1.0)


def started() -> Started:
    return Started(
        study="s",
        done=0,
        total=8,
        population=4,
        genes=2,
        search_tasks=3,
        holdout_tasks=1,
        tasks_per_candidate=3,
    )


def measured() -> Measured:
    return Measured(
        candidate="trial 0",
        title="trial 0",
        part="search",
        number=0,
        generation=0,
        score=0.75,
        reason=None,
        tasks=3,
        unscored=0,
        cut=0,
        limits=(8,),
        seconds={"switch": 0.01, "generate": 1.0},
        best_score=0.75,
        best_number=0,
        done=1,
        total=8,
    )


def display(*, terminal: bool) -> str:
    """What the display writes, without colours and cursor movements."""
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        color_system=None,
        width=120,
        _environ={"TERM": "xterm"},
    )
    with SearchDisplay(console) as show:
        for story in (started(), Said("[not markup]"), measured()):
            show(story)
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "\n")


def test_a_log_file_gets_the_lines_and_no_bar() -> None:
    lines = display(terminal=False).splitlines()
    assert lines == [started().line, "[not markup]", measured().line]


def test_a_terminal_gets_a_bar_with_done_eta_and_best_score() -> None:
    bar = [line for line in display(terminal=True).splitlines() if line.startswith("trials ")][-1]
    assert [part for part in ("1/8", "ETA", "best 0.750 (trial 0)") if part not in bar] == []
