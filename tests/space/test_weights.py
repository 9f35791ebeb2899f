from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from evomerge.errors import ConfigError
from evomerge.recipe import parse_recipe, read_recipe
from evomerge.space import SearchSpace, SpaceConfig

SHARED = Path(os.environ.get("EVOMERGE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PUBLISHED = SHARED / "published" / "llm-jp-3-13b_task_arithmetic.yaml"


def space(
    models: tuple[str, ...] = ("/models/first", "/models/second"),
    num_layers: int = 6,
    **config: object,
) -> SearchSpace:
    return SearchSpace.build(
        SpaceConfig.model_validate(config),
        base_model="/models/base",
        models=models,
        num_layers=num_layers,
        dtype="bfloat16",
    )


def shuffled(searched: SearchSpace, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).uniform(searched.low, searched.high)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not here")
def test_the_published_recipe_is_a_genome_and_made_from_it_again() -> None:
    recipe = read_recipe(PUBLISHED)
    base, expert = recipe.model_names()
    searched = SearchSpace.build(
        SpaceConfig(layer_granularity=2),
        base_model=base,
        models=[expert],
        num_layers=40,
        dtype="bfloat16",
    )
    genome = searched.encode(recipe)
    assert genome.shape == (20,)
    assert genome[0] == 1.2951159694588346
    published = "".join(
        line for line in PUBLISHED.read_text().splitlines(keepends=True) if not line.startswith("#")
    )
    assert searched.decode(genome).to_yaml() == published


def test_the_preset_is_the_search_that_the_published_recipe_came_from() -> None:
    preset = Path(__file__).parents[2] / "search_spaces" / "llm-jp-3-13b-task-arithmetic.yaml"
    study = yaml.safe_load(preset.read_text())
    searched = SearchSpace.build(
        SpaceConfig.model_validate(study["search_space"]),
        base_model=study["base_model"],
        models=study["models"],
        num_layers=40,
        dtype=study["engine"]["dtype"],
    )
    assert searched.dimension == 20
    recipe = searched.decode(searched.uniform(1.2951159694588346))
    assert recipe.slices is not None
    assert [source.layer_range for source in recipe.slices[19].sources] == [(38, 40), (38, 40)]
    assert recipe.slices[0].sources[0].parameters == {"weight": 1.2951159694588346}


def test_a_recipe_has_exactly_the_published_shape() -> None:
    searched = space(models=("/models/first",), num_layers=4, layer_granularity=2)
    assert searched.decode([0.25, 1.0]).to_yaml() == (
        "base_model: /models/base\n"
        "dtype: bfloat16\n"
        "merge_method: task_arithmetic\n"
        "parameters:\n"
        "  int8_mask: 1.0\n"
        "  normalize: 0.0\n"
        "slices:\n"
        "- sources:\n"
        "  - layer_range: [0, 2]\n"
        "    model: /models/first\n"
        "    parameters:\n"
        "      weight: 0.25\n"
        "  - layer_range: [0, 2]\n"
        "    model: /models/base\n"
        "- sources:\n"
        "  - layer_range: [2, 4]\n"
        "    model: /models/first\n"
        "    parameters:\n"
        "      weight: 1.0\n"
        "  - layer_range: [2, 4]\n"
        "    model: /models/base\n"
    )


def test_genes_run_over_slices_then_models_then_groups() -> None:
    searched = space(layer_granularity=3, filters=["self_attn", "mlp"])
    assert searched.dimension == 12
    assert searched.genes[:4] == (
        "layers 0-3 | first | self_attn",
        "layers 0-3 | first | mlp",
        "layers 0-3 | first | rest",
        "layers 0-3 | second | self_attn",
    )
    assert searched.genes[-1] == "layers 3-6 | second | rest"
    recipe = searched.decode(np.arange(12) / 10)
    assert recipe.slices is not None
    assert recipe.slices[1].sources[0].parameters["weight"] == [
        {"filter": "self_attn", "value": 0.6},
        {"filter": "mlp", "value": 0.7},
        {"value": 0.8},
    ]


def test_models_of_the_same_folder_name_are_told_apart() -> None:
    searched = space(models=("/a/expert", "/b/expert"))
    assert searched.genes == ("layers 0-6 | /a/expert", "layers 0-6 | /b/expert")


@pytest.mark.parametrize("granularity", [{}, {"layer_granularity": 0}, {"layer_granularity": 6}])
def test_without_a_granularity_all_layers_are_one_slice(granularity: dict[str, int]) -> None:
    assert space(**granularity).genes == ("layers 0-6 | first", "layers 0-6 | second")


@pytest.mark.parametrize(
    "config",
    [
        {"layer_granularity": 1},
        {"layer_granularity": 2, "filters": ["self_attn"]},
        {"merge_method": "linear", "layer_granularity": 3},
        {"merge_method": "linear", "filters": ["mlp", "norm"], "weight": [-3, 3]},
    ],
)
def test_encoding_is_the_exact_inverse_of_decoding(config: dict[str, object]) -> None:
    searched = space(**config)
    for seed in range(20):
        genome = shuffled(searched, seed)
        recipe = searched.decode(genome)
        assert searched.encode(recipe).tolist() == genome.tolist()
        assert searched.encode(parse_recipe(recipe.to_yaml(), "again")).tolist() == genome.tolist()


def test_decoding_clips_to_the_bounds_and_changes_nothing_else() -> None:
    searched = space(weight=[-0.5, 2.0], layer_granularity=3)
    recipe = searched.decode([-9.0, 0.1 + 0.2, 2.0000001, 1.0])
    assert searched.encode(recipe).tolist() == [-0.5, 0.30000000000000004, 2.0, 1.0]


def test_the_uniform_genome_gives_every_model_the_same_weight() -> None:
    searched = space(layer_granularity=2)
    assert searched.uniform(1 / 2).tolist() == [0.5] * 6


def test_bounds_depend_on_the_method() -> None:
    assert (space().low[0], space().high[0]) == (-0.5, 2.0)
    linear = space(merge_method="linear")
    assert (linear.low[0], linear.high[0]) == (0.0, 1.0)


def test_a_linear_recipe_normalizes_and_has_the_base_only_where_it_is_a_model() -> None:
    without = space(merge_method="linear").decode([0.2, 0.4])
    assert without.parameters == {"normalize": 1.0}
    assert without.slices is not None
    assert [source.model for source in without.slices[0].sources] == [
        "/models/first",
        "/models/second",
    ]
    among = space(models=("/models/base", "/models/first"), merge_method="linear")
    assert among.dimension == 2
    assert among.decode([0.2, 0.4]).model_names() == ("/models/base", "/models/first")


def test_a_recipe_of_another_space_has_no_genome() -> None:
    searched = space(layer_granularity=2)
    recipe = searched.decode(searched.uniform(1.5))
    for other in (
        space(layer_granularity=3),
        space(layer_granularity=2, merge_method="linear"),
        space(layer_granularity=2, weight=[-1, 1]),
        space(layer_granularity=2, models=("/models/second", "/models/first")),
    ):
        with pytest.raises(ConfigError, match="not one of this search space"):
            other.encode(recipe)


def test_a_granularity_that_does_not_divide_the_layers_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"4 does not divide the 6 layers .*; 1, 2, 3, 6 would"):
        space(layer_granularity=4)


def test_a_genome_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 2 genes, not 3"):
        space().decode([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((), "is empty"),
        (("/m/a", "/m/a"), "/m/a is listed twice"),
        (("/models/base", "/m/a"), "/models/base is the base_model too"),
    ],
)
def test_models_that_make_no_search_are_refused(models: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space(models=models)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"weight": [2.0, -0.5]}, r"weight: \[2.0, -0.5\] should be \[low, high\]"),
        ({"weight": [1.0, 1.0]}, "should be"),
        ({"weight": [0.0, float("inf")]}, "should be"),
        ({"layer_granularity": -1}, "greater than or equal to 0"),
        ({"filters": ["mlp", "mlp"]}, "names one twice"),
        ({"merge_method": "tie"}, "unknown merge method 'tie'; did you mean 'ties'"),
        ({"layer_granularty": 2}, "layer_granularty"),
    ],
)
def test_a_wrong_search_space_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SpaceConfig.model_validate(config)
