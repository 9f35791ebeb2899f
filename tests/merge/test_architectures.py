"""Any decoder with regular layer names merges, and loads again: nothing lost, nothing left over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from evomerge.errors import ConfigError
from evomerge.merge.materialize import materialize
from evomerge.recipe import recipe_from_mapping
from tests import tiny
from tests.merge import decoders

WEIGHTS = (0.7, -0.4)
STACK = [(0, 3), (1, 4)]  # layers 1 and 2 twice


@pytest.fixture(scope="module", params=sorted(decoders.CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models base, one and two of an architecture, in float32."""
    directory = tmp_path_factory.mktemp(request.param)
    base = decoders.write(directory / "base", request.param)
    for seed, name in enumerate(("one", "two")):
        tiny.variant(base, directory / name, seed=seed, scale=0.03)
    return directory


def merged(family: Path, out: Path, dtype: str) -> Path:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "models": [
            {"model": str(family / name), "parameters": {"weight": weight}}
            for name, weight in zip(("one", "two"), WEIGHTS, strict=True)
        ],
        "dtype": dtype,
    }
    return materialize(recipe_from_mapping(recipe, "recipe"), out)


def exact_state(family: Path) -> dict[str, torch.Tensor]:
    """base + Σ weight · (tuned − base) in float64, of the models as transformers loads them."""
    base, *tuned = (
        {
            name: tensor.double()
            for name, tensor in decoders.load(family / model).state_dict().items()
        }
        for model in ("base", "one", "two")
    )
    return {
        name: tensor
        + sum(weight * (state[name] - tensor) for weight, state in zip(WEIGHTS, tuned, strict=True))
        for name, tensor in base.items()
    }


def test_a_merge_says_what_the_exact_merge_says(family: Path, tmp_path: Path) -> None:
    out = decoders.load(merged(family, tmp_path / "out", "float32"))
    state = exact_state(family)
    exact = decoders.load(family / "base")  # in float32: experts have no float64 on the CPU
    exact.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    for name, tensor in out.state_dict().items():
        torch.testing.assert_close(tensor, state[name].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(decoders.logits(out), decoders.logits(exact), rtol=1e-4, atol=1e-4)
    assert out.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[1] > 3


def test_a_merge_in_bfloat16_is_the_exact_one_rounded_once(family: Path, tmp_path: Path) -> None:
    out = decoders.load(merged(family, tmp_path / "out", "bfloat16"), dtype=torch.bfloat16)
    exact = exact_state(family)
    numbers = equal = 0
    for name, tensor in out.state_dict().items():
        numbers += tensor.numel()
        equal += int((tensor == exact[name].to(tensor.dtype)).sum())
    assert equal / numbers > 0.999


def test_layers_are_stacked_and_counted(family: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(family / name), "layer_range": list(layers)}]}
            for name, layers in zip(("base", "one"), STACK, strict=True)
        ],
    }
    if decoders.config_of(family / "base")["model_type"] in decoders.BOUND_TO_THEIR_LAYERS:
        with pytest.raises(ConfigError, match="its layers have to stay as they are"):
            materialize(recipe_from_mapping(recipe, "recipe"), tmp_path / "out")
        return
    out = materialize(recipe_from_mapping(recipe, "recipe"), tmp_path / "out")
    written = tiny.read_tensors(out)
    sources = {name: tiny.read_tensors(family / name) for name in ("base", "one")}
    origins = [("base", 0), ("base", 1), ("base", 2), ("one", 1), ("one", 2), ("one", 3)]
    layers = re.compile(r"(.*?(?:layers|h|blocks)\.)(\d+)(\..*)")
    places = {name: match for name in written if (match := layers.fullmatch(name))}
    assert {int(match[2]) for match in places.values()} == set(range(6))
    for name, match in places.items():
        model, index = origins[int(match[2])]
        assert torch.equal(written[name], sources[model][f"{match[1]}{index}{match[3]}"]), name
    loaded = decoders.load(out)
    assert loaded.config.num_hidden_layers == 6
    assert torch.isfinite(decoders.logits(loaded)).all()
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[1] > 3


