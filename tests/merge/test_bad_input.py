"""Recipes that cannot be merged: each mistake named with its place and what would be right."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.inputs import InputModels
from evomerge.recipe import parse_recipe
from evomerge.report.export import merge_recipe
from tests import tiny
from tests.golden.inputs import write_inputs

TIES = """
merge_method: ties
base_model: base
models: [{model: first, parameters: {weight: 0.5, density: DENSITY}}]
"""
SLICES = """
merge_method: linear
parameters: {weight: 1}
slices:
- sources: [{model: base, layer_range: [0, 2]}, {model: first, layer_range: FIRST}]
- sources: [{model: base, layer_range: SECOND}]
"""
MODELS = """
merge_method: linear
models: [{model: base, parameters: {weight: 1}}, {model: OTHER, parameters: {weight: 1}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the recorded merges, and some that do not fit them."""
    folder = tmp_path_factory.mktemp("models")
    write_inputs(folder)
    for name in ("more_words", "other_inner", "other_heads"):
        tiny.variant(folder / "base", folder / name, seed=1)
    tiny.rewrite(folder / "more_words", more_words)
    inner = "model.layers.2.mlp.up_proj.weight"
    tiny.rewrite(folder / "other_inner", lambda t: t.update({inner: t[inner][:4].clone()}))
    tiny.edit_config(folder / "other_heads", num_attention_heads=4)
    (folder / "deeper").mkdir()
    (folder / "untokenized").mkdir()
    merge("merge_method: passthrough\nslices:\n" + 2 * _SLICE, folder, folder / "deeper/model")
    for file in ("config.json", "model.safetensors"):
        (folder / "untokenized" / file).symlink_to(folder / "base" / file)
    return folder


def more_words(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])


_SLICE = "- sources: [{model: base, layer_range: [0, 3]}]\n"


def merge(text: str, folder: Path, out: Path, *, lenient: bool = False) -> list[str]:
    """Merges a recipe; returns what it warned of."""
    warnings: list[str] = []
    recipe = parse_recipe(dedent(text), "recipe.yaml", lenient=lenient, say=warnings.append)
    inputs = InputModels(out.with_name("storage"), folder=folder, hub_seconds=0.01)
    merge_recipe(recipe, out, inputs, verbatim=text)
    return warnings


BAD = {
    "an empty gradient": (TIES.replace("DENSITY", "[]"), ["density", "at least one"]),
    "a density above 1": (TIES.replace("DENSITY", "1.2"), ["density: 1.2 should be in [0, 1]"]),
    "a density below 0": (TIES.replace("DENSITY", "[0.5, -0.1]"), ["density: -0.1", "in [0, 1]"]),
    "a density that is none": (TIES.replace("DENSITY", ".nan"), ["density: nan should be in"]),
    "a range that ends behind the model": (
        SLICES.replace("FIRST", "[2, 4]").replace("SECOND", "[3, 9]"),
        ["slices.1: layer_range [3, 9] exceeds", "base, which has 4 layers (0–3)"],
    ),
    "two ranges that do": (
        SLICES.replace("FIRST", "[3, 5]").replace("SECOND", "[3, 9]"),
        ["slices.0: layer_range [3, 5] exceeds", "slices.1: layer_range [3, 9] exceeds"],
    ),
    "a range without layers": (
        SLICES.replace("FIRST", "[1, 3]").replace("SECOND", "[2, 2]"),
        ["slices.1.sources.0: layer_range [2, 2] has no layers; write [first, end)"],
    ),
    "ranges of different lengths": (
        SLICES.replace("FIRST", "[1, 4]").replace("SECOND", "[0, 1]"),
        ["slices.0: all sources of a slice must have as many layers; here: base [0, 2], first [1"],
    ),
    "models of different depth": (
        MODELS.replace("OTHER", "deeper/model"),
        ["models: the numbers of layers differ: 4 in ", "base, 6 in ", "use slices"],
    ),
    "vocabularies of different size": (
        MODELS.replace("OTHER", "more_words"),
        ["models: model.embed_tokens.weight has different shapes: [10, 8] in", "tokenizer_source"],
    ),
    "other shapes": (
        MODELS.replace("OTHER", "other_inner"),
        ["models: model.layers.2.mlp.up_proj.weight has different shapes: [12, 8] in", "[4, 8] in"],
    ),
    "another architecture": (
        MODELS.replace("OTHER", "qwen_first"),
        ["config.json: architectures: ['Qwen2ForCausalLM'], but", "['LlamaForCausalLM']; models"],
    ),
    "the same architecture with other heads": (
        MODELS.replace("OTHER", "other_heads"),
        ["config.json: num_attention_heads: 4, but", "base has 2; models of one architecture"],
    ),
    "a model without a tokenizer": (MODELS.replace("OTHER", "untokenized"), ["no tokenizer (one"]),
    "a model that is listed twice": (
        MODELS.replace("OTHER", "base"),
        ["models: base is listed twice; once is enough"],
    ),
    "a missing weight": (
        "merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}, {model: first}]",
        ["models: ", "first has no weight for model.embed_tokens.weight"],
    ),
    "missing weights of two slices": (
        SLICES.replace("FIRST", "[1, 3]").replace("SECOND", "[0, 1]").replace("weight: 1", ""),
        ["slices.0: ", "slices.1: ", "base has no weight for model.layers.0."],
    ),
    "a weight that no filter gives": (
        MODELS.replace("OTHER", "first").replace(
            "weight: 1}}]", "weight: {filter: mlp, value: 1}}}]"
        ),
        ["first has no weight for model.embed_tokens.weight"],
    ),
    "a missing base": (
        "merge_method: ties\nmodels: [{model: first, parameters: {weight: 1}}]",
        ["ties needs a base_model"],
    ),
    "too many models": (
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
        "models: [{model: first}, {model: second}]",
        ["models: slerp takes exactly 1 model beside the base; here there are 2"],
    ),
    "models and slices": (
        SLICES.replace("FIRST", "[1, 3]").replace("SECOND", "[0, 1]") + "models: [{model: base}]",
        ["either models or slices"],
    ),
    "a short dtype": (
        MODELS.replace("OTHER", "first") + "dtype: bf16\n",
        ["dtype: 'bf16' is no dtype of a merge", "did you mean 'bfloat16'?"],
    ),
    "an unknown module": (
        "merge_method: passthrough\nmodules: {defualt: {models: [{model: base}]}}",
        ["modules.defualt: there is no such module", "default"],
    ),
    "mistakes of four kinds at once": (
        "merge_mehtod: linear\nmodels: [{modle: base}]\ndtype: fp16\nparameters: {wieght: 1}\n",
        ["'merge_method'", "models.0.modle: unknown key", "'float16'", "'weight'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_what_would_be_right(
    case: str, folder: Path, tmp_path: Path
) -> None:
    text, said = BAD[case]
    with pytest.raises((ConfigError, CandidateError)) as caught:
        merge(text, folder, tmp_path / "out")
    assert [words for words in said if words not in str(caught.value)] == [], str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_are_dropped_by_the_lenient_and_told(folder: Path, tmp_path: Path) -> None:
    text = MODELS.replace("OTHER", "first") + "merge_mehtod: ties\nparameters: {wieght: 3}\n"
    with pytest.raises(ConfigError, match=r"(?s)wieght.*merge_mehtod"):
        merge(text, folder, tmp_path / "strict")
    (warning,) = merge(text, folder, tmp_path / "lenient", lenient=True)
    assert "merge_mehtod" in warning
    assert "wieght" in warning
    merge(MODELS.replace("OTHER", "first"), folder, tmp_path / "plain")
    lenient, plain = (tiny.read_tensors(tmp_path / name) for name in ("lenient", "plain"))
    assert all((lenient[name] == tensor).all() for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("conditions", "unread"),
    [
        ("[{filter: mlp, value: 1}, {value: 2}]", None),
        ("[{value: 2}, {filter: mlp, value: 1}]", "filter 'mlp' (the one with no filter comes"),
        ("[{filter: '*', value: 2}, {value: 1}]", "no filter (the one with no filter comes"),
        (
            "[{filter: mlp, value: 1}, {filter: mlp.up, value: 2}, {value: 3}]",
            "filter 'mlp.up' (the one with filter 'mlp' comes before)",
        ),
    ],
)
def test_conditions_that_no_tensor_reaches_are_told(
    conditions: str, unread: str | None, folder: Path, tmp_path: Path
) -> None:
    text = MODELS.replace("OTHER", "first").replace("weight: 1}}]", f"weight: {conditions}}}}}]")
    warnings = merge(text, folder, tmp_path / "out")
    assert len(warnings) == (unread is not None)
    assert unread is None or f"models.1.parameters.weight: the value with {unread}" in warnings[0]
