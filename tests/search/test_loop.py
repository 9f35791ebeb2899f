from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import CandidateError, ConfigError, EngineDiedError, RunError
from evomerge.recipe import Recipe, read_recipe
from evomerge.search.evaluator import TimeSplit
from evomerge.search.log import begun_with
from evomerge.search.loop import Outcome, run_search
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.status import (
    list_studies,
    stored_study,
    study_status,
    trial_recipe,
)
from evomerge.search.storage import open_log
from evomerge.search.story import Measured, Said, Story
from evomerge.search.study import StudyConfig
from tests.search.formula import (
    DiesAt,
    FormulaEvaluator,
    broken_above,
    formula_grade,
    opener,
    weights_of,
)

Study = Callable[..., StudyConfig]


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def told_to_sampler(storage: Path) -> dict[int, float]:
    """number -> value, of all blocks told."""
    log = open_log(storage, "formula")
    assert log is not None
    log.close()
    return {number: value for block in log.history.told.values() for number, value in block}


def scores(outcome: Outcome) -> list[float | None]:
    return [trial["score"] for trial in outcome.status["trials"]]


def calls_counted(calls: list[str]) -> Callable[[Recipe], Exception | None]:
    """A `fails` that never fails and notes every evaluation."""

    def note(recipe: Recipe) -> None:
        calls.append(recipe.to_yaml())

    return note


def test_the_status_has_the_shape_of_the_design(study: Study, storage: Path) -> None:
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    status = study_status(storage, "formula")
    assert status == outcome.status
    assert (status["study"], status["state"]) == ("formula", "finished")
    assert [trial["number"] for trial in status["trials"]] == list(range(24))
    best = status["trials"][status["best"]["number"]]
    assert best["score"] == max(trial["score"] for trial in status["trials"])
    assert status["best"] == {
        "source": "trial",
        "number": best["number"],
        "score": best["score"],
        "config": str(storage / "studies" / "formula" / "best_config.yaml"),
    }
    assert (best["state"], best["tasks"], best["adjusted"], best["reason"]) == (
        "complete",
        7,
        best["score"],
        None,
    )
    assert status["outcome"]["search"]["evolved"] == best["score"]
    left, right = study().models
    assert set(status["outcome"]["holdout"]["models"]) == {left, right}
    assert list_studies(storage) == [
        {
            "study": "formula",
            "state": "finished",
            "trials": 24,
            "budget": 24,
            "best": best["score"],
            "reason": None,
        }
    ]


def test_scores_are_the_mean_grades_of_the_decoded_recipes(study: Study, storage: Path) -> None:
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    log = open_log(storage, "formula")
    assert log is not None
    begun = begun_with(log)
    search, holdout = begun["search_tasks"], begun["holdout_tasks"]
    log.close()
    for trial in outcome.status["trials"]:
        recipe = trial_recipe(storage, "formula", trial["number"])
        assert weights_of(recipe) == [min(max(gene, -0.5), 2.0) for gene in trial["genome"]]
        grades = [formula_grade(recipe, task) for task in search]
        assert trial["score"] == math.fsum(grades) / len(grades)
    winner = read_recipe(storage / "studies" / "formula" / "best_config.yaml")
    assert winner == outcome.recipe == trial_recipe(storage, "formula")
    held_out = [formula_grade(winner, task) for task in holdout]
    assert outcome.status["outcome"]["holdout"]["evolved"] == math.fsum(held_out) / len(held_out)


def test_bounds_hold_for_the_start_of_the_search_but_not_for_the_uniform_merge(
    study: Study, storage: Path
) -> None:
    uniform: list[list[float]] = []

    def note(recipe: Recipe) -> None:
        if recipe.models is None:
            uniform.append(weights_of(recipe))

    asked = study(
        search_space={"layer_granularity": 2, "weight": [0.8, 1.2]},
        sampler={"population": 6, "sigma0": 1e-6},
    )
    outcome = run_search(asked, storage=storage, open_evaluator=opener(fails=note), trials=6)
    assert uniform[0] == [0.5] * 4
    genes = [gene for trial in outcome.status["trials"] for gene in trial["genome"]]
    assert genes == pytest.approx([0.8] * 24, abs=1e-5)


def test_a_finished_study_is_not_evaluated_again(study: Study, storage: Path) -> None:
    first = run_search(study(), storage=storage, open_evaluator=opener())

    def open_nothing(*_: object) -> Any:
        raise AssertionError("a finished study needs no engine")

    again = run_search(study(), storage=storage, open_evaluator=open_nothing)
    assert again.status == first.status


