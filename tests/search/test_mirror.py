from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, load_study
from optuna.trial import TrialState

from evomerge.search.loop import run_search
from evomerge.search.story import Said, Story
from evomerge.search.study import StudyConfig
from tests.search.formula import broken_above, formula_grade, opener


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "storage" / "studies" / "formula" / "optuna.journal"


@pytest.fixture
def search(study: Callable[..., StudyConfig], tmp_path: Path) -> Callable[..., list[Story]]:
    """Runs the study to `trials`; what it told."""

    def run(trials: int, limit: float = 9.0) -> list[Story]:
        stories: list[Story] = []
        run_search(
            study(),
            storage=tmp_path / "storage",
            open_evaluator=opener(fails=broken_above(limit)),
            trials=trials,
            report=stories.append,
        )
        return stories

    return run


def read(journal: Path) -> Study:
    backend = JournalStorage(JournalFileBackend(str(journal)))
    return load_study(study_name="formula", storage=backend)


def content(journal: Path) -> list[tuple[Any, ...]]:
    trials = read(journal).trials
    return [(trial.value, trial.params, trial.user_attrs, trial.state) for trial in trials]


def test_optuna_reads_every_told_candidate(
    search: Callable[..., list[Story]], journal: Path, tmp_path: Path
) -> None:
    search(24, limit=0.9)
    from evomerge.search.status import study_status, trial_recipe

    status = study_status(tmp_path / "storage", "formula")
    trials = read(journal).trials
    assert len(trials) == 24
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    for mirrored, trial in zip(trials, status["trials"], strict=True):
        assert mirrored.value == trial["score"]
        assert mirrored.user_attrs["number"] == trial["number"]
        assert mirrored.user_attrs["genome"] == trial["genome"]
        assert mirrored.user_attrs.get("reason") == trial["reason"]
        clipped = [min(max(gene, -0.5), 2.0) for gene in trial["genome"]]
        assert list(mirrored.params.values()) == clipped
        recipe = trial_recipe(tmp_path / "storage", "formula", trial["number"])
        for task, grade in mirrored.user_attrs["grades"].items():
            assert grade == formula_grade(recipe, task)
        assert len(mirrored.user_attrs["grades"]) == trial["tasks"]
    assert list(trials[0].params) == [
        "layers 0-2 | left",
        "layers 0-2 | right",
        "layers 2-4 | left",
        "layers 2-4 | right",
    ]
    best = read(journal).best_trial
    assert best.value == status["best"]["score"]


@pytest.mark.parametrize("harm", ["deleted", "torn", "behind", "foreign"])
def test_a_mirror_that_is_not_whole_is_written_anew(
    search: Callable[..., list[Story]], journal: Path, harm: str
) -> None:
    search(12)
    lines = journal.read_bytes().splitlines(keepends=True)
    if harm == "deleted":
        journal.unlink()
    elif harm == "torn":
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    elif harm == "behind":
        journal.write_bytes(b"".join(lines[:-3]))
    else:
        journal.write_bytes(b"not a journal\n")
    journal.with_name("optuna.journal.lock").touch()  # as a killed process leaves it
    search(18)
    assert len(content(journal)) == 18
    repaired = content(journal)
    journal.unlink()
    search(24)
    assert content(journal)[:18] == repaired


def test_a_mirror_that_cannot_be_written_does_not_stop_the_search(
    search: Callable[..., list[Story]], journal: Path
) -> None:
    journal.mkdir(parents=True)
    said = [story.line for story in search(12) if isinstance(story, Said)]
    assert len(said) == 1
    assert said[0].startswith(f"{journal}: the mirror for Optuna is given up: ")
