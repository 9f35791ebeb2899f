"""Recipes of other shapes as genomes: what the numbers must be follows from the recipe by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe
from evomerge.space import SearchSpace, SpaceConfig
from evomerge.space.adopt import adopted


def space(models: tuple[str, ...] = ("left", "right"), **config: Any) -> SearchSpace:
    return SearchSpace.build(
        SpaceConfig.model_validate(config),
        base_model="base",
        models=models,
        num_layers=4,
        dtype="float32",
    )


def coarse(**config: Any) -> Recipe:
    """Two slices of two layers: weights 0.1 to 0.4."""
    return space(layer_granularity=2, **config).decode(np.array([0.1, 0.2, 0.3, 0.4]))


def by_name(target: SearchSpace, recipe: Recipe) -> dict[str, float]:
    return dict(zip(target.genes, adopted(target, recipe)[0].tolist(), strict=True))


def test_a_recipe_of_the_space_is_its_own_genome() -> None:
    target = space(layer_granularity=2)
    genome, fitting = adopted(target, coarse())
    assert genome.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert fitting.to_mapping() == coarse().to_mapping()


def test_finer_slices_take_over_the_numbers_of_the_slice_that_they_lie_in() -> None:
    assert by_name(space(layer_granularity=1), coarse()) == {
        "layers 0-1 | left": 0.1,
        "layers 0-1 | right": 0.2,
        "layers 1-2 | left": 0.1,
        "layers 1-2 | right": 0.2,
        "layers 2-3 | left": 0.3,
        "layers 2-3 | right": 0.4,
        "layers 3-4 | left": 0.3,
        "layers 3-4 | right": 0.4,
    }


def test_tensor_groups_that_are_new_take_over_the_number_of_all() -> None:
    target = space(layer_granularity=2, filters=["mlp"])
    found = adopted(target, coarse())[0]
    assert found.tolist() == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]
    grouped = target.decode(np.arange(8) / 10)
    finer = space(layer_granularity=1, filters=["mlp", "self_attn"])
    genes = by_name(finer, grouped)
    assert genes["layers 1-2 | right | mlp"] == 0.2
    assert genes["layers 1-2 | right | self_attn"] == genes["layers 1-2 | right | rest"] == 0.3


def test_whole_models_with_gradients_and_numbers_in_other_places_are_read() -> None:
    recipe = Recipe.model_validate(
        {
            "merge_method": "dare_ties",
            "base_model": "base",
            "dtype": "bfloat16",
            "models": [
                {"model": "right", "parameters": {"weight": 0.5}},
                {"model": "left", "parameters": {"weight": [0.0, 0.3]}},
            ],
            "parameters": {"density": 0.4},
        }
    )
    target = space(
        merge_method="dare_ties",
        layer_granularity=1,
        density={"low": 0.1, "high": 1.0, "per": "global"},
    )
    genes = by_name(target, recipe)
    left = [genes[f"layers {n}-{n + 1} | left | weight"] for n in range(4)]
    assert left == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {genes[f"layers {n}-{n + 1} | right | weight"] for n in range(4)} == {0.5}
    assert genes["density"] == 0.4
    fitting = adopted(target, recipe)[1]
    assert (fitting.dtype, fitting.models[0].model) == ("float32", "left")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"layer_granularity": 0}, "layers 0-4 | left: has 2 different values"),
        ({"layer_granularity": 1, "weight": [0.15, 1.0]}, "0.1 lies outside of [0.15, 1]"),
        ({"merge_method": "ties"}, "its merge_method is task_arithmetic, the search's ties"),
        ({"layer_granularity": 1, "smooth": True}, "smooth numbers takes recipes of its very own"),
    ],
)
def test_what_the_space_cannot_say_is_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        adopted(space(**target), coarse())
    assert message in str(refused.value)


def test_other_models_are_refused() -> None:
    for models in (("left",), ("left", "right", "third"), ("left", "other")):
        with pytest.raises(ConfigError, match="it merges base, left, right; the search is over"):
            adopted(space(models), coarse())


def test_a_stack_of_layers_is_refused() -> None:
    mapping = coarse().to_mapping()
    slices: Any = mapping["slices"]
    mapping["slices"] = slices[::-1]
    with pytest.raises(ConfigError, match="its layers are stacked otherwise from layer 0 on"):
        adopted(space(layer_granularity=1), Recipe.model_validate(mapping))
    mapping["slices"] = slices[:1]
    with pytest.raises(ConfigError, match="it has 2 layers, the models have 4"):
        adopted(space(layer_granularity=1), Recipe.model_validate(mapping))
