from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.merge_rules import Parameter
from evomerge.recipe import (
    Recipe,
    parse_recipe,
    read_recipe,
    recipe_from_mapping,
)
from evomerge.settings import resolve

WEIGHT = Parameter("weight")
NORMALIZE = Parameter("normalize", kind=bool)
SHARED = Path(os.environ.get("EVOMERGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
PUBLISHED = SHARED / "published" / "llm-jp-3-13b_task_arithmetic.yaml"

# The published file in small: the same keys, order and style, invented numbers.
LIKE_PUBLISHED = """\
base_model: ../models/base_2129051778
dtype: bfloat16
merge_method: task_arithmetic
parameters:
  int8_mask: 1.0
  normalize: 0.0
slices:
- sources:
  - layer_range: [0, 2]
    model: ../models/expert_3918994333
    parameters:
      weight: 1.2951159694588346
  - layer_range: [0, 2]
    model: ../models/base_2129051778
- sources:
  - layer_range: [2, 4]
    model: ../models/expert_3918994333
    parameters:
      weight: -0.06282170464180561
  - layer_range: [2, 4]
    model: ../models/base_2129051778
"""


def without_comments(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def one_slice(**changes: object) -> dict[str, object]:
    sources = [
        {"model": "expert", "layer_range": [0, 2], "parameters": {"weight": 0.5}},
        {"model": "base", "layer_range": [0, 2]},
    ]
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": sources}],
    } | changes


def message(mapping: object) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe_from_mapping(mapping, "recipe.yaml")
    return str(caught.value)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not here")
def test_the_published_recipe_is_written_back_byte_for_byte() -> None:
    assert read_recipe(PUBLISHED).to_yaml() == without_comments(PUBLISHED.read_text())


def test_a_recipe_of_the_published_shape_is_written_back_byte_for_byte() -> None:
    assert parse_recipe(LIKE_PUBLISHED, "recipe.yaml").to_yaml() == LIKE_PUBLISHED


def test_a_recipe_survives_json() -> None:
    recipe = parse_recipe(LIKE_PUBLISHED, "recipe.yaml")
    assert recipe_from_mapping(json.loads(json.dumps(recipe.to_mapping())), "message") == recipe


def test_every_float64_survives_yaml_to_the_last_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**64, size=2000, dtype=np.uint64)
    drawn = [float(number) for number in bits.view(np.float64) if math.isfinite(number)]
    numbers = [0.0, -0.0, 1.0, 0.1, 1e-05, 1e16, 1e22, 5e-324, 1.7976931348623157e308, *drawn]
    recipe = recipe_from_mapping(
        {"merge_method": "linear", "models": [{"model": "m", "parameters": {"weight": numbers}}]},
        "made here",
    )
    again = parse_recipe(recipe.to_yaml(), "written").models
    assert again is not None
    read = again[0].parameters["weight"]
    assert isinstance(read, list)
    assert [struct.pack("d", number) for number in read] == [
        struct.pack("d", number) for number in numbers
    ]


def test_the_order_of_a_mapping_does_not_depend_on_how_it_was_written() -> None:
    keys = list(recipe_from_mapping(one_slice(dtype="float32"), "a").to_mapping())
    turned = dict(reversed(one_slice(dtype="float32").items()))
    assert list(recipe_from_mapping(turned, "b").to_mapping()) == keys


def test_long_names_and_shared_objects_are_written_plainly() -> None:
    shared = [0.1, 0.2]
    name = "a model with spaces " * 20 + "ümläut"
    mapping = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": shared}},
            {"model": "other", "parameters": {"weight": shared}},
        ],
    }
    text = recipe_from_mapping(mapping, "made here").to_yaml()
    assert yaml.safe_load(text) == mapping
    assert "&" not in text
    assert name in text


def test_models_are_named_base_first_then_as_mentioned() -> None:
    recipe = recipe_from_mapping(one_slice(), "made here")
    assert recipe.model_names() == ("base", "expert")


