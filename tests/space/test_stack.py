"""Search spaces over stacks of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from evomerge.errors import CandidateError, ConfigError
from evomerge.recipe import Recipe
from evomerge.space import SearchSpace, SpaceConfig

TWO = ("/models/first", "/models/second")


def space(num_layers: int = 4, models: tuple[str, ...] = TWO, **stack: Any) -> SearchSpace:
    return SearchSpace.build(
        SpaceConfig.model_validate({"merge_method": "passthrough", "stack": stack}),
        base_model="/models/base",
        models=models,
        num_layers=num_layers,
        dtype="bfloat16",
    )


def layers_of(recipe: Recipe) -> list[tuple[str, int]]:
    """(model, layer) from the bottom to the top."""
    return [
        (part.sources[0].model, layer)
        for part in recipe.slices or ()
        for layer in range(*part.sources[0].layer_range)
    ]


def genes(*there: int) -> list[float]:
    return [0.3 if one else -0.3 for one in there]


def test_the_layers_of_all_models_are_laid_out_and_repeated() -> None:
    searched = space(num_layers=2, repeats=2, max_layers=8)
    assert searched.genes == (
        "round 1 | first | layers 0-1 | there",
        "round 1 | first | layers 1-2 | there",
        "round 1 | second | layers 0-1 | there",
        "round 1 | second | layers 1-2 | there",
        "round 2 | first | layers 0-1 | there",
        "round 2 | first | layers 1-2 | there",
        "round 2 | second | layers 0-1 | there",
        "round 2 | second | layers 1-2 | there",
    )
    recipe = searched.decode(genes(1, 1, 0, 1, 0, 1, 1, 1))
    assert recipe.to_mapping()["slices"] == [
        {"sources": [{"model": "/models/first", "layer_range": [0, 2]}]},
        {"sources": [{"model": "/models/second", "layer_range": [1, 2]}]},
        {"sources": [{"model": "/models/first", "layer_range": [1, 2]}]},
        {"sources": [{"model": "/models/second", "layer_range": [0, 2]}]},
    ]
    assert (recipe.merge_method, recipe.base_model) == ("passthrough", "/models/base")


def test_the_search_starts_at_the_first_model_as_it_is() -> None:
    searched = space(num_layers=6, block=2, repeats=3)
    assert searched.dimension == 3 * 2 * 3
    recipe = searched.decode(searched.start)
    assert recipe == searched.uniform_recipe()
    assert recipe.to_mapping()["slices"] == [
        {"sources": [{"model": "/models/first", "layer_range": [0, 6]}]}
    ]


def test_a_scale_is_of_what_a_layer_adds_and_parts_slices() -> None:
    searched = space(num_layers=2, repeats=1, scale={"low": 0.25, "high": 2.0, "log": True})
    assert searched.logarithmic.tolist() == [False] * 4 + [True] * 4
    assert searched.start.tolist() == [0.5, 0.5, -0.5, -0.5, 1.0, 1.0, 1.0, 1.0]
    recipe = searched.decode([*genes(1, 1, 0, 1), 0.5, 0.75, 1.0, 9.0])
    scale = [part.sources[0].parameters["scale"] for part in recipe.slices or ()]
    assert [len(scale), layers_of(recipe)] == [
        3,
        [("/models/first", 0), ("/models/first", 1), ("/models/second", 1)],
    ]
    assert scale[0] == [
        {"filter": "o_proj", "value": 0.5},
        {"filter": "down_proj", "value": 0.5},
        {"value": 1.0},
    ]
    assert scale[2][0]["value"] == 2.0  # type: ignore[index]


@pytest.mark.parametrize("stack", [{}, {"scale": [0.5, 1.5]}, {"block": 2, "repeats": 3}])
def test_a_recipe_has_a_genome_that_decodes_to_it(stack: dict[str, Any]) -> None:
    searched = space(max_layers=24, **stack)
    for seed in range(30):
        genome = np.random.default_rng(seed).uniform(searched.low - 0.1, searched.high + 0.1)
        recipe = searched.decode(genome)
        assert searched.decode(searched.encode(recipe)) == recipe
        expected = sum(gene > 0 for gene in genome[: len(searched.models) * 4 * 4])
        if not stack:
            assert len(layers_of(recipe)) == expected


def test_too_few_or_too_many_layers_fail_alone() -> None:
    searched = space(repeats=2, min_layers=2, max_layers=5)
    with pytest.raises(CandidateError, match=r"its stack has 0 layers, and stack allows 2 \(min"):
        searched.decode([-1.0] * 16)
    with pytest.raises(CandidateError, match="its stack has 16 layers"):
        searched.decode([1.0] * 16)
    assert len(layers_of(searched.decode([1.0] * 5 + [-1.0] * 11))) == 5


def test_a_recipe_out_of_order_has_no_genome() -> None:
    searched = space(num_layers=2, repeats=1)
    recipe = searched.decode(genes(1, 1, 1, 1))
    assert recipe.slices is not None
    turned = recipe.model_copy(update={"slices": recipe.slices[::-1]})
    with pytest.raises(ConfigError, match="not one of this search space"):
        searched.encode(turned)
    assert space(num_layers=2, repeats=2).encode(turned).shape == (8,)


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ({"block": 3}, "search_space.stack.block: 3 does not divide the 4 layers"),
        ({"min_layers": 20, "max_layers": 30, "repeats": 1}, "no stack has 20"),
        ({"block": 4, "max_layers": 2}, "no stack has 1"),
    ],
)
def test_an_impossible_stack_is_refused(stack: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space(**stack)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"stack": {}}, "stack: needs merge_method: passthrough, not task_arithmetic"),
        (
            {"merge_method": "passthrough", "stack": {}, "layer_granularity": 2, "scale": 1},
            "layer_granularity: has no meaning beside stack(.|\n)*scale: has no meaning",
        ),
        ({"merge_method": "passthrough", "stack": {"scale": 1.0}}, r"write \[low, high\]"),
        ({"merge_method": "passthrough", "stack": {"scale": [2, 1]}}, "low < high"),
        ({"merge_method": "passthrough", "stack": {"repeat": 2}}, "repeat"),
        (
            {"merge_method": "passthrough", "stack": {"min_layers": 4, "max_layers": 3}},
            "3 is less than min_layers",
        ),
    ],
)
def test_a_stack_that_makes_no_sense_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SpaceConfig.model_validate(config)
