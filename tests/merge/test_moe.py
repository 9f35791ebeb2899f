"""Mixtures of experts: their tensors, gates and configuration, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from evomerge.engine.gates import learned_gates
from evomerge.errors import ConfigError, OutputExistsError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.inputs import InputModels
from evomerge.merge.materialize import materialize
from evomerge.merge.moe import expert_part, plan_moe, random_gate
from evomerge.merge.moe_kinds import with_defaults
from evomerge.moe_config import MoEConfig, parse_moe_config
from evomerge.recipe import recipe_from_mapping
from evomerge.report.moe import build_moe
from tests import tiny
from tests.golden.moe_cases import CASES, write_moe_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = (
    Path(__file__)
    .resolve()
    .parents[3]
    .joinpath("shared", "data", "published", "elyza_moe_2x13b.yaml")
)
PRESET = Path(__file__).parents[2] / "search_spaces" / "elyza-moe-2x13b.yaml"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
IDS = torch.arange(5, 60)[None]
# Two float32 sums of other order; logits are around 1.
CLOSE = {"rtol": 0, "atol": 3e-6}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Families of dense models in float32, each a base and a sibling, and models that fit none."""
    folder = tmp_path_factory.mktemp("dense")
    for name, write in (("llama", tiny.llama), ("qwen2", tiny.qwen2), ("qwen3", tiny.qwen3)):
        write(folder / name, layers=2, dtype=torch.float32)
        tiny.variant(folder / name, folder / f"{name}-b", seed=1)
    config = MistralConfig(
        **tiny._shape(2, 128, 261), head_dim=64, sliding_window=16, tie_word_embeddings=False
    )
    tiny._write(folder / "mistral", MistralForCausalLM, config, 0, torch.float32, False, "5GB")
    tiny.variant(folder / "mistral", folder / "mistral-b", seed=1)
    tiny.llama(folder / "deeper", layers=3, dtype=torch.float32)
    tiny.llama(folder / "wider", layers=2, hidden=192, dtype=torch.float32)
    tiny.llama(folder / "more-words", layers=2, vocabulary=300, dtype=torch.float32)
    return folder


def parse(text: str, models: Path, **given: Any) -> MoEConfig:
    """The configuration in `text`, in which models are called by the names of their folders."""
    config = parse_moe_config(dedent(text), "moe.yaml", **given)
    names = {path.name: str(path) for path in models.iterdir()}
    return config.with_models(names)


def build(text: str, models: Path, out: Path, **given: Any) -> Path:
    inputs = InputModels(out.with_name("storage"))
    return build_moe(parse(text, models), out, inputs, verbatim=text, **given)


def plan(text: str, models: Path) -> dict[str, Tensor]:
    config = parse(text, models)
    checkpoints = {name: Checkpoint.open(Path(name)) for name in config.model_names()}
    return {
        tensor.name: torch.cat([part for _, part in tensor.parts()]).reshape(tensor.shape)
        for tensor in plan_moe(config, checkpoints).tensors
    }


