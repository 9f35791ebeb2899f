"""Models of several modules: vision towers beside text decoders, encoders before decoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import MergePlan, make_plan, open_checkpoints
from evomerge.recipe import recipe_from_mapping
from tests import tiny
from tests.merge import decoders

TEXT = decoders.CONFIGS["llama"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
HALVES = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


def gemma3() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 8, "sliding_window": 8}
    kinds = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention")
    text["layer_types"] = list(kinds)
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**(VISION | {"num_hidden_layers": 4}))
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)
    )


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 3, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config)


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=264, num_layers=3, num_decoder_layers=4, **sizes)
    )


def whisper() -> PreTrainedModel:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=264, num_mel_bins=8, max_source_positions=16, **HALVES, **tokens
    )
    return WhisperForConditionalGeneration(config)


VISUAL = ("text_decoder", "vision_tower", "multi_modal_projector")
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...]]] = {
    "gemma3": (gemma3, VISUAL),
    "llava": (llava, VISUAL),
    "qwen2_vl": (qwen2_vl, VISUAL),
    "t5": (t5, ("decoder", "encoder", "shared")),
    "whisper": (whisper, ("decoder", "encoder")),
}


def write(folder: Path, kind: str) -> Path:
    """A folder with the models base and tuned of a kind."""
    make, _ = FAMILIES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    logging.disable_progress_bar()
    model.save_pretrained(folder / "base")
    tiny.write_tokenizer(folder / "base")
    tiny.variant(folder / "base", folder / "tuned", seed=1)
    return folder


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="module")
def visual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gemma3"), "gemma3")


def whole(folder: Path, weight: object) -> dict[str, Any]:
    """The part of a recipe or module that merges both models."""
    tuned = {"model": str(folder / "tuned"), "parameters": {"weight": weight}}
    return {"models": [{"model": str(folder / "base")}, tuned]}


def stacked(folder: Path, *ranges: tuple[int, int]) -> dict[str, Any]:
    """The part that stacks the layers of the base, the tuned model having no weight."""
    return {
        "slices": [
            {
                "sources": [
                    {"model": str(folder / name), "layer_range": list(layers)}
                    for name in ("base", "tuned")
                ],
                "parameters": {"weight": 0.0},
            }
            for layers in ranges
        ]
    }


def recipe_of(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    return {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), **body}


def planned(folder: Path, body: dict[str, Any]) -> MergePlan:
    recipe = recipe_from_mapping(recipe_of(folder, body), "recipe")
    return make_plan(recipe, open_checkpoints(recipe))


def merged(folder: Path, body: dict[str, Any], out: Path) -> Path:
    return materialize(recipe_from_mapping(recipe_of(folder, body), "recipe"), out)


def test_modules_have_mergekits_names(family: Path) -> None:
    _, names = FAMILIES[family.name]
    architecture = Checkpoint.open(family / "base").architecture
    assert set(architecture.module_names) == set(names)
    assert architecture.main == names[0]
    assert architecture.num_layers == 4


def test_whole_models_are_merged_in_all_their_modules(family: Path, tmp_path: Path) -> None:
    out = merged(family, whole(family, 0.5), tmp_path / "out")
    base, tuned = (tiny.read_tensors(family / name) for name in ("base", "tuned"))
    written = tiny.read_tensors(out)
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        exact = base[name].double() + 0.5 * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(tensor, exact.float(), rtol=1e-6, atol=1e-7)
    make, _ = FAMILIES[family.name]
    _, said = type(make()).from_pretrained(out, output_loading_info=True)
    assert not any(said.values()), said


def test_a_module_has_its_own_weights(family: Path) -> None:
    _, names = FAMILIES[family.name]
    weights = {name: 0.25 * number for number, name in enumerate(names, start=1)}
    modules = {name: whole(family, weight) for name, weight in weights.items()}
    plan = planned(family, {"modules": modules})
    architecture = Checkpoint.open(family / "base").architecture
    assert {entry.name for entry in plan.entries} == set(tiny.read_tensors(family / "base"))
    for entry in plan.entries:
        module = next(
            (name for name, one in architecture.others.items() if entry.name in one.tensors),
            architecture.main,
        )
        assert entry.weights == (weights[module],), entry.name


def test_gradients_run_over_each_modules_own_layers(visual: Path) -> None:
    weights = {
        entry.name: entry.weights for entry in planned(visual, whole(visual, [0, 1])).entries
    }
    text, vision = "language_model.model.layers.", "vision_tower.encoder.layers."
    assert weights[f"{text}3.mlp.up_proj.weight"] == (1.0,)
    assert weights[f"{text}1.mlp.up_proj.weight"] == (1 / 3,)
    assert [weights[f"{vision}{layer}.mlp.fc1.weight"] for layer in range(3)] == [
        (0,),
        (0.5,),
        (1,),
    ]
    assert weights["multi_modal_projector.mm_soft_emb_norm.weight"] == (0,)
    assert weights["vision_tower.post_layernorm.weight"] == (0,)


def test_the_text_decoders_layers_are_stacked(visual: Path, tmp_path: Path) -> None:
    modules = {name: whole(visual, 0.0) for name in VISUAL}
    modules["text_decoder"] = stacked(visual, (0, 3), (2, 4))
    out = merged(visual, {"modules": modules}, tmp_path / "out")
    model, said = Gemma3ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said.values()), said
    config = model.config
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (5, 3)
    assert config.text_config.layer_types == [
        *("sliding_attention", "sliding_attention", "full_attention"),
        *("full_attention", "sliding_attention"),
    ]
    written, base = tiny.read_tensors(out), tiny.read_tensors(visual / "base")
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    for layer, origin in enumerate((0, 1, 2, 2, 3)):
        assert torch.equal(written[name.format(layer)], base[name.format(origin)])
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multi_modal_projector": None}, "modules: multi_modal_projector is missing, which"),
        ({"vision_towr": True}, r"modules\.vision_towr: there .* did you mean 'vision_tower'\?"),
        ({"vision_tower": "slices"}, r"modules\.vision_tower: slices: only the layers of text_de"),
    ],
)
def test_a_module_that_is_missing_unknown_or_cannot_be_stacked_is_named(
    visual: Path, change: dict[str, object], said: str
) -> None:
    bodies = {None: None, True: whole(visual, 1.0), "slices": stacked(visual, (0, 1))}
    modules = {name: whole(visual, 1.0) for name in VISUAL}
    modules |= {name: bodies[kind] for name, kind in change.items()}
    with pytest.raises(ConfigError, match=said):
        planned(visual, {"modules": {name: body for name, body in modules.items() if body}})


def test_slices_do_not_say_what_becomes_of_the_other_modules(visual: Path) -> None:
    with pytest.raises(ConfigError, match=r"write modules: \{text_decoder: \{slices: …\}, multi_"):
        planned(visual, stacked(visual, (0, 4)))


def test_a_plain_language_model_has_one_module(tmp_path: Path) -> None:
    base = decoders.write(tmp_path / "base", "llama")
    tiny.variant(base, tmp_path / "tuned", seed=1)
    body = whole(tmp_path, 0.5)
    assert (
        planned(tmp_path, {"modules": {"default": body}}).digest == planned(tmp_path, body).digest
    )
    with pytest.raises(ConfigError, match=r"modules\.text_decoder: there is no such module; known"):
        planned(tmp_path, {"modules": {"text_decoder": body}})
