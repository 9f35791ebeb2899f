"""Searches over more than weights: other methods, stacks of layers, mergekit-evolve's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
import yaml

from evomerge.cli import main
from evomerge.database import open_database
from evomerge.engine import open_engine
from evomerge.engine.base import EngineConfig, GenerationSettings
from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.materialize import materialize
from evomerge.recipe import Recipe
from evomerge.schema import answers
from evomerge.search.evaluator import open_evaluator
from evomerge.search.loop import Outcome, run_search
from evomerge.search.resolve import resolve_study, what_changed
from evomerge.search.status import stored_study, trial_recipe
from evomerge.search.study import StudyConfig, read_study, study_from_mapping
from evomerge.space import SearchSpace
from tests import tiny
from tests.search.formula import opener

Study = Callable[..., StudyConfig]
TINY = {"name": "transformers", "dtype": "float32", "threads": 1}


def layers_of(recipe: Recipe) -> int:
    return sum(part.sources[0].num_layers for part in recipe.slices or ())


def stored_answers(storage: Path, candidate: str) -> dict[str, str]:
    """prompt -> answer of one candidate."""
    database = open_database(storage)
    query = sql.select(answers.c.prompt, answers.c.answer).where(answers.c.candidate == candidate)
    with database.connect() as connection:
        found = {row.prompt: row.answer for row in connection.execute(query)}
    database.dispose()
    return found


def answers_from_disk(
    recipe: Recipe, prompts: list[str], folder: Path, engine_name: str = "transformers"
) -> list[str]:
    """What the model of `recipe` answers when it is written and opened as any other."""
    model = str(materialize(recipe, folder))
    options = {"max_model_len": 64}
    config = EngineConfig(
        model=model, sources=(model,), dtype="float32", threads=1, options=options
    )
    with open_engine(engine_name, config) as engine:
        settings = GenerationSettings(max_tokens=5)
        completions = engine.generate(prompts, settings, add_special_tokens=True)
    return [completion.text for completion in completions]


def searched(study: StudyConfig, storage: Path, trials: int) -> Outcome:
    return run_search(study, storage=storage, open_evaluator=open_evaluator, trials=trials)


def suite(tmp_path: Path) -> dict[str, object]:
    rows = [{"input": f"{word} is", "output": "!"} for word in ("one", "three", "seven", "nine")]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return {"scorer": "exact", "data": "words.jsonl", "max_tokens": 5}


SPACES: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "layer_granularity": 2, "filters": ["mlp"]},
    "della, smooth": {
        "merge_method": "della",
        "layer_granularity": 2,
        "smooth": True,
        "epsilon": {"per": "global"},
    },
    "stack": {"merge_method": "passthrough", "stack": {"repeats": 2, "scale": [0.5, 1.5]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_trial_in_the_engine_answers_as_its_model_on_disk(
    study: Study, tmp_path: Path, name: str
) -> None:
    storage = tmp_path / "storage"
    asked = study(
        search_space=SPACES[name], suite=suite(tmp_path), engine=TINY, sampler={"population": 4}
    )
    outcome = searched(asked, storage, trials=4)
    assert [trial["state"] for trial in outcome.status["trials"]] == ["complete"] * 4
    recipes = [trial_recipe(storage, "formula", number) for number in range(4)]
    assert len({recipe.to_yaml() for recipe in recipes}) == 4
    for number, recipe in enumerate(recipes[:2]):
        told = stored_answers(storage, f"trial {number}")
        written = answers_from_disk(recipe, list(told), tmp_path / f"model {number}")
        assert written == list(told.values())


@pytest.mark.slow
def test_stacks_of_any_depth_come_by_disk_and_a_stack_of_none_fails_alone(
    study: Study, tmp_path: Path
) -> None:
    asked = study(
        search_space={"merge_method": "passthrough", "stack": {"block": 2, "max_layers": 6}},
        suite=suite(tmp_path),
        engine=TINY,
        # Far steps: stacks of 0 to 16 layers.
        sampler={"population": 12, "sigma0": 5.0, "seed": 2},
        holdout=0,
    )
    outcome = searched(asked, tmp_path / "storage", trials=12)
    trials = outcome.status["trials"]
    states = {trial["number"]: trial["state"] for trial in trials}
    assert set(states.values()) == {"complete", "failed"}
    depths = set()
    for number, state in states.items():
        if state == "complete":
            depths.add(layers_of(trial_recipe(tmp_path / "storage", "formula", number)))
        else:
            assert "stack allows 1 (min_layers) to 6 (max_layers)" in trials[number]["reason"]
    assert depths <= {2, 4, 6}
    assert len(depths) > 1
    written = materialize(outcome.recipe, tmp_path / "model")
    assert Checkpoint.open(written).config["num_hidden_layers"] in {4, *depths}


def test_a_stack_is_searched_for_the_depth_that_scores(study: Study, tmp_path: Path) -> None:
    asked = study(
        search_space={"merge_method": "passthrough", "stack": {"block": 1, "max_layers": 16}},
        sampler={"population": 8, "sigma0": 1.0, "seed": 1},
    )
    outcome = run_search(
        asked,
        storage=tmp_path / "storage",
        open_evaluator=opener(grade=lambda recipe, _: -float(abs(layers_of(recipe) - 9))),
        trials=80,
    )
    assert outcome.winner.score == 0
    assert layers_of(outcome.recipe) == 9
    again = run_search(asked, storage=tmp_path / "storage", open_evaluator=opener(), trials=80)
    assert again.recipe == outcome.recipe


def test_a_density_with_logarithmic_bounds_is_found(study: Study, tmp_path: Path) -> None:
    def grade(recipe: Recipe, _: str) -> float:
        if recipe.slices is None:
            return -9.0
        densities = [part.sources[0].parameters["density"] for part in recipe.slices]
        return -sum((float(str(density)) / 0.03 - 1) ** 2 for density in densities)

    asked = study(
        search_space={
            "merge_method": "dare_ties",
            "layer_granularity": 2,
            "weight": 0.5,
            "density": {"low": 0.001, "high": 1.0, "log": True, "start": 0.3},
        },
        sampler={"population": 8, "seed": 1},
    )
    outcome = run_search(
        asked, storage=tmp_path / "storage", open_evaluator=opener(grade=grade), trials=200
    )
    assert outcome.winner.score > -0.02
    assert outcome.recipe.parameters == {"weight": 0.5}


GENOME = {
    "merge_method": "ties",
    "models": ["left", "right"],
    "base_model": "base",
    "layer_granularity": 2,
}


@pytest.fixture
def evolve(models: Path, tmp_path: Path) -> dict[str, Any]:
    """A mergekit-evolve file's content, its models placed."""
    placed = {
        **GENOME,
        "models": [str(models / name) for name in ("left", "right")],
        "base_model": str(models / "base"),
    }
    return {"genome": placed, "tasks": [{"name": "gsm8k_train", "weight": 1.0}], "limit": 100}