def remade(model: Path, out: Path, *ranges: tuple[int, int]) -> Path:
    """The model that some of `model`'s layers make, in that order."""
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": list(r)}]} for r in ranges],
    }
    return materialize(recipe_from_mapping(recipe, "recipe"), out)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("qwen2_moe", {"mlp_only_layers": [2], "num_hidden_layers": 3}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "num_hidden_layers": 2}),
        ("gpt_neo", {"attention_layers": ["local", "local", "global"], "num_layers": 3}),
        ("gpt_neo", {"attention_types": [[["local", "local", "global"], 1]]}),
        ("gpt2", {"n_layer": 3}),
        ("mpt", {"n_layers": 3}),
    ],
)
def test_what_the_config_says_of_single_layers_follows_them(
    model_type: str, expected: dict[str, object], tmp_path: Path
) -> None:
    base = decoders.write(tmp_path / "base", model_type)
    ranges = [(1, 2), (3, 4)] if model_type == "deepseek_v3" else [(1, 2), (3, 4), (0, 1)]
    config = decoders.config_of(remade(base, tmp_path / "out", *ranges))
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("deepseek_v3", "first_k_dense_replace in config.json counts layers of another kind"),
        ("jamba", "layer 1 cannot become layer 0: the layers of this model are of 2 kinds"),
    ],
)
def test_an_order_of_layers_that_no_config_describes_is_refused(
    model_type: str, said: str, tmp_path: Path
) -> None:
    base = decoders.write(tmp_path / "base", model_type)
    with pytest.raises(ConfigError, match=said):
        remade(base, tmp_path / "out", (1, 2), (0, 1))
    assert not (tmp_path / "out").exists()


def test_masks_and_tables_of_old_files_are_no_parameters(tmp_path: Path) -> None:
    base = decoders.write(tmp_path / "base", "gpt2")
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    old = tiny.rewrite(tiny.variant(base, tmp_path / "old", seed=1), lambda t: t.update(buffers))
    out = remade(old, tmp_path / "out", (0, 4))
    assert tiny.read_tensors(out).keys() == tiny.read_tensors(base).keys()
    decoders.load(out)


def test_names_without_the_prefix_of_the_model_are_read(tmp_path: Path) -> None:
    # As openai-community/gpt2 has them: h.0.attn.c_attn.weight, wte.weight; nothing of tying.
    base = decoders.write(tmp_path / "base", "gpt2")

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    bare = tiny.rewrite(tiny.variant(base, tmp_path / "bare", seed=1, scale=0.0), strip)
    config = decoders.config_of(bare)
    del config["tie_word_embeddings"]
    (bare / "config.json").write_text(json.dumps(config))
    out = decoders.load(remade(bare, tmp_path / "out", (0, 4)))
    assert torch.equal(decoders.logits(out), decoders.logits(decoders.load(base)))


def test_every_tensor_is_kept(tmp_path: Path) -> None:
    # mergekit 0.1.5 drops what its table of the architecture does not name: of this model 8 of 29.
    base = decoders.write(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True)
    out = remade(base, tmp_path / "out", (0, 2), (2, 4))
    written = tiny.read_tensors(out)
    assert written.keys() == tiny.read_tensors(base).keys()
    assert "model.layers.3.self_attn.q_proj.bias" in written
    assert "model.layers.3.mlp.down_proj.bias" in written


def test_layers_that_predict_further_tokens_stay_behind_the_others(tmp_path: Path) -> None:
    # DeepSeek-V3 and GLM-4.5 number them as layers that the config does not count.
    base = decoders.write(tmp_path / "base", "deepseek_v3", num_nextn_predict_layers=1)
    predictor = {
        "model.layers.4.eh_proj.weight": torch.ones(32, 64),
        "model.layers.4.enorm.weight": torch.ones(32),
    }
    tiny.rewrite(base, lambda tensors: tensors.update(predictor))
    kept = tiny.read_tensors(remade(base, tmp_path / "kept", (0, 2), (1, 3)))
    assert torch.equal(kept["model.layers.4.eh_proj.weight"], torch.ones(32, 64))
    with pytest.raises(ConfigError, match=r"make 3 layers of 4, but model\.layers\.4\.eh_proj"):
        remade(base, tmp_path / "out", (0, 3))


def test_a_mix_of_tied_and_untied_keeps_the_architectures_own_name_of_the_head(
    tmp_path: Path,
) -> None:
    untied = decoders.write(tmp_path / "untied", "gpt_neox")
    tied = decoders.write(tmp_path / "tied", "gpt_neox", tie_word_embeddings=True)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tied)}, {"model": str(untied)}],
        "parameters": {"weight": 1.0},
    }
    out = materialize(recipe_from_mapping(recipe, "recipe"), tmp_path / "out")
    head = tiny.read_tensors(untied)["embed_out.weight"]
    embedding = tiny.read_tensors(tied)["gpt_neox.embed_in.weight"]
    torch.testing.assert_close(
        tiny.read_tensors(out)["embed_out.weight"],
        ((head.double() + embedding.double()) / 2).float(),
    )
    assert decoders.load(out).config.tie_word_embeddings is False
