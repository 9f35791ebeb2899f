"""The genome of a mergekit-evolve file, beside what mergekit-evolve itself makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evomerge.errors import ConfigError
from evomerge.recipe import recipe_from_mapping
from evomerge.space import GenomeConfig, SearchSpace

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "evolve.json").read_text())


def space(genome: dict[str, Any], layers: int = 4) -> SearchSpace:
    config = GenomeConfig.model_validate(genome)
    return SearchSpace.build(
        config,
        base_model=config.served,
        models=config.models,
        num_layers=layers,
        dtype="bfloat16",
    )


def rounded(plain: object) -> object:
    """The same values, their numbers to 12 digits: torch's softmax rounds otherwise than ours."""
    if isinstance(plain, dict):
        return {key: rounded(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [rounded(item) for item in plain]
    return round(plain, 12) if isinstance(plain, float) else plain


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_genome_is_the_recipe_that_mergekit_evolve_makes_of_it(name: str) -> None:
    searched = space(RECORDED[name]["genome"], RECORDED[name]["layers"])
    for emitted in RECORDED[name]["emitted"]:
        ours: object = searched.decode(emitted["genes"]).to_mapping()
        theirs: object = recipe_from_mapping(emitted["config"], name).to_mapping()
        if RECORDED[name]["genome"]["merge_method"] == "slerp":
            ours, theirs = rounded(ours), rounded(theirs)
        assert ours == theirs


@pytest.mark.parametrize("name", sorted(name for name in RECORDED if "slerp" not in name))
def test_the_sign_of_a_gene_counts_only_where_it_may(name: str) -> None:
    searched = space(RECORDED[name]["genome"])
    for emitted in RECORDED[name]["emitted"]:
        clipped = searched.clip(emitted["genes"])
        assert searched.encode(searched.decode(emitted["genes"])).tolist() == clipped.tolist()
        allowed = RECORDED[name]["genome"].get("allow_negative_weights", False)
        assert allowed or (clipped >= 0).all()


def test_a_search_starts_at_equal_weights_and_full_density() -> None:
    searched = space({"merge_method": "ties", "models": ["a", "b"], "base_model": "c"})
    assert searched.start.tolist() == [0.5, 1.0, 0.5, 1.0]


def test_of_equal_genes_the_first_models_lead() -> None:
    searched = space({"merge_method": "slerp", "models": ["a", "b", "c"]})
    recipe = searched.decode(searched.start)
    assert recipe.slices is not None
    assert recipe.slices[0].base_model == "a"
    assert recipe.slices[0].parameters == {"t": 0.5}
    with pytest.raises(ConfigError, match="not one of this search space"):
        searched.encode(recipe)


def test_a_granularity_that_does_not_divide_the_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"genome\.layer_granularity: 3 does not divide the 4"):
        space({"merge_method": "linear", "models": ["a", "b"], "layer_granularity": 3})


@pytest.mark.parametrize(
    ("genome", "said"),
    [
        ({"merge_method": "ties", "models": ["a"]}, "ties needs a base_model"),
        ({"merge_method": "della", "models": ["a"]}, "'linear', 'task_arithmetic'"),
        ({"merge_method": "slerp", "models": ["a", "b"], "smooth": True}, "neither smooth nor"),
        ({"merge_method": "slerp", "models": ["a"]}, "at least two"),
        ({"merge_method": "slerp", "models": ["a", "b"], "base_model": "c"}, "one more input of"),
        ({"merge_method": "linear", "models": ["a"], "base_model": "c"}, "without a weight"),
        ({"merge_method": "linear", "models": []}, "at least 1 item"),
        ({"merge_method": "linear", "models": ["a", "a"]}, "listed twice"),
        ({"merge_method": "linear", "models": ["a"], "filters": ["x", "x"]}, "names one twice"),
        ({"merge_method": "linear", "models": ["a"], "layer_granularty": 2}, "layer_granularty"),
    ],
)
def test_a_genome_that_makes_no_recipes_is_refused(genome: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GenomeConfig.model_validate(genome)