def test_models_are_renamed_wherever_they_stand() -> None:
    mapping = one_slice()
    assert isinstance(mapping["slices"], list)
    mapping["slices"][0]["base_model"] = "base"
    renamed = recipe_from_mapping(mapping, "a").with_models({"base": "/b", "expert": "/e"})
    assert renamed.model_names() == ("/b", "/e")
    assert "base_model: base" not in renamed.to_yaml()
    assert renamed.with_models({"/b": "base", "/e": "expert"}).to_mapping() == mapping


@pytest.mark.parametrize(
    ("setting", "depth", "value"),
    [
        (0.5, 0.7, 0.5),
        ("1e-1", 0.0, 0.1),
        (True, 0.0, 1.0),
        ("true", 0.0, 1.0),
        ([0.0, 1.0, 5.0], 0.0, 0.0),
        ([0.0, 1.0, 5.0], 0.25, 0.5),
        ([0.0, 1.0, 5.0], 0.75, 3.0),
        ([0.0, 1.0, 5.0], 1.0, 5.0),
        ([True, 0.0], 0.5, 0.5),
        ([True, False], 0.25, 0.75),
        (["1e-1", 0.3], 0.5, 0.2),
        ([7], 0.3, 7.0),
        ({"filter": "mlp", "value": 2}, 0.0, 2.0),
        ({"filter": "self_attn", "value": 2}, 0.0, None),
        ([{"filter": "self_attn", "value": 1}, {"filter": "up", "value": 2}], 0.0, 2.0),
        ([{"filter": "mlp", "value": 1}, {"filter": "up", "value": 2}], 0.0, 1.0),
        ([{"filter": "x", "value": 1}, {"value": 3}], 0.0, 3.0),
        ([{"filter": "*", "value": [1, 3]}, {"value": 3}], 0.5, 2.0),
        ([{"filter": None, "value": 4}], 0.0, 4.0),
        ([], 0.0, None),
    ],
)
def test_a_setting_is_read_as_mergekit_reads_it(
    setting: object, depth: float, value: float | None
) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    resolved = resolve([{"weight": setting}], WEIGHT, name, depth)
    assert resolved == (None if value is None else pytest.approx(value, abs=1e-15))


def test_the_first_level_that_yields_a_value_wins() -> None:
    levels = [{"weight": [{"filter": "mlp", "value": 1.0}]}, {}, {"weight": [2.0, 4.0]}]
    assert resolve(levels, WEIGHT, "mlp.up_proj", 0.5) == 1.0
    assert resolve(levels, WEIGHT, "self_attn.q_proj", 0.5) == 3.0
    assert resolve(levels, Parameter("density"), "mlp.up_proj", 0.5) is None


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        (True, True),
        (0, False),
        (1.0, True),
        ("off", False),
        ([True, False], True),
        ([1, 0.0], True),
        ([0, 0, "yes"], False),
        (None, None),
    ],
)
def test_flags_are_read_from_numbers_and_words(setting: object, flag: bool | None) -> None:
    assert resolve([{"normalize": setting}], NORMALIZE, "name", 0.9) is flag


