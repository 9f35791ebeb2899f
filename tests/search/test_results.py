from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import CandidateError, ConfigError
from evomerge.evaluate.task import TaskResult
from evomerge.recipe import Recipe
from evomerge.report.results import write_results
from evomerge.search.evaluator import TimeSplit
from evomerge.search.loop import run_search
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.status import study_status
from evomerge.search.storage import is_held
from evomerge.search.study import StudyConfig, study_directory
from tests.search.formula import FormulaEvaluator, formula_grade, opener

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


def test_answers_that_are_wrong_on_their_face_are_counted_in_status_and_report(
    study: Study, tmp_path: Path
) -> None:
    class Looping(FormulaEvaluator):
        def begin(
            self, recipe: Recipe, task_ids: Sequence[str], attempt: int
        ) -> Future[list[TaskResult]]:
            first, *others = super().begin(recipe, task_ids, attempt).result()
            gates = ("repetition", "length") if attempt == 0 else ()
            done: Future[list[TaskResult]] = Future()
            done.set_result([replace(first, gates=gates), *others])
            return done

    @contextmanager
    def open_evaluator(study: ResolvedStudy, split: TimeSplit) -> Iterator[Looping]:
        yield Looping(0.0, split, formula_grade, lambda recipe: None)

    run_search(study(), storage=tmp_path, open_evaluator=open_evaluator, trials=6)
    gates = study_status(tmp_path, "formula")["gates"]
    number = gates["closed"]["length"]
    assert gates["closed"] == {"length": number, "repetition": number}
    assert 0 < number < gates["answers"]
    assert set(gates["best"]["closed"]) == {"length", "repetition"}
    report = write_results(tmp_path, "formula", lambda line: None).report.read_text()
    assert f"| repetition | {number} of {gates['answers']} | " in report


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