def more(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """What makes a genome a study."""
    rows = [{"id": str(number), "input": "?", "output": "!"} for number in range(6)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return {
        "study": "formula",
        "budget": {"trials": 12},
        "sampler": {"population": 6},
        "suite": {"scorer": "exact", "data": "tasks.jsonl"},
        "engine": {"name": "transformers"},
        **changes,
    }


def test_a_mergekit_evolve_file_alone_is_told_what_it_lacks(
    evolve: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "evolve.yaml"
    path.write_text(yaml.safe_dump(evolve))
    with pytest.raises(ConfigError) as caught:
        read_study(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: this mergekit-evolve file says what is searched (genome")
    assert "Add study: NAME and budget: {trials: N} to it" in message
    assert message.endswith("genome: evolve.yaml")
    path.write_text(yaml.safe_dump({key: evolve[key] for key in evolve if key != "tasks"}))
    with pytest.raises(ConfigError, match=r"Add study: NAME, suite: \{scorer: …"):
        read_study(str(path))


@pytest.mark.parametrize("form", ["beside", "file", "inline"])
def test_a_genome_is_searched_in_any_of_its_places(
    evolve: dict[str, Any], tmp_path: Path, form: str
) -> None:
    (tmp_path / "evolve.yaml").write_text(yaml.safe_dump(evolve))
    places: dict[str, dict[str, Any]] = {
        "beside": evolve,
        "file": {"genome": "evolve.yaml"},
        "inline": {"genome": evolve["genome"]},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**more(tmp_path), **places[form]}))
    study, storage = read_study(str(file)), tmp_path / "storage"
    outcome = run_search(study, storage=storage, open_evaluator=opener())
    assert len(outcome.status["trials"]) == 12
    recipe = trial_recipe(storage, "formula", 3)
    assert recipe.parameters == {"normalize": True, "int8_mask": True}
    assert [set(source.parameters) for source in (recipe.slices or ())[0].sources] == [
        {"weight", "density"},
        {"weight", "density"},
        set(),
    ]
    names = evolve["genome"]["models"]
    assert set(outcome.status["outcome"]["search"]["models"]) == set(names)
    (tmp_path / "evolve.yaml").unlink()
    again = stored_study(storage, "formula")
    assert again.genome == study.genome
    more_trials = run_search(again, storage=storage, open_evaluator=opener(), trials=18)
    assert len(more_trials.status["trials"]) == 18


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search_space": {}}, "search_space: genome says it already"),
        ({"models": ["x"]}, r"models: genome says \['"),
        ({"base_model": "x"}, "base_model: genome says .*base already"),
        ({"random_init": True}, "random_init: a search starts at equal weights here"),
        ({"genome": "nowhere.yaml"}, "genome: .*nowhere.yaml cannot be read as YAML"),
        ({"genome": {**GENOME, "smoth": True}}, "study.yaml: genome.smoth: unknown key; did you"),
        ({"genome": {**GENOME, "merge_method": "slerp"}}, "genome: base_model: base would be one"),
        ({"genome": {"models": ["a"]}}, "genome.merge_method: is missing"),
    ],
)
def test_a_genome_that_does_not_fit_is_refused(
    evolve: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        study_from_mapping(
            {**more(tmp_path), **evolve, **changes}, where="study.yaml", folder=tmp_path
        )


def test_a_wrong_genome_in_a_file_of_its_own_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "evolve.yaml").write_text("genome: {merge_method: ties, models: [a], smoth: 1}")
    with pytest.raises(ConfigError, match=r"evolve\.yaml: genome\.smoth: unknown key; did you"):
        study_from_mapping(
            more(tmp_path, genome="evolve.yaml"), where="study.yaml", folder=tmp_path
        )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"density": [0.1, 0.9]}, "search_space.density.1: was 1.0, is 0.9"),
        ({"lambda": 0.5}, "search_space.lambda: was absent, is 0.5"),
        ({"smooth": True}, "search_space.smooth: was absent, is True"),
        ({"normalize": False}, "search_space.normalize: was absent, is False"),
    ],
)
def test_what_is_searched_decides_the_study(
    study: Study, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    space = {"merge_method": "ties", "layer_granularity": 2}
    before = resolve_study(study(search_space=space), tmp_path).fingerprint
    after = resolve_study(study(search_space={**space, **changes}), tmp_path).fingerprint
    assert what_changed(before, after) == [line]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"merge_method": "slerp"}, "study.yaml: models: slerp merges exactly 1 model beside"),
        ({"merge_method": "tise"}, "search_space.merge_method: unknown merge method 'tise'; did"),
        ({"density": {"lwo": 1}}, "search_space.density.lwo: unknown key; did you mean 'low'"),
        ({"merge_method": "passthrough", "stack": {"repeat": 2}}, "stack.repeat: unknown key; did"),
        (
            {
                "merge_method": "passthrough",
                "stack": {"scale": [0.5, 1.5], "scale_filters": ["o_proj", "fc2"]},
            },
            "study.yaml: search_space.stack.scale_filters: no tensor of .*base has 'fc2' in",
        ),
        ({"merge_method": "karcher"}, "search_space: karcher has nothing to search here"),
    ],
)
def test_a_wrong_search_space_names_file_and_key(
    study: Study, tmp_path: Path, space: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_study(study(search_space=space), tmp_path)


@pytest.mark.slow
def test_models_with_other_vocabularies_are_searched_with_the_bases_tokenizer(
    study: Study, models: Path, tmp_path: Path
) -> None:
    wide = tiny.llama(tmp_path / "wide", layers=4, hidden=64, vocabulary=300, seed=5)
    changes: dict[str, Any] = {
        "models": [str(models / "left"), str(wide)],
        "suite": suite(tmp_path),
        "engine": TINY,
        "sampler": {"population": 4},
    }
    space = {"merge_method": "dare_ties", "layer_granularity": 4}
    with pytest.raises(ConfigError, match="tokenizer_source"):
        resolve_study(study(search_space=space, **changes), tmp_path / "storage")
    asked = study(search_space={**space, "tokenizer_source": "base"}, **changes)
    outcome = searched(asked, tmp_path / "storage", trials=4)
    assert [trial["state"] for trial in outcome.status["trials"]] == ["complete"] * 4
    scores = outcome.status["outcome"]["search"]
    assert None not in scores["models"].values()
    recipe = trial_recipe(tmp_path / "storage", "formula", 1)
    written = materialize(recipe, tmp_path / "model")
    assert Checkpoint.open(written).config["vocab_size"] == 261


PRESETS = [
    path
    for path in sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
    if "\nstudy:" in path.read_text()
]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_how_it_is_run_and_spends_its_budget(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert comment == lines[: len(comment)]
    assert f"evomerge search {path.stem}" in comment[-1]
    preset = read_study(path.stem)
    space = SearchSpace.build(
        preset.space,
        base_model=preset.base_model,
        models=preset.models,
        num_layers=40 if "13b" in path.stem else 32,
        dtype=preset.engine.dtype,
    )
    assert f" {space.dimension} genes" in " ".join(line.lstrip("# ") for line in comment)
    assert preset.budget.trials % preset.sampler.population_for(space.dimension) == 0


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_a_search_over_densities_in_vllm_scores_the_models_that_lie_on_disk(
    study_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    file = study_file(
        search_space={"merge_method": "ties", "layer_granularity": 2, "filters": ["mlp"]},
        suite=suite(tmp_path),
        engine={**TINY, "name": "vllm", "max_model_len": 64, "max_num_seqs": 8},
        sampler={"population": 4},
        budget={"trials": 4},
        holdout=0,
    )
    assert main(["search", str(file), "--storage", str(tmp_path / "kept")]) == 0
    assert "by disk" not in capsys.readouterr().err
    told = [stored_answers(tmp_path / "kept", f"trial {number}") for number in range(4)]
    assert len({json.dumps(one) for one in told}) > 1
    recipe = trial_recipe(tmp_path / "kept", "formula", 3)
    written = answers_from_disk(recipe, list(told[3]), tmp_path / "model", "vllm")
    assert written == list(told[3].values())