def test_a_raised_budget_goes_on_as_if_it_had_been_asked_for_at_once(
    study: Study, storage: Path, tmp_path: Path
) -> None:
    run_search(study(), storage=storage, open_evaluator=opener(), trials=12)
    calls: list[str] = []
    raised = run_search(
        study(), storage=storage, open_evaluator=opener(fails=calls_counted(calls)), trials=24
    )
    at_once = run_search(study(), storage=tmp_path / "other", open_evaluator=opener())
    assert scores(raised) == scores(at_once)
    assert raised.recipe == at_once.recipe
    assert 12 <= len(calls) <= 13  # and the new winner on the held-out tasks, if it is another
    # The total stays: the file still says what it said when --trials changed it.
    assert len(run_search(study(), storage=storage, open_evaluator=opener()).status["trials"]) == 24
    more = run_search(study(budget={"trials": 30}), storage=storage, open_evaluator=opener())
    assert len(more.status["trials"]) == 30
    assert stored_study(storage, "formula").budget.trials == 30


def test_a_generation_that_does_not_fit_is_not_begun(study: Study, storage: Path) -> None:
    outcome = run_search(study(), storage=storage, open_evaluator=opener(), trials=17)
    assert len(outcome.status["trials"]) == 12
    assert outcome.status["state"] == "finished"


def test_a_budget_below_one_generation_is_refused_before_anything(
    study: Study, storage: Path
) -> None:
    with pytest.raises(ConfigError, match=r"budget\.trials: 5 is less than one generation of 6"):
        run_search(study(), storage=storage, open_evaluator=opener(), trials=5)
    assert not storage.exists()


def test_an_engine_that_refuses_leaves_nothing_behind(study: Study, storage: Path) -> None:
    def refuse(*_: object) -> Any:
        raise ConfigError("prompts are too long")

    with pytest.raises(ConfigError, match="prompts are too long"):
        run_search(study(), storage=storage, open_evaluator=refuse)
    assert not storage.exists()


def test_the_seed_of_the_command_line_makes_another_search_that_resumes_without_it(
    study: Study, storage: Path, tmp_path: Path
) -> None:
    from_file = run_search(study(), storage=tmp_path / "file", open_evaluator=opener(), trials=6)
    other = run_search(study(), storage=storage, open_evaluator=opener(), trials=6, seed=4)
    assert scores(other) != scores(from_file)
    longer = run_search(study(), storage=storage, open_evaluator=opener(), trials=12)
    assert scores(longer)[:6] == scores(other)
    with pytest.raises(ConfigError, match=r"sampler\.seed: was 4, is 5"):
        run_search(study(), storage=storage, open_evaluator=opener(), seed=5)
    by_name = stored_study(storage, "formula")
    assert run_search(by_name, storage=storage, open_evaluator=opener()).status == longer.status


def test_a_study_that_changed_is_refused_with_what_changed(study: Study, storage: Path) -> None:
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6)
    with pytest.raises(ConfigError) as caught:
        run_search(study(holdout=0.5), storage=storage, open_evaluator=opener())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("study.yaml: study formula began with other settings:")
    assert lines[1:] == [
        "  holdout: was 0.3, is 0.5",
        "put them back, or give this study another name",
    ]


