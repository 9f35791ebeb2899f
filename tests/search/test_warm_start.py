"""Searches that start from other merges, and go on: real studies by formula on tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe, read_recipe
from evomerge.report.results import write_results
from evomerge.report.status import which
from evomerge.search.log import EventLog
from evomerge.search.loop import Outcome, run_search
from evomerge.search.status import Source, trial_recipe
from evomerge.search.storage import open_log
from evomerge.search.story import Measured, Story
from evomerge.search.study import read_study
from tests.search.formula import formula_grade, opener, weights_of

GOOD = [0.85, 0.95, 0.9, 0.88]
Search = Callable[..., Outcome]


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def search(study_file: Callable[..., Path], storage: Path) -> Search:
    """Runs a study of another name with other keys."""

    def run(name: str, trials: int = 12, grade: Any = formula_grade, **changes: Any) -> Outcome:
        stories = changes.pop("stories", [])
        config = read_study(str(study_file(f"{name}.yaml", study=name, **changes)))
        return run_search(
            config,
            storage=storage,
            open_evaluator=opener(grade=grade),
            trials=trials,
            report=stories.append,
        )

    return run


def log_of(storage: Path, name: str) -> EventLog:
    log = open_log(storage, name)
    assert log is not None
    log.close()
    return log


def write_recipe(path: Path, models: Path, weights: list[float], **changes: Any) -> None:
    """A recipe file with a slice for every two weights, left and right."""
    step = 4 // (len(weights) // 2)
    slices = [
        {
            "sources": [
                *(
                    {
                        "model": str(models / name),
                        "layer_range": [place * step, place * step + step],
                        "parameters": {"weight": weights[2 * place + index]},
                    }
                    for index, name in enumerate(("left", "right"))
                ),
                {
                    "model": str(models / "base"),
                    "layer_range": [place * step, place * step + step],
                },
            ]
        }
        for place in range(len(weights) // 2)
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "dtype": "float16",
        "slices": slices,
        "parameters": {"int8_mask": 1.0, "normalize": 0.0},
    }
    path.write_text(yaml.safe_dump({**recipe, **changes}))


def test_a_recipe_that_is_better_than_the_sweep_is_where_the_search_starts(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path / "good.yaml", models, GOOD)
    stories: list[Story] = []
    outcome = search("warm", warm_start="good.yaml", sweep=True, stories=stories)
    history = log_of(storage, "warm").history
    assert history.start is not None
    assert (history.start["warm"], history.start["genome"]) == ("warm 0", GOOD)
    assert history.start["candidate"].startswith("uniform")
    assert history.named["warm 0"] == tuple(GOOD)
    assert outcome.status["outcome"]["search"]["uniform_best"]["scale"] in (0.75, 1.0)
    titles = {story.title for story in stories if isinstance(story, Measured)}
    assert "good.yaml" in titles
    first = [trial["genome"] for trial in outcome.status["trials"][:6]]
    assert all(
        abs(gene - good) < 1.2 for genome in first for gene, good in zip(genome, GOOD, strict=True)
    )


def test_a_warm_start_that_nothing_beats_wins_with_report_and_model(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path / "good.yaml", models, GOOD)

    def grade(recipe: Recipe, task: str) -> float:
        return 1.0 if weights_of(recipe) == GOOD else 0.1 * formula_grade(recipe, task)

    outcome = search("warm", grade=grade, warm_start="good.yaml", selection={"attempts": 1})
    assert (outcome.status["best"]["source"], outcome.status["best"]["number"]) == (
        "warm start",
        None,
    )
    results = write_results(storage, "warm", lambda line: None)
    assert "The winner is one of the merges that the search was given" in results.report.read_text()
    assert read_recipe(results.config) == outcome.recipe
    assert weights_of(outcome.recipe) == GOOD


def test_every_winner_has_words_of_its_own() -> None:
    assert which("trial", 17) == "trial 17"
    assert len({which(source, 17) for source in get_args(Source)}) == len(get_args(Source))


def test_a_recipe_that_is_worse_does_not_lead_the_search_astray(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    plain = search("plain")
    write_recipe(tmp_path / "bad.yaml", models, [-0.4, 1.9, -0.4, 1.9])
    warm = search("warm", warm_start=["bad.yaml"])
    history = log_of(storage, "warm").history
    assert history.start is not None
    assert "warm" not in history.start
    assert [trial["genome"] for trial in warm.status["trials"]] == [
        trial["genome"] for trial in plain.status["trials"]
    ]


def test_the_winner_of_a_coarse_study_starts_a_finer_one(
    search: Search, storage: Path, models: Path
) -> None:
    best = {(0, 2): (1.6, 0.1), (2, 4): (0.2, 1.5)}

    def grade(recipe: Recipe, task_id: str) -> float:
        if not recipe.slices:
            return 0.0
        errors = [0.001 * int(task_id)]
        for part in recipe.slices or ():
            for source in part.sources[:2]:
                first, _ = source.layer_range
                wanted = next(w for (low, high), w in best.items() if low <= first < high)
                said: Any = source.parameters["weight"]
                values = [one["value"] for one in said] if isinstance(said, list) else [said]
                errors += [(value - wanted["right" in source.model]) ** 2 for value in values]
        return 1 - sum(errors) / len(errors)

    coarse = search("coarse", trials=60, grade=grade)
    winner = coarse.recipe
    fine = search(
        "fine",
        grade=grade,
        warm_start="coarse",
        search_space={"layer_granularity": 1, "filters": ["mlp"]},
    )
    history = log_of(storage, "fine").history
    assert history.start is not None
    assert history.start["warm"] == "warm 0"
    weights = [
        source.parameters["weight"] for part in winner.slices or () for source in part.sources[:2]
    ]
    left, right, late_left, late_right = (list(itertools.repeat(weight, 2)) for weight in weights)
    expected = [*left, *right, *left, *right, *late_left, *late_right, *late_left, *late_right]
    assert history.start["genome"] == expected
    assert len(fine.status["trials"]) == 12


def test_another_study_of_the_same_space_gives_its_winner_as_it_is(
    search: Search, storage: Path
) -> None:
    first = search("first", trials=36)
    search("second", warm_start="first", sampler={"population": 6, "seed": 8})
    named = log_of(storage, "second").history.named["warm 0"]
    from evomerge.search.candidates import space_from_mapping

    history = log_of(storage, "second").history
    assert history.begun is not None
    space = space_from_mapping(history.begun["space"])
    assert space.decode(named).to_mapping() == first.recipe.to_mapping()
    assert first.recipe == trial_recipe(storage, "first")


def test_a_resumed_study_keeps_its_warm_start_though_its_sources_change(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path / "good.yaml", models, GOOD)
    whole = search("whole", warm_start="good.yaml", trials=18)
    search("broken", warm_start="good.yaml", trials=12)
    (tmp_path / "good.yaml").unlink()
    broken = search("broken", warm_start="good.yaml", trials=18)
    genomes = [[trial["genome"] for trial in one.status["trials"]] for one in (whole, broken)]
    assert genomes[0] == genomes[1]
    with pytest.raises(ConfigError, match=r"warm_start\.0: was good\.yaml, is absent"):
        search("broken", trials=18)


@pytest.mark.parametrize("attempts", [0, 3])
def test_a_finished_study_goes_on_with_a_greater_budget(search: Search, attempts: int) -> None:
    changes = {
        "selection": {"attempts": attempts},
        "sweep": bool(attempts),
        "tasks_per_candidate": 0.5 if attempts else None,
    }
    whole = search("whole", trials=24, **changes)
    assert search("raised", trials=12, **changes).status["state"] == "finished"
    raised = search("raised", trials=24, **changes)
    trials = [
        [(trial["genome"], trial["score"]) for trial in one.status["trials"]]
        for one in (whole, raised)
    ]
    assert trials[0] == trials[1]
    assert raised.status["state"] == "finished"
    assert raised.recipe == whole.recipe


def test_a_recipe_of_another_space_is_refused_before_anything_is_done(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    other = "is no merge of this search space"
    for changes, message in (
        ({"merge_method": "ties"}, "its merge_method is ties, the search's task_arithmetic"),
        ({"parameters": {"normalize": 1.0}}, other),
        ({"parameters": {"lambda": 0.5}}, other),
    ):
        write_recipe(tmp_path / "start.yaml", models, GOOD, **changes)
        with pytest.raises(ConfigError) as refused:
            search("warm", warm_start="start.yaml")
        assert f"warm_start.0: start.yaml: {message}" in str(refused.value)
        assert not storage.exists()


def test_every_warm_start_that_is_wrong_is_told(
    search: Search, storage: Path, models: Path, tmp_path: Path
) -> None:
    search("other", models=[str(models / "left")], trials=6)
    write_recipe(tmp_path / "finer.yaml", models, [0.1 * n for n in range(8)])
    write_recipe(tmp_path / "beyond.yaml", models, [2.5, *GOOD[1:]])
    wrong = ["nobody", "other", "warm", "gone.yaml", "finer.yaml", "beyond.yaml"]
    with pytest.raises(ConfigError) as refused:
        search("warm", warm_start=wrong)
    lines = [line for line in str(refused.value).splitlines() if "warm_start." in line]
    for line, words in zip(
        lines,
        [
            "there is no study nobody",
            "the search is over",
            "is this very study",
            "cannot be read as a recipe",
            "layers 0-2 | left: has 2 different values in these layers",
            "layers 0-2 | left: 2.5 lies outside of [-0.5, 2]",
        ],
        strict=True,
    ):
        assert words in line
    assert log_of(storage, "other").history.finished is not None