def test_a_flag_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"normalize: 0\.5 is neither true nor false"):
        resolve([{"normalize": 0.5}], NORMALIZE, "name", 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merge_methd": "linear"}, "merge_methd: unknown key; did you mean 'merge_method'?"),
        ({"merge_method": "task_aritmetic"}, "did you mean 'task_arithmetic'?"),
        ({"parameters": {"wieght": 1}}, "unknown parameter 'wieght'; did you mean 'weight'?"),
        ({"parameters": {"weight": "abc"}}, "weight: 'abc' is not a number"),
        ({"parameters": {"weight": None}}, "weight: None is not a number"),
        ({"parameters": {"weight": [1, {"value": 2}]}}, "not both"),
        ({"parameters": {"weight": [{"fliter": "a", "value": 2}]}}, "did you mean 'filter'?"),
        ({"parameters": {"weight": {"filter": "a"}}}, "has no value"),
        ({"parameters": {"weight": {"filter": 3, "value": 1}}}, "filter 3 should be a string"),
        ({"parameters": {"weight": {"value": [[1]]}}}, "[1] is not a number"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is no dtype of a merge; one of bfloat16,"),
        ({"tokenizer_source": "base", "tokenizer": {}}, "either tokenizer_source or tokenizer"),
        ({"slices": None, "modules": {}}, "modules: should have at least 1 entry"),
        ({"models": [{"model": "a"}]}, "either models or slices"),
        ({"slices": []}, "slices: should have at least 1 entry"),
        (
            {"slices": ["a"]},
            "slices.0: should be a mapping of keys to values (sources, base_model,",
        ),
        ({"base_model": ""}, "base_model: should not be empty (given: '')"),
        ({"parameters": {3: 1}}, "parameters.3: the key 3 should be a text"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of: should be at least 1"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "zer"}}}}},
            "tokens.a.source: should be",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "modl": "e"}}}}},
            "tokenizer.tokens.a.source.modl: unknown key; did you mean 'model'?",
        ),
        (
            {"tokenizer": {"tokens": {"models": {"force": None}}}},
            "tokenizer.tokens.models.force: has no value; it should be true or false",
        ),
        ({"base_model": None}, "task_arithmetic needs a base_model"),
        ({"base_model": "other"}, "slices.0: base_model other must be one of the sources"),
        ({"merge_method": "passthrough"}, "passthrough takes exactly 1 source"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(changes: dict[str, object], said: str) -> None:
    described = message(one_slice(**changes))
    assert described.startswith("recipe.yaml: ")
    assert said in described


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"model": "e", "layer_range": [2, 2]}, "slices.0.sources.0: layer_range [2, 2] has no"),
        (
            {"model": "e", "layer_range": [-1, 2]},
            "slices.0.sources.0.layer_range: [-1, 2] should be [first, end)",
        ),
        (
            {"model": "e", "layer_range": [0, 2.5]},
            "layer_range: [0, 2.5] should be [first, end), two whole numbers",
        ),
        ({"model": "e", "layer_range": [0, 3]}, "must have as many layers; here: e [0, 3], base"),
        ({"model": "base", "layer_range": [0, 2]}, "base is listed twice"),
        ({"model": "e"}, "slices.0.sources.0.layer_range: is missing"),
        (
            {"model": "e", "layer_rnge": [0, 2]},
            "layer_rnge: unknown key; did you mean 'layer_range'",
        ),
        ({"model": {"path": "e"}, "layer_range": [0, 2]}, "slices.0.sources.0.model: "),
    ],
)
def test_a_mistake_in_a_source_is_named_by_its_place(source: dict[str, object], said: str) -> None:
    base = {"model": "base", "layer_range": [0, 2]}
    assert said in message(one_slice(slices=[{"sources": [source, base]}]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slices": None, "models": [{"modle": "e"}]}, ["models.0.model", "models.0.modle"]),
        ({"slices": [{"sources": [{"model": "e"}]}]}, ["slices.0.sources.0.layer_range"]),
        ({"slices": [{"sources": []}]}, ["slices.0.sources"]),
    ],
)
def test_a_list_with_a_wrong_item_is_not_called_too_short(
    changes: dict[str, object], said: list[str]
) -> None:
    lines = message(one_slice(**changes)).splitlines()
    assert [line.split(": ")[1] for line in lines] == said


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    lines = message(one_slice(dtype="int8", chat_template="", frobnicate=1)).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "dtype",
        "chat_template",
        "frobnicate",
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", ""])
def test_what_is_no_recipe_at_all_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^some\.yaml: "):
        parse_recipe(text, "some.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_a_recipe_cannot_be_edited() -> None:
    recipe = Recipe.model_validate(one_slice())
    with pytest.raises(ValueError, match="frozen"):
        recipe.dtype = "float32"  # type: ignore[misc]


CARDS = {
    "slerp": """
        slices:
          - sources:
              - model: mlabonne/NeuralMarcoro14-7B
                layer_range: [0, 32]
              - model: mlabonne/NeuralHermes-2.5-Mistral-7B
                layer_range: [0, 32]
            residual_weight: 0.5
        merge_method: slerp
        base_model: mlabonne/NeuralMarcoro14-7B
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
          embed_slerp: true
        dtype: bfloat16
        """,
    "dare_ties": """
        models:
          - model: mistralai/Mistral-7B-v0.1
          - model: samir-fama/SamirGPT-v1
            layer_range: [0, 32]
            parameters: {density: 0.53, weight: 0.4}
          - model: abacusai/Slerp-CM-mist-dpo
            parameters: {density: 0.53, weight: 0.3, normalize: true}
        merge_method: dare_ties
        base_model: mistralai/Mistral-7B-v0.1
        parameters: {int8_mask: true, gamma: 0.3}
        dtype: bfloat16
        tokenizer_source: union
        """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: {model: {path: a/base, revision: main}}
        models:
          - model: {model: a/one, lora: {path: a/lora, revision: v2}}
            parameters: {weight: 0.5, density: 0.3}
        chat_template: auto
        dtype: float16
        """,
    "frankenmerge": """
        dtype: float16
        merge_method: passthrough
        slices:
        - sources: [{layer_range: [0, 20], model: x/seventy}]
        - sources: [{layer_range: [10, 30], model: x/seventy}]
        """,
}


def read_with_notes(name: str, *, lenient: bool = False) -> tuple[Recipe, list[str]]:
    notes: list[str] = []
    recipe = parse_recipe(CARDS[name], "card.yaml", lenient=lenient, say=notes.append)
    return recipe, notes


def test_what_mergekit_knows_but_does_not_read_is_one_warning() -> None:
    _, notes = read_with_notes("dare_ties")
    assert notes == [
        "card.yaml: warning: without effect: layer_range under models; gamma (dare_ties does not "
        "read it); normalize of one model (dare_ties reads it for all models together)"
    ]
    _, notes = read_with_notes("task_arithmetic")
    assert notes == [
        "card.yaml: warning: without effect: density (task_arithmetic does not read it)"
    ]


def test_a_recipe_without_dead_parts_has_no_warning() -> None:
    assert read_with_notes("frankenmerge")[1] == []


def test_what_nobody_knows_is_an_error_unless_lenient() -> None:
    with pytest.raises(ConfigError, match=r"card\.yaml: parameters: unknown parameter 'embed_sle"):
        read_with_notes("slerp")
    recipe, notes = read_with_notes("slerp", lenient=True)
    assert "embed_slerp" not in recipe.to_yaml()
    assert notes == [
        "card.yaml: warning: without effect: residual_weight under slices; unknown parameter "
        "embed_slerp"
    ]


def test_lenient_drops_unknown_keys_on_every_level() -> None:
    mapping = one_slice(
        comment="x",
        tokenizer={"source": "union", "surprise": 1},
        slices=[{"sources": [{"model": "base", "layer_range": [0, 1], "hue": 3}], "name": "first"}],
    )
    notes: list[str] = []
    recipe = recipe_from_mapping(mapping, "r.yaml", lenient=True, say=notes.append)
    assert notes == [
        "r.yaml: warning: without effect: unknown key slices.0.sources.0.hue; unknown key "
        "slices.0.name; unknown key comment; unknown key tokenizer.surprise"
    ]
    assert recipe == recipe_from_mapping(recipe.to_mapping(), "again")


def test_models_written_as_objects_become_names() -> None:
    recipe, _ = read_with_notes("task_arithmetic")
    assert recipe.model_names() == ("a/base@main", "a/one+a/lora@v2")


def test_models_of_a_tokenizer_are_found_and_renamed_with_the_others() -> None:
    recipe = recipe_from_mapping(
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": 1}}],
            "tokenizer": {
                "source": "b",
                "tokens": {
                    "model": {"source": "c", "force": True},
                    "base": {"source": {"kind": "model_token", "model": "a", "token": "x"}},
                    "z": {"source": {"kind": "zero"}},
                },
            },
        },
        "r.yaml",
    )
    assert recipe.references() == ("a", "b", "c")
    renamed = recipe.with_models({"a": "/a", "b": "/b", "c": "/c"})
    assert renamed.references() == ("/a", "/b", "/c")
    assert renamed.tokenizer is not None
    assert list(renamed.tokenizer.tokens) == ["model", "base", "z"]
    union = recipe_from_mapping(
        {
            "merge_method": "linear",
            "models": [{"model": "union", "parameters": {"weight": 1}}],
            "tokenizer_source": "union",
        },
        "r.yaml",
    )
    assert union.with_models({"union": "/folder"}).tokenizer_source == "union"
    named = recipe_from_mapping(union.to_mapping() | {"tokenizer_source": "model:a/b"}, "r.yaml")
    assert named.tokenizer_models() == ("a/b",)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("ties", {"density": 1.5}, "parameters.density: 1.5 should be in [0, 1]"),
        ("ties", {"density": [0.5, -0.1]}, "parameters.density: -0.1 should be in [0, 1]"),
        ("ties", {"normalize": 0.5}, "parameters.normalize: 0.5 is neither true nor false"),
        ("karcher", {"max_iter": 2.5}, "parameters.max_iter: 2.5 should be a whole number"),
        ("karcher", {"tol": -1}, "parameters.tol: -1 should be at least 0"),
        ("ties", {"weight": []}, "weight: [] is a gradient without numbers"),
        ("ties", {"weight": {"value": []}}, "weight: [] is a gradient without numbers"),
        ("breadcrumbs", {"gamma": 2}, "parameters.gamma: 2 should be in [0, 1]"),
        ("ties", {"weight": 10**400}, "is not a number"),
    ],
)
def test_numbers_of_the_wrong_kind_or_range_are_refused(
    method: str, parameters: dict[str, object], said: str
) -> None:
    mapping = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 1.0} | parameters,
    }
    described = message(mapping)
    assert said in described
    assert described.startswith("recipe.yaml: ")


@pytest.mark.parametrize(
    ("method", "models", "said"),
    [
        ("slerp", ["a", "b"], "slerp takes exactly 1 model beside the base; here there are 2"),
        ("slerp", [], "models: should have at least 1 entry"),
        ("nuslerp", ["a"], "nuslerp takes exactly 2 models beside the base; here there are 1"),
        ("model_stock", ["a", "base"], "takes at least 2 models beside the base; here there are 1"),
        ("passthrough", ["a", "b"], "passthrough takes exactly 1 model; here there are 2"),
        ("arcee_fusion", ["base"], "exactly 1 model beside the base; here there are 0"),
    ],
)
def test_methods_say_how_many_models_they_take(method: str, models: list[str], said: str) -> None:
    mapping = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in models],
        "parameters": {"t": 0.5, "weight": 1.0},
    }
    assert said in message(mapping)


def test_a_module_is_what_it_holds_with_parameters_of_its_own() -> None:
    mapping = one_slice()
    module = {"slices": mapping.pop("slices"), "parameters": {"weight": 0.25}}
    recipe = recipe_from_mapping(mapping | {"modules": {"default": module}}, "recipe.yaml")
    assert recipe.model_names() == ("base", "expert")
    ((place, body),) = recipe.bodies()
    assert (place, body.parameters) == ("modules.default.", {"weight": 0.25})
    assert recipe_from_mapping(recipe.to_mapping(), "again") == recipe


def test_every_model_is_named_by_the_key_where_it_stands_first() -> None:
    recipe = recipe_from_mapping(
        {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 1]}]},
                {"sources": [{"model": name, "layer_range": [0, 1]} for name in ("a", "b")]},
            ],
            "tokenizer": {"source": "c", "tokens": {"x": {"source": "d"}}},
            "parameters": {"weight": 1},
        },
        "recipe.yaml",
    )
    assert recipe.places() == {
        "a": "slices.0.sources.0.model",
        "b": "slices.1.sources.1.model",
        "c": "tokenizer.source",
        "d": "tokenizer.tokens",
    }