def test_a_failed_candidate_is_told_as_the_worst_of_its_generation(
    study: Study, storage: Path
) -> None:
    broken = opener(fails=broken_above(0.6))
    outcome = run_search(study(smoothing=False), storage=storage, open_evaluator=broken)
    trials = outcome.status["trials"]
    failed = [trial["number"] for trial in trials if trial["state"] == "failed"]
    assert 2 < len(failed) < 20
    told = told_to_sampler(storage)
    for trial in trials:
        generation = [other for other in trials if other["number"] // 6 == trial["number"] // 6]
        worst = min(other["score"] for other in generation if other["score"] is not None)
        assert told[trial["number"]] == (worst if trial["score"] is None else trial["score"])
        assert (trial["reason"] is None) == (trial["score"] is not None)
    assert trials[failed[0]]["reason"].endswith(" overflows")
    assert (trials[failed[0]]["tasks"], trials[failed[0]]["score"]) == (0, None)


def kills_from(call: int) -> Callable[[Recipe], Exception | None]:
    """Every evaluation from the given one (from 0) on kills the engine."""
    calls = iter(range(100))
    return lambda recipe: EngineDiedError("no heartbeat") if next(calls) >= call else None


def test_three_candidates_in_a_row_that_kill_the_engine_stop_the_run_and_are_tried_again(
    study: Study, storage: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="3 candidates in a row failed alike: the engine died twice"):
        run_search(study(), storage=storage, open_evaluator=opener(fails=kills_from(6)))
    status = study_status(storage, "formula")
    assert status["state"] == "interrupted"
    assert [trial["number"] for trial in status["trials"]] == [0, 1]
    assert status["stopped"] == (
        "3 candidates in a row failed alike: the engine died twice of it: no heartbeat"
    )
    assert told_to_sampler(storage) == {}
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    sound = run_search(study(), storage=tmp_path / "sound", open_evaluator=opener())
    assert scores(outcome) == scores(sound)


def test_an_error_that_nobody_foresaw_is_in_the_log_of_the_run_that_it_ends(
    study: Study, storage: Path
) -> None:
    calls: list[Recipe] = []

    def fails(recipe: Recipe) -> Exception | None:
        calls.append(recipe)
        return ZeroDivisionError("of a bug") if len(calls) == 9 else None

    with pytest.raises(ZeroDivisionError):
        run_search(study(), storage=storage, open_evaluator=opener(fails=fails))
    status = study_status(storage, "formula")
    assert (status["state"], status["stopped"]) == ("interrupted", "ZeroDivisionError: of a bug")
    unbroken = run_search(study(), storage=storage / "other", open_evaluator=opener())
    assert scores(run_search(study(), storage=storage, open_evaluator=opener())) == scores(unbroken)


def test_failures_that_the_sampler_was_told_of_stay_when_the_run_stops(
    study: Study, storage: Path
) -> None:
    with pytest.raises(RunError, match="3 candidates in a row failed alike"):
        run_search(study(), storage=storage, open_evaluator=opener(fails=kills_from(9)))
    assert list(told_to_sampler(storage)) == [0, 1, 2, 3, 4, 5]
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    states = [trial["state"] for trial in outcome.status["trials"]]
    assert states == ["complete"] * 5 + ["failed"] + ["complete"] * 18


def test_failures_of_the_candidates_own_never_stop_the_run_however_alike(
    study: Study, storage: Path
) -> None:
    calls = iter(range(100))

    def fails(recipe: Recipe) -> Exception | None:
        return CandidateError("the weights sum to 0") if 4 <= next(calls) < 9 else None

    outcome = run_search(study(), storage=storage, open_evaluator=opener(fails=fails))
    trials = outcome.status["trials"]
    assert [trial["state"] for trial in trials] == ["failed"] * 5 + ["complete"] * 19
    told = told_to_sampler(storage)
    assert [told[number] for number in range(6)] == [trials[5]["score"]] * 6


class RefusesToOpen:
    """Opens engines that all die at the third call, and none after the first `starts`.

    Where an engine is opened again, `alive` says whether the dead one was still referred to.
    """

    def __init__(self, starts: int) -> None:
        self.starts = starts
        self.opened: list[weakref.ref[FormulaEvaluator]] = []
        self.alive: list[bool] = []

    @contextmanager
    def __call__(self, study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
        self.alive += [engine() is not None for engine in self.opened]
        if len(self.opened) == self.starts:
            raise ConfigError("no memory is free on the GPU")
        engine = FormulaEvaluator(split=split, fails=DiesAt(3))
        self.opened.append(weakref.ref(engine))
        yield engine


def test_nothing_holds_a_dead_engine_when_the_next_one_starts(study: Study, storage: Path) -> None:
    engines = RefusesToOpen(starts=100)
    run_search(study(), storage=storage, open_evaluator=engines, trials=6)
    assert len(engines.alive) > 1
    assert not any(engines.alive)


def test_an_engine_that_does_not_start_again_stops_the_run_which_goes_on_later(
    study: Study, storage: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="did not start again: no memory is free on the GPU"):
        run_search(study(), storage=storage, open_evaluator=RefusesToOpen(starts=1))
    assert study_status(storage, "formula")["stopped"] == (
        "the engine died (no heartbeat) and did not start again: no memory is free on the GPU"
    )
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    sound = run_search(study(), storage=tmp_path / "sound", open_evaluator=opener())
    assert scores(outcome) == scores(sound)


def test_a_generation_without_any_score_stops_the_run_and_tells_nothing(
    study: Study, storage: Path
) -> None:
    reasons = iter(["a", "a", "b", "b", "c", "c"])

    def fails(recipe: Recipe) -> Exception | None:
        plain = recipe.models is not None or weights_of(recipe) == [0.5] * 4
        return None if plain else CandidateError(next(reasons))

    with pytest.raises(RunError, match="no candidate of a whole generation could be scored: c"):
        run_search(study(), storage=storage, open_evaluator=opener(fails=fails))
    assert told_to_sampler(storage) == {}
    outcome = run_search(study(), storage=storage, open_evaluator=opener())
    assert all(score is not None for score in scores(outcome))


def test_an_engine_that_dies_is_opened_again_and_the_candidate_tried_once_more(
    study: Study, storage: Path, tmp_path: Path
) -> None:
    stories: list[Story] = []
    outcome = run_search(
        study(),
        storage=storage,
        open_evaluator=opener(fails=DiesAt(3, 10)),
        report=stories.append,
    )
    sound = run_search(study(), storage=tmp_path / "sound", open_evaluator=opener())
    assert scores(outcome) == scores(sound)
    said = [story.line for story in stories if isinstance(story, Said)]
    assert said == ["the engine died (no heartbeat); starting it again"] * 2


def test_a_candidate_that_kills_the_engine_twice_has_failed(study: Study, storage: Path) -> None:
    outcome = run_search(study(), storage=storage, open_evaluator=opener(fails=DiesAt(7, 8)))
    reasons = [trial["reason"] for trial in outcome.status["trials"]]
    assert reasons[2] == "the engine died twice of it: no heartbeat"
    assert [reason for reason in reasons if reason] == [reasons[2]]


def test_unscored_answers_are_left_out_of_the_mean_and_counted(study: Study, storage: Path) -> None:
    def grade(recipe: Recipe, task: str) -> float | None:
        return None if task in ("0", "1") else 0.5

    stories: list[Story] = []
    outcome = run_search(
        study(), storage=storage, open_evaluator=opener(grade=grade), report=stories.append
    )
    assert set(scores(outcome)) == {0.5}
    measured = [story for story in stories if isinstance(story, Measured) and story.number == 0]
    assert (measured[0].tasks, measured[0].unscored, measured[0].cut) == (7, 2, 1)


def test_a_candidate_without_any_graded_answer_has_failed(study: Study, storage: Path) -> None:
    with pytest.raises(RunError, match="none of its 7 answers could be graded"):
        run_search(study(), storage=storage, open_evaluator=opener(grade=lambda *_: None))


def test_a_model_or_the_uniform_merge_can_win_but_a_trial_wins_a_tie(
    study: Study, tmp_path: Path
) -> None:
    def best_is(label: str) -> Callable[[Recipe, str], float]:
        def grade(recipe: Recipe, task: str) -> float:
            if recipe.models is not None:
                return 1.0 if label in recipe.models[0].model else 0.0
            return 1.0 if label == "uniform" and weights_of(recipe) == [0.5] * 4 else 0.5

        return grade

    found = {}
    for label in ("right", "base", "uniform"):
        outcome = run_search(
            study(), storage=tmp_path / label, open_evaluator=opener(grade=best_is(label))
        )
        best = outcome.status["best"]
        found[label] = (best["source"], best["number"], best["score"])
    assert found == {
        "right": ("model", None, 1.0),
        "base": ("trial", 0, 0.5),  # the base is no candidate
        "uniform": ("uniform", None, 1.0),
    }
    written = yaml.safe_load(
        (tmp_path / "right" / "studies" / "formula" / "best_config.yaml").read_text()
    )
    assert written["merge_method"] == "passthrough"
    assert written["models"][0]["model"].endswith("right")
    tie = run_search(study(), storage=tmp_path / "tie", open_evaluator=opener(grade=lambda *_: 0.5))
    assert (tie.winner.source, tie.winner.number) == ("trial", 0)


def test_without_a_holdout_the_outcome_has_none(study: Study, storage: Path) -> None:
    asked = study(holdout=0, tasks_per_candidate=1.0)
    outcome = run_search(asked, storage=storage, open_evaluator=opener(), trials=6)
    assert outcome.status["outcome"]["holdout"] is None
    assert outcome.status["trials"][0]["tasks"] == 10


def test_best_config_is_the_best_so_far_at_every_moment(study: Study, storage: Path) -> None:
    path = storage / "studies" / "formula" / "best_config.yaml"
    seen: list[bool] = []

    def compare(story: Story) -> None:
        if isinstance(story, Measured) and story.best_number is not None:
            best = trial_recipe(storage, "formula", story.best_number)
            seen.append(read_recipe(path) == best)

    run_search(study(), storage=storage, open_evaluator=opener(), report=compare)
    assert len(seen) == 24 + 5  # the trials, and five candidates on the held-out tasks
    assert all(seen)


def test_files_that_are_gone_or_spoiled_are_made_again_from_the_log(
    study: Study, storage: Path
) -> None:
    run_search(study(), storage=storage, open_evaluator=opener(), trials=12)
    directory = storage / "studies" / "formula"
    before = {path.name: path.read_bytes() for path in directory.glob("*.yaml")}
    assert sorted(before) == ["best_config.yaml", "study.yaml"]
    (directory / "best_config.yaml").write_text("spoiled")
    (directory / "study.yaml").unlink()
    run_search(study(), storage=storage, open_evaluator=opener(), trials=12)
    assert {path.name: path.read_bytes() for path in directory.glob("*.yaml")} == before
    shutil.rmtree(directory)
    outcome = run_search(study(), storage=storage, open_evaluator=opener(), trials=18)
    assert len(outcome.status["trials"]) == 18
    assert read_recipe(directory / "best_config.yaml") == outcome.recipe


def test_a_study_does_not_change_its_database(
    study: Study, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6)
    monkeypatch.setenv("STUDIES_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    elsewhere = study(storage={"database_env": "STUDIES_URL"})
    with pytest.raises(ConfigError, match="began in the database of its storage directory, not of"):
        run_search(elsewhere, storage=storage, open_evaluator=opener())


def test_other_versions_are_said_when_a_study_goes_on(
    study: Study, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories: list[Story] = []
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6, report=stories.append)
    monkeypatch.setattr("evomerge.search.loop.platform.python_version", lambda: "4.0.0")
    run_search(study(), storage=storage, open_evaluator=opener(), trials=12, report=stories.append)
    (said,) = [story.line for story in stories if isinstance(story, Said)]
    assert said.startswith("python was 3.")
    assert " and is 4.0.0 now: " in said


def test_the_seconds_of_a_study_add_up_to_the_time_after_engine_start(
    study: Study, storage: Path
) -> None:
    outcome = run_search(study(), storage=storage, open_evaluator=opener(seconds=0.002))
    seconds = outcome.status["seconds"]
    assert set(seconds) == {"switch", "generate", "score", "engine", "ask", "log", "other"}
    answers = 28 * 7 + 5 * 3
    assert answers * 0.002 <= seconds["generate"] < 10 * answers * 0.002
    per_trial = [trial["seconds"]["generate"] for trial in outcome.status["trials"]]
    assert all(spent >= 7 * 0.002 for spent in per_trial)


def test_a_line_tells_a_trials_story(study: Study, storage: Path) -> None:
    stories: list[Story] = []
    suite = {"data": "tasks.jsonl", "category": "id", "by_category": {"3": {"max_tokens": 9}}}
    run_search(
        study(suite=suite),
        storage=storage,
        open_evaluator=opener(),
        report=stories.append,
        trials=6,
    )
    lines = [story.line for story in stories if not isinstance(story, Said)]
    assert lines[0] == (
        "study formula begins: 6 trials, generations of 6, 4 genes, 7 tasks + 3 held out"
    )
    assert lines[5].startswith("trial 0 gen 0 | merge 0 ms | 7 answers 0.0")
    assert " s, 1 cut at 9 to 256 tokens | score " in lines[5]
    measured = Measured(
        candidate="trial 17",
        title="trial 17",
        part="search",
        number=17,
        generation=2,
        score=3.4156,
        reason=None,
        tasks=100,
        unscored=1,
        cut=7,
        limits=(1024,),
        seconds={"switch": 0.041, "generate": 212.0},
        best_score=3.5125,
        best_number=12,
        done=18,
        total=48,
    )
    assert measured.line == (
        "trial 17 gen 2 | merge 41 ms | 100 answers 212.00 s, 7 cut at 1024 tokens, 1 unscored | "
        "score 3.416 | best 3.513 (#12)"
    )
    for limits, words in (((64, 256, 512), "64 to 512 tokens"), ((), "their most tokens")):
        assert f" s, 7 cut at {words}, " in replace(measured, limits=limits).line
    failed = replace(measured, score=None, reason="NaN weights", seconds={})
    assert failed.line == "trial 17 gen 2 | failed: NaN weights | best 3.513 (#12)"
    held_out = replace(measured, title="owner/model", part="holdout", number=None, generation=None)
    assert held_out.line.startswith("owner/model, held-out tasks | merge 41 ms")


def test_a_study_that_does_not_exist_is_named_with_those_that_do(
    study: Study, storage: Path
) -> None:
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6)
    with pytest.raises(ConfigError, match=r"there is no study other \(there are formula\)"):
        study_status(storage, "other")
    with pytest.raises(ConfigError, match="study formula has no trial 99; there are 6, from 0"):
        trial_recipe(storage, "formula", 99)
    with pytest.raises(ConfigError, match="is no name for a study"):
        study_status(storage, "../formula")
    assert list_studies(storage / "nowhere") == []