def load(directory: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def logits(directory: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = load(directory)(IDS).logits
    return found


def two(first: str, second: str, more: str = "") -> str:
    """The YAML of a mixture of two experts with random gates, over the first of them."""
    experts = f"[{{source_model: {first}}}, {{source_model: {second}}}]"
    return f"base_model: {first}\ngate_mode: random\nexperts: {experts}\n{more}"


SHARED = "shared_experts: [{{source_model: {0}}}]\n"
KINDS = {
    "mixtral": ("llama", "", "MixtralForCausalLM"),
    "mixtral of mistral": ("mistral", "", "MixtralForCausalLM"),
    "qwen2": ("qwen2", SHARED.format("qwen2"), "Qwen2MoeForCausalLM"),
    "qwen2 of llama": (
        "llama",
        SHARED.format("llama") + "architecture: qwen",
        "Qwen2MoeForCausalLM",
    ),
    "qwen3": ("qwen3", "", "Qwen3MoeForCausalLM"),
    "deepseek": ("llama", SHARED.format("llama") + "architecture: DeepSeek", "Qwen2MoeForCausalLM"),
    "deepseek alone": ("llama", "architecture: deepseek moe", "MixtralForCausalLM"),
}


@pytest.mark.parametrize("name", ["mixtral", "mixtral of mistral", "qwen3", "deepseek alone"])
def test_a_mixture_of_equal_experts_computes_what_the_dense_model_does(
    name: str, models: Path, tmp_path: Path
) -> None:
    dense, more, model_class = KINDS[name]
    out = build(two(dense, dense, more), models, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == [model_class]
    torch.testing.assert_close(logits(out), logits(models / dense), **CLOSE)


@pytest.mark.parametrize("name", ["qwen2", "qwen2 of llama", "deepseek"])
def test_with_a_shared_expert_of_weight_0_it_does_too(
    name: str, models: Path, tmp_path: Path
) -> None:
    dense, more, model_class = KINDS[name]
    more = more.replace("}]", ", residual_scale: 0}]")
    out = build(two(dense, dense, more), models, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == [model_class]
    torch.testing.assert_close(logits(out), logits(models / dense), **CLOSE)


def test_an_ungated_shared_expert_adds_its_whole_answer(models: Path, tmp_path: Path) -> None:
    """DeepSeek's function: both halves are the dense MLP, so its down projection counts twice."""
    out = build(two("llama", "llama", KINDS["deepseek"][1]), models, tmp_path / "out")
    dense = load(models / "llama")
    with torch.inference_mode():
        for layer in dense.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
        expected = dense(IDS).logits
    torch.testing.assert_close(logits(out), expected, **CLOSE)
    assert (expected - logits(models / "llama")).abs().max() > 0.01


def test_a_mixture_weighs_the_answers_of_its_experts_by_its_gate(
    models: Path, tmp_path: Path
) -> None:
    out = build(two("llama", "llama-b"), models, tmp_path / "out")
    mixture, first, second = (load(path) for path in (out, models / "llama", models / "llama-b"))
    states = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(0))
    gate = tiny.read_tensors(out)["model.layers.1.block_sparse_moe.gate.weight"]
    with torch.inference_mode():
        found = mixture.model.layers[1].mlp(states)
        shares = (states @ gate.T).softmax(-1)
        answers = torch.stack([model.model.layers[1].mlp(states) for model in (first, second)], -1)
    torch.testing.assert_close(found, (answers * shares[:, :, None]).sum(-1), **CLOSE)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_kind_generates(name: str, models: Path, tmp_path: Path) -> None:
    dense, more, model_class = KINDS[name]
    model = load(build(two(dense, f"{dense}-b", more), models, tmp_path / "out"))
    assert type(model).__name__ == model_class
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("two and two", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 5


def test_mixtral_tensors_are_the_dense_ones_under_its_names(models: Path, tmp_path: Path) -> None:
    out = build(two("llama", "llama-b"), models, tmp_path / "out")
    mixture = tiny.read_tensors(out)
    base, other = (tiny.read_tensors(models / name) for name in ("llama", "llama-b"))
    expected = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        for expert, tensors in enumerate((base, other)):
            for projection, name in zip(PROJECTIONS, ("w1", "w3", "w2"), strict=True):
                dense = tensors[f"model.layers.{layer}.mlp.{projection}.weight"]
                expected[f"{block}.experts.{expert}.{name}.weight"] = dense
        expected[f"{block}.gate.weight"] = mixture[f"{block}.gate.weight"]
    assert mixture.keys() == expected.keys()
    assert all(torch.equal(mixture[name], tensor) for name, tensor in expected.items())


def test_a_llama_as_qwen2_moe_gets_biases_of_0(models: Path) -> None:
    tensors = plan(two("llama", "llama-b", KINDS["qwen2 of llama"][1]), models)
    base = tiny.read_tensors(models / "llama")
    for letter in "qkv":
        bias = tensors[f"model.layers.1.self_attn.{letter}_proj.bias"]
        assert torch.equal(
            bias, torch.zeros(base[f"model.layers.1.self_attn.{letter}_proj.weight"].shape[0])
        )


def test_random_gates_are_standard_normal_and_differ_by_layer_and_seed(models: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    gate = random_gate("random", name, (64, 512), 0)
    assert abs(float(gate.mean())) < 0.02
    assert abs(float(gate.std()) - 1) < 0.02
    assert torch.equal(gate, random_gate("random", name, (64, 512), 0))
    assert not torch.equal(gate, random_gate("random", name, (64, 512), 1))
    assert not torch.equal(gate, random_gate("random", name.replace("0", "1"), (64, 512), 0))
    # Recorded: the same on every machine.
    first = torch.tensor([[0.9727503657341003, 1.9355875253677368, -2.13401460647583]])
    torch.testing.assert_close(random_gate("random", name, (1, 3), 0), first, rtol=0, atol=1e-6)


def test_uniform_gates_are_those_of_a_fresh_linear_layer() -> None:
    gate = random_gate("uniform_random", "gate", (64, 256), 0)
    limit = 1 / 16
    assert -limit <= float(gate.min()) < -0.99 * limit
    assert 0.99 * limit < float(gate.max()) <= limit
    assert abs(float(gate.std()) - limit / 3**0.5) < 0.001


def test_residual_scale_shrinks_the_down_projection_alone(models: Path) -> None:
    text = two("llama", "llama-b").replace("llama-b}", "llama-b, residual_scale: 0.25}")
    tensors, dense = plan(text, models), tiny.read_tensors(models / "llama-b")
    for projection, name, factor in (
        ("gate_proj", "w1", 1.0),
        ("up_proj", "w3", 1.0),
        ("down_proj", "w2", 0.25),
    ):
        found = tensors[f"model.layers.1.block_sparse_moe.experts.1.{name}.weight"]
        assert torch.equal(found, factor * dense[f"model.layers.1.mlp.{projection}.weight"])


def test_noise_has_the_asked_deviation_and_is_its_own_for_every_tensor() -> None:
    weight = torch.full((60000,), 0.5)

    def noisy(name: str, seed: int = 0, scale: float = 1.0) -> Tensor:
        return expert_part(
            lambda start, stop: weight[start:stop],
            *(0, 60000),
            noise_scale=0.1,
            scale=scale,
            name=name,
            seed=seed,
        )

    noise = noisy("a") - weight
    assert abs(float(noise.std()) - 0.1) < 0.002
    assert abs(float(noise.mean())) < 0.002
    assert torch.equal(noisy("a"), noisy("a"))
    assert not torch.equal(noisy("a"), noisy("b"))
    assert not torch.equal(noisy("a"), noisy("a", seed=1))
    torch.testing.assert_close(noisy("a", scale=0.5), 0.5 * noisy("a"), rtol=0, atol=0)


def fused(tensors: dict[str, Tensor], layers: int, experts: int) -> dict[str, Tensor]:
    """Our Mixtral tensors as mergekit writes them: experts stacked, in transformers' own names."""
    found = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        parts = {
            name: torch.stack(
                [tensors[f"{block}.experts.{expert}.{name}.weight"] for expert in range(experts)]
            )
            for name in ("w1", "w2", "w3")
        }
        place = f"model.layers.{layer}.mlp"
        found[f"{place}.gate.weight"] = tensors[f"{block}.gate.weight"]
        found[f"{place}.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        found[f"{place}.experts.down_proj"] = parts["w2"]
    return found


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """Builds a recorded case: our folder, our tensors (mergekit's layout) and mergekit's."""
    folder = tmp_path_factory.mktemp("golden")
    write_moe_inputs(folder / "inputs")

    def made(name: str) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
        out = folder / name
        if not out.exists():
            build(CASES[name], folder / "inputs", out)
        ours = tiny.read_tensors(out)
        if any("block_sparse_moe" in tensor for tensor in ours):
            ours = fused(ours, layers=4, experts=2)
        return out, ours, load_file(GOLDEN / f"{name}.safetensors")

    return made


def test_the_published_mixture_is_the_one_that_mergekit_makes(golden: Any) -> None:
    out, ours, theirs = golden("moe_elyza")
    assert ours.keys() == theirs.keys()
    gates = {name for name in ours if name.endswith("mlp.gate.weight")}
    assert len(gates) == 4  # both draw them
    for name in ours.keys() - gates:
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], theirs[name]), name
    for name in gates:
        assert ours[name].shape == theirs[name].shape
        assert ours[name].dtype == theirs[name].dtype
    answer = load(out).generate(torch.arange(10)[None], max_new_tokens=5, eos_token_id=None)
    assert answer.shape == (1, 15)


@pytest.mark.parametrize(
    ("name", "largest"),
    # mergekit computes hidden states in bfloat16.
    [("moe_cheap_embed", 1e-6), ("moe_hidden", 0.02), ("moe_hidden_avg", 0.02)],
)
def test_gates_are_those_of_mergekit(golden: Any, name: str, largest: float) -> None:
    _, ours, theirs = golden(name)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        bound = largest if tensor.endswith("mlp.gate.weight") else 0.0
        torch.testing.assert_close(ours[tensor], expected, rtol=0, atol=bound)


def test_a_qwen2_moe_with_scaled_experts_is_that_of_mergekit(golden: Any) -> None:
    _, ours, theirs = golden("moe_qwen_scaled")
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        if "gate.weight" in tensor:  # both draw them
            assert ours[tensor].shape == expected.shape
            continue
        # mergekit scales in bfloat16, the dtype of the inputs, before it widens the result.
        bound = 2**-8 * float(expected.abs().max()) if "down_proj" in tensor else 0.0
        torch.testing.assert_close(ours[tensor], expected, rtol=0, atol=bound)


def test_a_deepseek_mixture_has_mergekits_tensors_under_qwen2_names(golden: Any) -> None:
    _, ours, theirs = golden("moe_deepseek")
    expected = {name.replace("shared_experts", "shared_expert"): t for name, t in theirs.items()}
    added = {name for name in ours if name.endswith((".bias", "shared_expert_gate.weight"))}
    assert ours.keys() - added == expected.keys()
    assert all(not ours[name].any() for name in added)
    for name, tensor in expected.items():
        factor = 2 if "shared_expert.down_proj" in name else 1
        torch.testing.assert_close(ours[name], factor * tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_mixture_is_configured_as_mergekit_configures_it(golden: Any, name: str) -> None:
    out, _, _ = golden(name)
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    config = json.loads((out / "config.json").read_text())
    if (
        name == "moe_deepseek"
    ):  # another class; mergekit does not write the dtype that was asked for
        expected = {key: expected[key] for key in expected.keys() & config.keys()}
        del expected["architectures"], expected["model_type"], expected["dtype"]
    assert {key: config[key] for key in expected} == expected


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published file is not beside the clone")
def test_the_preset_is_the_published_configuration_with_names_on_the_hub() -> None:
    published = PUBLISHED.read_text().replace("./ELYZA-", "elyza/ELYZA-")
    assert parse_moe_config(PRESET.read_text(), "preset") == parse_moe_config(
        published, "published"
    )


def test_the_recorded_case_is_the_preset_with_tiny_models() -> None:
    names = {
        "elyza/ELYZA-japanese-Llama-2-13b-instruct": "base",
        "elyza/ELYZA-japanese-Llama-2-13b": "first",
    }
    preset = parse_moe_config(PRESET.read_text(), "preset").with_models(names)
    recorded = parse_moe_config(dedent(CASES["moe_elyza"]), "recorded")
    assert preset == recorded.with_models({})


def test_the_gate_of_a_shared_expert_is_learned_like_the_others(
    models: Path, tmp_path: Path
) -> None:
    text = """
        base_model: qwen2
        gate_mode: cheap_embed
        experts:
        - {source_model: qwen2, positive_prompts: [sums]}
        - {source_model: qwen2-b, positive_prompts: [songs]}
        shared_experts:
        - {source_model: qwen2-b, positive_prompts: [anything], negative_prompts: [nothing]}
        """
    tensors = tiny.read_tensors(build(text, models, tmp_path / "out"))
    prompts = [(["sums"], []), (["songs"], []), (["anything"], ["nothing"])]
    expected = learned_gates(Checkpoint.open(models / "qwen2"), prompts, "cheap_embed")
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        assert torch.equal(tensors[f"{block}.gate.weight"], expected[layer, :2])
        assert torch.equal(tensors[f"{block}.shared_expert_gate.weight"], expected[layer, 2:])


def test_a_tied_base_gives_a_tied_mixture(models: Path, tmp_path: Path) -> None:
    out = build(two("qwen3", "qwen3-b"), models, tmp_path / "out")
    assert "lm_head.weight" not in tiny.read_tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_mixture_of_mistrals_keeps_their_window(models: Path, tmp_path: Path) -> None:
    """mergekit drops it; with 55 tokens and a window of 16 that changes the answers."""
    out = build(two("mistral", "mistral"), models, tmp_path / "out")
    file = out / "config.json"
    assert json.loads(file.read_text())["sliding_window"] == 16
    tiny.edit_config(out, sliding_window=None)
    assert (logits(out) - logits(models / "mistral")).abs().max() > 1e-3


def test_dtype_and_shards_are_as_asked(models: Path, tmp_path: Path) -> None:
    text = two("llama", "llama-b", "dtype: bfloat16")
    out = build(text, models, tmp_path / "out", max_shard_size=300_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert (out / "model.safetensors.index.json").is_file()
    tensors = tiny.read_tensors(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    dense = tiny.read_tensors(models / "llama-b")["model.layers.0.mlp.up_proj.weight"]
    found = tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(found, dense.bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    load(out)


def test_the_folder_has_card_configuration_and_tokenizer(models: Path, tmp_path: Path) -> None:
    text = two("llama", "llama-b")
    out = build(text, models, tmp_path / "out")
    assert (out / "mergekit_moe_config.yml").read_text() == text
    card = (out / "README.md").read_text()
    assert text.rstrip() in card
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- mergekit\n- moe\n")
    assert (out / "generation_config.json").is_file()
    assert (out / "tokenizer.json").read_bytes() == (models / "llama/tokenizer.json").read_bytes()


def test_silent_configs_mean_what_transformers_takes_for_them() -> None:
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    for model_type, config_class in classes.items():
        config = config_class()
        silent = {"model_type": model_type, "num_attention_heads": config.num_attention_heads}
        found = with_defaults(Checkpoint(Path(), silent, {}))
        assert found.pop("rope_theta") == config.rope_parameters["rope_theta"]
        assert {key: getattr(config, key) for key in found} == found
        assert found.keys() >= {"max_position_embeddings", "num_key_value_heads", "rms_norm_eps"}


def test_an_old_config_gives_the_same_model(models: Path, tmp_path: Path) -> None:
    """Keys that an old file leaves out have other defaults in the mixture's class."""
    old = tmp_path / "old"
    tiny.llama(old, layers=2, dtype=torch.float32, hidden=256)
    config = json.loads((old / "config.json").read_text())
    config["num_key_value_heads"] = config["num_attention_heads"] = 4
    heads = tiny.read_tensors(old)

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in heads:
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                tensors[name] = torch.cat([heads[name], 0.5 * heads[name]])

    tiny.rewrite(old, widen)
    for key in ("num_key_value_heads", "rope_parameters", "rms_norm_eps", "hidden_act", "head_dim"):
        del config[key]
    (old / "config.json").write_text(json.dumps(config))
    out = build(two("old", "old"), tmp_path, tmp_path / "out")
    torch.testing.assert_close(logits(out), logits(old), **CLOSE)


def test_a_single_expert_is_a_mixture_too(models: Path, tmp_path: Path) -> None:
    text = """
        base_model: llama
        experts_per_token: 1
        experts: [{source_model: llama-b, positive_prompts: [anything]}]
        """
    assert logits(build(text, models, tmp_path / "out")).isfinite().all()


def test_the_same_seed_gives_the_same_files_and_another_one_other_gates(
    models: Path, tmp_path: Path
) -> None:
    text = two("llama", "llama-b").replace("llama-b}", "llama-b, noise_scale: 0.01}")
    outs = [
        build(text, models, tmp_path / f"out{number}", seed=seed)
        for number, seed in enumerate((3, 3, 4))
    ]
    first, same, other = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == same
    assert first != other


LEARNED = """
    base_model: llama
    experts:
    - {source_model: llama, positive_prompts: [sums]}
    - {source_model: llama-b, positive_prompts: [songs]}
    """
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a misspelt key": (LEARNED + "gate_mod: random", ["gate_mod", "did you mean 'gate_mode'"]),
    "a misspelt key of an expert": (
        LEARNED.replace("positive_prompts: [sums]", "positive_prompt: [sums]"),
        ["experts.0.positive_prompt", "did you mean 'positive_prompts'"],
    ),
    "an unknown gate mode": (LEARNED + "gate_mode: hiden", ["gate_mode", "did you mean 'hidden'"]),
    "no prompts": (
        LEARNED.replace(", positive_prompts: [songs]", ""),
        ["experts.1: positive_prompts", "gate_mode: random"],
    ),
    "the same prompts": (LEARNED.replace("songs", "sums"), ["same prompts"]),
    "the same models": (LEARNED.replace("llama-b", "llama"), ["all are llama", "--lenient"]),
    "an empty prompt": (LEARNED.replace("songs", "' '"), ["experts.1.positive_prompts", "empty"]),
    "a prompt that is no text": (LEARNED.replace("songs", "12"), ["experts.1.positive_prompts.0"]),
    "too many per token": (LEARNED + "experts_per_token: 3", ["experts_per_token: 3", "2 experts"]),
    "none per token": (LEARNED + "experts_per_token: 0", ["experts_per_token"]),
    "no experts": ("base_model: llama\nexperts: []", ["experts"]),
    "no base": (LEARNED.replace("base_model: llama", ""), ["base_model: is missing"]),
    "negative noise": (LEARNED.replace("[sums]", "[sums], noise_scale: -1"), ["noise_scale"]),
    "an infinite scale": (
        LEARNED.replace("[sums]", "[sums], residual_scale: .inf"),
        ["residual_scale"],
    ),
    "a dtype of no model": (LEARNED + "dtype: int8", ["dtype", "int8"]),
    "no mapping": ("- a", ["base_model and experts"]),
    "no YAML": ("a: [", ["not valid YAML"]),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_wrong_file_is_refused_with_its_reason(mistake: str, models: Path) -> None:
    text, words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        parse(text, models)
    assert all(word in str(error.value) for word in ["moe.yaml", *words]), str(error.value)


MISFITS: dict[str, tuple[str, list[str]]] = {
    "another number of layers": (two("llama", "deeper"), ["deeper", "3 layers", "has 2"]),
    "other shapes": (
        two("llama", "wider"),
        ["wider", "model.layers.0.mlp.down_proj.weight", "[192, 384]", "[128, 256]"],
    ),
    "another architecture": (two("llama", "qwen3"), ["qwen3 is qwen3", "is llama"]),
    "an unknown architecture": (
        two("llama", "llama-b", "architecture: mixtrel"),
        ["architecture: 'mixtrel'", "did you mean 'mixtral'"],
    ),
    "an architecture of other inputs": (
        two("llama", "llama-b", "architecture: qwen3"),
        ["is made of qwen3", "is llama"],
    ),
    "a shared expert of mixtral": (
        two("llama", "llama-b", "architecture: mixtral\n" + SHARED.format("llama")),
        ["mixtral: has at most 0 shared experts, not 1"],
    ),
    "qwen without a shared expert": (two("qwen2", "qwen2-b"), ["exactly 1 shared expert, not 0"]),
    "a gated shared expert of deepseek": (
        two(
            "llama",
            "llama-b",
            "architecture: deepseek\nshared_experts: "
            "[{source_model: llama, positive_prompts: [all]}]",
        ),
        ["shared_experts.0", "no gate"],
    ),
    "a shared expert without prompts for its gate": (
        LEARNED + "architecture: qwen\n    shared_experts: [{source_model: llama}]",
        ["shared_experts.0: positive_prompts"],
    ),
    "a tokenizer of another size": (
        two("llama", "llama-b", "tokenizer_source: larger-tokenizer"),
        ["tokenizer_source", "262 tokens", "261"],
    ),
    "a union with new tokens": (
        two("llama", "llama-b", "tokenizer_source: union").replace("llama-b", "larger-tokenizer"),
        ["tokenizer_source: union", "1 token", "'<new>'", "write base"],
    ),
    "prompts that cancel each other": (
        LEARNED.replace("[sums]", "[sums], negative_prompts: [sums]") + "gate_mode: cheap_embed",
        ["expert 0", "cancel each other"],
    ),
    "a prompt that is too long": (LEARNED.replace("sums", "s" * 600), ["601 tokens", "takes 512"]),
}


@pytest.mark.parametrize("misfit", sorted(MISFITS))
def test_models_that_do_not_fit_are_refused_with_the_reason(
    misfit: str, models: Path, tmp_path: Path
) -> None:
    text, words = MISFITS[misfit]
    if "larger-tokenizer" in text:
        larger = tiny.variant(models / "llama", tmp_path / "larger-tokenizer", seed=0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(larger)
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(larger)
        text = text.replace("larger-tokenizer", str(larger))
    with pytest.raises(ConfigError) as error:
        build(text, models, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("key", ["num_attention_heads", "model_type", "dtype", "vocab_size"])
@pytest.mark.parametrize("value", [None, "x", -1, [1]])
def test_a_config_of_a_model_that_is_spoiled_gives_no_traceback(
    key: str, value: object, models: Path, tmp_path: Path
) -> None:
    tiny.edit_config(tiny.variant(models / "llama", tmp_path / "spoiled", seed=0), **{key: value})
    names = {"spoiled": str(tmp_path / "spoiled")}
    config = parse_moe_config(two("spoiled", "spoiled"), "moe.yaml").with_models(names)
    opened = {name: Checkpoint.open(Path(name)) for name in config.model_names()}
    if key in ("num_attention_heads", "model_type"):
        with pytest.raises(ConfigError):
            plan_moe(config, opened)
    else:
        made = plan_moe(config, opened).config
        assert (made["dtype"], made["vocab_size"]) == ("float32", 261)


def test_a_tensor_without_a_place_in_the_mixture_is_named(models: Path, tmp_path: Path) -> None:
    biased = tiny.variant(models / "llama", tmp_path / "biased", seed=0)
    tiny.rewrite(
        biased, lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.ones(128)})
    )
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.o_proj\.bias, for which Mixtral"):
        build(two("biased", "biased"), tmp_path, tmp_path / "out")


def test_an_output_that_is_taken_or_an_input_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    with pytest.raises(OutputExistsError):
        build(two("llama", "llama-b"), models, tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="goes into the merge"):
        build(two("llama", "llama-b"), models, models / "llama-b", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "keep me"


def test_a_union_without_new_tokens_is_the_base_tokenizer(models: Path, tmp_path: Path) -> None:
    out = build(two("llama", "llama-b", "tokenizer_source: union"), models, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (models / "llama/tokenizer.json").read_bytes()


def test_lenient_warns_and_goes_on(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    text = LEARNED.replace("llama-b", "llama") + "tokenizer_source: union\n    frobnicate: 3"
    config = parse(text, models, lenient=True, say=said.append)
    assert config.tokenizer_source is None
    assert len(said) == 3
    for words in ("unknown key frobnicate is ignored", "union", "all are llama"):
        assert any("warning" in line and words in line for line in said)


def test_gates_that_are_nearly_dependent_are_told(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    text = LEARNED.replace("songs", "summs") + "gate_mode: cheap_embed"
    build(text, models, tmp_path / "out", say=said.append)
    assert any("gates of all layers are nearly dependent" in line for line in said)
    said.clear()
    build(LEARNED.replace("songs", "xyz"), models, tmp_path / "other", say=said.append)
    assert not any("dependent" in line for line in said)


def test_a_number_that_overflows_the_dtype_leaves_no_folder(models: Path, tmp_path: Path) -> None:
    text = two("llama", "llama-b", "dtype: float16").replace(
        "llama-b}", "llama-b, residual_scale: 1e9}"
    )
    with pytest.raises(Exception, match="NaN or infinite"):
        build(text, models, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("fused_layout", [False, True])
@pytest.mark.parametrize("dense", ["llama", "qwen3"])
def test_mixtures_merge_like_any_other_models(
    dense: str, fused_layout: bool, models: Path, tmp_path: Path
) -> None:
    first = build(two(dense, f"{dense}-b"), models, tmp_path / "first")
    if fused_layout:
        file = first / "model.safetensors"
        first = tmp_path / "fused"
        load(file.parent).save_pretrained(first, save_original_format=False)
        tiny.write_tokenizer(first)
    second = tiny.variant(first, tmp_path / "second", seed=7)
    recipe = recipe_from_mapping(
        {
            "merge_method": "linear",
            "dtype": "float32",
            "models": [
                {"model": str(first), "parameters": {"weight": 0.25}},
                {"model": str(second), "parameters": {"weight": 0.75}},
            ],
        },
        "recipe",
    )
    out = materialize(recipe, tmp_path / "merged")
    merged, one, other = (tiny.read_tensors(path) for path in (out, first, second))
    assert merged.keys() == one.keys()
    assert any(("gate_up_proj" in name) == fused_layout for name in merged if ".experts." in name)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * other[name])
    assert logits(out).isfinite().all()
