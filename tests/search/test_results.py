from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.errors import CandidateError, ConfigError
from evomerge.recipe import Recipe
from evomerge.report.results import write_results
from evomerge.search.loop import run_search
from evomerge.search.storage import is_held
from evomerge.search.study import StudyConfig, study_directory
from tests.search.formula import opener

Study = Callable[..., StudyConfig]
UNITS_BEFORE_THE_WINNERS_HOLDOUT = 4 + 6 + 4  # baselines, trials, baselines on held-out tasks


def test_a_winner_that_fails_on_held_out_tasks_has_a_dash_for_a_score(
    study: Study, tmp_path: Path
) -> None:
    calls = iter(range(100))

    def fails(recipe: Recipe) -> Exception | None:
        late = next(calls) >= UNITS_BEFORE_THE_WINNERS_HOLDOUT
        return CandidateError("its logits are NaN") if late else None

    run_search(study(), storage=tmp_path, open_evaluator=opener(fails=fails), trials=6)
    results = write_results(tmp_path, "formula", lambda line: None)
    assert (results.rows[-1].model, results.rows[-1].holdout) == ("evolved merge", None)
    assert "on the tasks it was searched on, – on held-out tasks." in (
        results.model / "README.md"
    ).read_text(encoding="utf-8")


def test_the_study_is_held_while_its_results_are_written(study: Study, tmp_path: Path) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    directory = study_directory(tmp_path, "formula")
    seen: list[bool] = []
    write_results(tmp_path, "formula", lambda line: seen.append(is_held(directory)))
    assert seen == [True]
    assert not is_held(directory)


def test_results_of_a_study_that_is_not_there_are_refused_and_leave_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="there is no study formula"):
        write_results(tmp_path / "storage", "formula", lambda line: None)
    assert not (tmp_path / "storage").exists()
