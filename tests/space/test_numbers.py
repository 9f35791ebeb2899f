"""Search spaces over every method of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from evomerge.errors import ConfigError
from evomerge.merge_rules import METHODS
from evomerge.recipe import Recipe, recipe_from_mapping
from evomerge.space import Genome, SearchSpace, SpaceConfig

TWO = ("/models/first", "/models/second")
# What a method needs in a file, where it has nothing to search of its own.
BOUNDS: dict[str, dict[str, Any]] = {
    "karcher": {"tol": {"low": 1e-6, "high": 1e-3, "log": True}},
    "ram": {"epsilon": [0.0, 1e-3]},
    "passthrough": {"scale": [0.5, 1.5]},
}
NOTHING = {"model_stock", "arcee_fusion"}
SEARCHABLE = sorted(METHODS.keys() - NOTHING)
SHAPES: list[dict[str, Any]] = [
    {},
    {"layer_granularity": 2},
    {"layer_granularity": 3, "filters": ["self_attn", "mlp"]},
    {"layer_granularity": 2, "smooth": True},
    {"layer_granularity": 2, "filters": ["self_attn"], "smooth": True},
]


def space(models: tuple[str, ...] = TWO, num_layers: int = 6, **config: Any) -> SearchSpace:
    return SearchSpace.build(
        SpaceConfig.model_validate(config),
        base_model="/models/base",
        models=models,
        num_layers=num_layers,
        dtype="bfloat16",
    )


def space_of(method: str, **config: Any) -> SearchSpace:
    """A space over as many models as the method takes."""
    _, most = METHODS[method].inputs
    models = TWO[: most or 2]
    return space(models, merge_method=method, **{**BOUNDS.get(method, {}), **config})


def drawn(searched: SearchSpace, seed: int) -> Genome:
    """A genome in and somewhat outside of the bounds."""
    wide = 0.2 * (searched.high - searched.low)
    return np.random.default_rng(seed).uniform(searched.low - wide, searched.high + wide)


def plain_levels(recipe: Recipe) -> list[tuple[str, object]]:
    """(parameter, setting) of every level of a recipe."""
    levels = [recipe.parameters]
    for part in recipe.slices or ():
        levels += [part.parameters, *(source.parameters for source in part.sources)]
    levels += [model.parameters for model in recipe.models or ()]
    return [(name, setting) for level in levels for name, setting in level.items()]


@pytest.mark.parametrize("shape", SHAPES, ids=["whole", "slices", "filters", "smooth", "both"])
@pytest.mark.parametrize("method", SEARCHABLE)
def test_any_genome_is_a_valid_recipe_and_comes_back_clipped(
    method: str, shape: dict[str, Any]
) -> None:
    searched = space_of(method, **shape)
    for seed in range(5):
        genome = drawn(searched, seed)
        clipped = searched.clip(genome)
        recipe = searched.decode(genome)
        said: list[str] = []
        again = recipe_from_mapping(recipe.to_mapping(), "recipe", say=said.append)
        assert said == [] or "int8_mask" in said[0]
        assert searched.encode(again).tolist() == clipped.tolist()
        assert searched.clip(clipped).tolist() == clipped.tolist()
        assert (searched.low <= clipped).all()
        assert (clipped <= searched.high).all()
        for name, _ in plain_levels(recipe):
            assert METHODS[method].parameter(name) or name in METHODS[method].ignored


@pytest.mark.parametrize("method", SEARCHABLE)
def test_there_is_a_gene_for_each_slice_model_group_and_number(method: str) -> None:
    searched = space_of(method, layer_granularity=2, filters=["mlp"])
    assert isinstance(searched.config, SpaceConfig)
    numbers = searched.config.searched
    own = sum(one.parameter.own for one in numbers)
    shared = len(numbers) - own
    assert searched.dimension == 3 * 2 * (len(searched.models) * own + shared)
    assert len(set(searched.genes)) == searched.dimension
    searched_by_table = {one.name for one in METHODS[method].parameters if one.searched}
    assert {one.name for one in numbers} == searched_by_table | BOUNDS.get(method, {}).keys()


def test_genes_run_over_slices_models_groups_and_numbers_and_those_shared_come_last() -> None:
    searched = space(
        merge_method="ties",
        layer_granularity=3,
        filters=["mlp"],
        density={"per": "model"},
        **{"lambda": [0.5, 1.5]},
    )
    assert searched.genes[:7] == (
        "layers 0-3 | first | mlp | weight",
        "layers 0-3 | first | rest | weight",
        "layers 0-3 | second | mlp | weight",
        "layers 0-3 | second | rest | weight",
        "layers 0-3 | mlp | lambda",
        "layers 0-3 | rest | lambda",
        "layers 3-6 | first | mlp | weight",
    )
    assert searched.genes[-2:] == ("first | density", "second | density")
    recipe = searched.decode(np.arange(14) / 20 + 0.1)
    assert recipe.slices is not None
    assert [source.model for source in recipe.slices[1].sources] == [*TWO, "/models/base"]
    assert recipe.slices[1].sources[1].parameters == {
        "weight": [{"filter": "mlp", "value": 8 / 20 + 0.1}, {"value": 9 / 20 + 0.1}],
        "density": 13 / 20 + 0.1,
    }
    assert recipe.slices[0].parameters == {
        "lambda": [{"filter": "mlp", "value": 0.5}, {"value": 0.5}]
    }


def test_a_global_number_stands_once_and_fixed_ones_beside_it() -> None:
    searched = space(
        merge_method="dare_ties",
        layer_granularity=2,
        density={"low": 0.3, "high": 0.9, "per": "global"},
        rescale=False,
        **{"lambda": 0.8},
    )
    assert searched.dimension == 3 * 2 + 1
    assert searched.genes[-1] == "density"
    recipe = searched.decode([*[0.5] * 6, 0.7])
    assert recipe.parameters == {"density": 0.7, "rescale": False, "lambda": 0.8}
    assert recipe.slices is not None
    assert recipe.slices[0].sources[0].parameters == {"weight": 0.5}


def test_smooth_has_an_anchor_for_each_slice() -> None:
    searched = space(merge_method="ties", layer_granularity=2, smooth=True, density=0.5)
    assert searched.dimension == 6
    recipe = searched.decode([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert recipe.models is not None
    assert recipe.slices is None
    assert [(model.model, model.parameters) for model in recipe.models] == [
        ("/models/first", {"weight": [0.1, 0.3, 0.5]}),
        ("/models/second", {"weight": [0.2, 0.4, 0.6]}),
        ("/models/base", {}),
    ]


def test_smooth_linear_leaves_out_a_base_that_is_not_among_the_models() -> None:
    # Under `models:` it would be one more input.
    recipe = space(merge_method="linear", smooth=True).decode([0.2, 0.8])
    assert recipe.model_names() == TWO
    among = space(("/models/base", "/models/first"), merge_method="linear", smooth=True)
    assert among.decode([0.2, 0.8]).base_model == "/models/base"


def test_slerp_goes_from_the_base_to_the_one_model_from_the_middle_on() -> None:
    searched = space(TWO[:1], merge_method="slerp", layer_granularity=3, filters=["mlp"])
    assert searched.genes[0] == "layers 0-3 | mlp | t"
    assert searched.start.tolist() == [0.5] * 4
    recipe = searched.uniform_recipe()
    assert recipe.base_model == "/models/base"
    assert recipe.slices is not None
    assert recipe.slices[0].parameters == {"t": [{"filter": "mlp", "value": 0.5}, {"value": 0.5}]}


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
def test_a_method_of_two_refuses_more_models(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} merges exactly 1 model beside the base, not"):
        space(merge_method=method)


def test_spherical_methods_measure_from_the_base_unless_it_is_a_model() -> None:
    from_base = space(merge_method="multislerp").decode([0.5, 0.5])
    assert from_base.base_model == "/models/base"
    assert from_base.model_names() == ("/models/base", *TWO)
    among = space(("/models/base", "/models/first"), merge_method="multislerp")
    assert among.decode([0.5, 0.5]).base_model is None


def test_a_search_starts_where_the_file_or_the_method_says() -> None:
    searched = space(
        TWO[:1],
        merge_method="della",
        layer_granularity=6,
        weight={"start": 0.9},
        density=[0.2, 0.8],
        epsilon=[0.01, 0.1],
    )
    assert dict(zip(searched.genes, searched.start, strict=True)) == {
        "layers 0-6 | first | weight": 0.9,
        "layers 0-6 | first | density": 0.8,
        "layers 0-6 | first | epsilon": 0.1,
    }
    assert searched.logarithmic.tolist() == [False, False, True]
    assert searched.steps.tolist() == pytest.approx([1.0, 0.6 / 2.5, np.log(10) / 2.5])
    uniform = searched.uniform_recipe()
    assert uniform.slices is not None
    assert uniform.slices[0].sources[0].parameters["weight"] == 1.0


def test_a_logarithmic_number_without_a_default_starts_at_its_geometric_middle() -> None:
    searched = space(TWO[:1], merge_method="nearswap")
    assert searched.start.tolist() == pytest.approx([1e-3])
    assert searched.logarithmic.all()
    linear = space(TWO[:1], merge_method="nearswap", t={"low": 0.1, "high": 0.3, "log": False})
    assert linear.start.tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("smooth", [False, True])
def test_della_never_asks_for_a_probability_outside_0_and_1(smooth: bool) -> None:
    searched = space(merge_method="della", layer_granularity=3, smooth=smooth)
    names = [gene.rsplit(" | ", 1)[1] for gene in searched.genes]
    places = {name: [at for at, one in enumerate(names) if one == name] for name in set(names)}
    for seed in range(200):
        clipped = searched.clip(drawn(searched, seed))
        density, epsilon = clipped[places["density"]], clipped[places["epsilon"]]
        assert (density - epsilon > 0).all()
        assert (density + epsilon < 1).all()


def test_della_with_a_fixed_epsilon_keeps_densities_away_from_the_ends() -> None:
    searched = space(TWO[:1], merge_method="della", weight=1.0, epsilon=0.15)
    assert searched.decode([1.0]).slices is not None
    assert 0.84 < searched.clip([1.0])[0] < 0.85
    assert searched.clip([0.1])[0] > 0.15
    with pytest.raises(ValidationError, match=r"with an epsilon of 0\.15 some density must lie"):
        space(merge_method="della", density=[0.9, 1.0], epsilon=0.15)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"merge_method": "karcher"}, "karcher has nothing to search here: give one of tol bounds"),
        ({"merge_method": "arcee_fusion"}, "arcee_fusion has no numbers that could be searched"),
        ({"merge_method": "model_stock"}, "model_stock has no numbers that could be searched"),
        ({"merge_method": "passthrough"}, r"passthrough has nothing to search but stack:"),
        ({"merge_method": "ties", "density": [0.1, 1.5]}, r"not within \[0\.0, 1\.0\], its range"),
        ({"merge_method": "ties", "density": 1.5}, r"density: 1\.5 is outside \[0\.0, 1\.0\]"),
        ({"merge_method": "ties", "gamma": 0.1}, "gamma: ties does not read it; it has weight, "),
        ({"density": [0.1, 0.9]}, "density: task_arithmetic does not read it"),
        ({"merge_method": "ties", "normalize": [0, 1]}, "normalize: is a flag, which is not"),
        ({"merge_method": "ties", "normalize": 0.5}, "0.5 is neither true nor false"),
        ({"merge_method": "karcher", "max_iter": [1, 5]}, "max_iter: is a count"),
        ({"merge_method": "karcher", "max_iter": 1.5}, "1.5 is no whole number"),
        ({"lambda": {"log": True}}, "lambda: has no usual bounds"),
        ({"weight": {"low": -1, "high": 1, "log": True}}, "log needs bounds of at least 1e-30"),
        ({"weight": {"low": -1}}, "low and high belong together"),
        ({"weight": {"start": 7}}, r"start: 7\.0 is not within \[-0\.5, 2\.0\]"),
        ({"weight": {"lwo": 1}}, "lwo"),
        ({"weight": [1, 2, 3]}, r"\[1, 2, 3\] should be \[low, high\]"),
        ({"weight": "much"}, "'much' is neither"),
        ({"merge_method": "sce", "select_topk": {"per": "model"}}, "models do not have their own"),
        ({"weight": 1.0}, "task_arithmetic has nothing to search here: give one of weight, lambda"),
        ({"numbers": {"weight": 1}}, "unknown key 'numbers'"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SpaceConfig.model_validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"merge_method": "ties", "weight": [-1.0, 1.0], "density": {"start": 0.5, "per": "model"}},
        {"merge_method": "passthrough", "stack": {"repeats": 2, "scale": [0.5, 1.5], "block": 2}},
        {"merge_method": "dare_linear", "lambda": {"low": 0.1, "high": 10.0, "log": True}},
        {"merge_method": "ties", "normalize": True, "weight": 0.5, "smooth": True},
    ],
)
def test_a_space_is_read_again_from_what_it_says_of_itself(config: dict[str, Any]) -> None:
    read = SpaceConfig.model_validate(config)
    plain = read.model_dump(mode="json")
    assert SpaceConfig.model_validate(plain) == read
