from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.collections import PathCollection
from optuna.importance import get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, load_study
from optuna.trial import TrialState
from optuna.visualization.matplotlib import plot_optimization_history

from evomerge.search.loop import run_search
from evomerge.search.mirror import Mirror, MirroredSpace, MirroredTrial
from evomerge.search.story import Measured, Said, Story
from evomerge.search.study import StudyConfig
from tests.search.formula import broken_above, formula_grade, opener


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "storage" / "studies" / "formula" / "optuna.journal"


@pytest.fixture
def search(study: Callable[..., StudyConfig], tmp_path: Path) -> Callable[..., list[Story]]:
    """Runs the study to `trials`; what it told."""

    def run(trials: int, limit: float = 9.0, **changes: Any) -> list[Story]:
        stories: list[Story] = []
        run_search(
            study(**changes),
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


def test_what_a_mirror_says_does_not_depend_on_when_it_is_written(
    search: Callable[..., list[Story]], journal: Path
) -> None:
    """Scores on parts of the tasks are adjusted by what was known when they were told."""
    parts = {"tasks": 30, "tasks_per_candidate": 9, "sweep": True, "selection": {"attempts": 1}}
    search(18, **parts)
    at_once = content(journal)
    journal.unlink()
    search(24, **parts)
    assert content(journal)[:18] == at_once
    assert len({len(attributes["grades"]) for _, _, attributes, _ in at_once}) == 1


def test_a_mirror_that_cannot_be_written_does_not_stop_the_search(
    search: Callable[..., list[Story]], journal: Path
) -> None:
    journal.mkdir(parents=True)
    said = [story.line for story in search(12) if isinstance(story, Said)]
    assert len(said) == 1
    assert said[0].startswith(f"{journal}: the mirror for Optuna is given up: ")


def mirrored(number: int, *, score: float | None, stopped: bool = False) -> MirroredTrial:
    genome = [number / 40, 0.5]
    reason = "behind" if stopped else None if score is not None else "its logits are NaN"
    return MirroredTrial(number, f"trial {number}", 0, genome, genome, score, reason, stopped)


def test_failed_and_stopped_candidates_are_in_states_of_their_own(journal: Path) -> None:
    journal.parent.mkdir(parents=True)
    space = MirroredSpace(["a", "b"], [-0.5, -0.5], [2.0, 2.0])
    trials = [mirrored(n, score=1 - (n / 40 - 0.3) ** 2) for n in range(40)]
    trials += [mirrored(40, score=None), mirrored(41, score=0.2, stopped=True)]
    said: list[str] = []
    grades = {trial.label: {"0": 0.5, "1": None} for trial in trials}
    with Mirror(journal, "formula", space, lambda labels: grades, said.append).running() as mirror:
        mirror.catch_up(20, lambda: trials[:20])
        mirror.add(trials[20:])
    study = read(journal)
    assert said == []
    states = [TrialState.COMPLETE] * 40 + [TrialState.FAIL, TrialState.PRUNED]
    assert [trial.state for trial in study.trials] == states
    assert [trial.user_attrs.get("reason") for trial in study.trials[39:]] == [
        None,
        "its logits are NaN",
        "behind",
    ]
    assert {json.dumps(trial.user_attrs["grades"]) for trial in study.trials} == {
        '{"0": 0.5, "1": null}'
    }
    assert study.best_trial.user_attrs["number"] == 12


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_importances_and_plots_of_a_running_search_come_from_the_journal(
    study: Callable[..., StudyConfig], journal: Path, tmp_path: Path
) -> None:
    seen: list[int] = []

    def look(story: Story) -> None:
        if isinstance(story, Measured) and story.number == 23:
            # The search stands still; the mirror's thread catches up with what was told.
            until = time.monotonic() + 30
            while len(read(journal).trials) < 18 and time.monotonic() < until:
                time.sleep(0.05)
            seen.append(len(read(journal).trials))

    run_search(study(), storage=tmp_path / "storage", open_evaluator=opener(), report=look)
    assert seen == [18]
    shares = get_param_importances(read(journal))
    assert set(shares) == set(read(journal).trials[0].params)
    assert sum(shares.values()) == pytest.approx(1.0)
    scores = [trial.value for trial in read(journal).trials]
    drawn = plot_optimization_history(read(journal)).get_children()
    heights = [one.get_offsets()[:, 1].tolist() for one in drawn if isinstance(one, PathCollection)]
    assert scores in heights
    pyplot.close("all")
