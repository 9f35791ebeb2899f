from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import CandidateError, ConfigError, OutputExistsError
from evomerge.merge.dtypes import FLOAT32
from evomerge.merge.lora import apply_adapter
from tests import tiny

QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    return tiny.llama(directory, layers=3, chat=True, max_shard_size="400KB")


def factors(rank: int = 4, rows: int = 128, columns: int = 128, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_A": torch.randn(rank, columns, generator=generator),
        "lora_B": torch.randn(rows, rank, generator=generator) / 10,
    }


def adapter(directory: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """An adapter as PEFT saves it, with `tensors` by their names in the base model."""
    directory.mkdir(parents=True)
    saved = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(saved, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | config
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory


def on(module: str, pair: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{factor}.weight": tensor for factor, tensor in pair.items()}


def product(pair: dict[str, Tensor]) -> Tensor:
    return pair["lora_B"] @ pair["lora_A"]


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 8 / 2**0.5)),
        ({"alpha_pattern": {"q_proj": 3}}, (0.75, 2.0)),
        ({"alpha_pattern": {"layers.2.mlp.down_proj": 6}, "lora_alpha": 1}, (0.25, 1.5)),
        ({"alpha_pattern": {"proj": 6}}, (2.0, 2.0)),
    ],
)
def test_the_scaled_product_is_added_in_float32_and_rounded_once(
    base: Path, tmp_path: Path, config: dict[str, object], scales: tuple[float, float]
) -> None:
    query, down = factors(), factors(columns=256, seed=1)
    if "use_rslora" in config or not config:
        down = factors(rank=2 if config else 4, columns=256, seed=1)
    made = adapter(tmp_path / "adapter", on(QUERY, query) | on(DOWN, down), **config)
    merged = tiny.read_tensors(apply_adapter(base, made, tmp_path / "out"))
    expected = tiny.read_tensors(base)
    for module, pair, scale in ((QUERY, query, scales[0]), (DOWN, down, scales[1])):
        weight = expected[f"{module}.weight"]
        assert not torch.equal(merged[f"{module}.weight"], weight)
        expected[f"{module}.weight"] = (weight.float() + scale * product(pair)).bfloat16()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_the_result_is_a_whole_model_directory(base: Path, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", on(QUERY, factors()))
    out = apply_adapter(base, made, tmp_path / "out")
    others = {file.name for file in base.iterdir() if "safetensors" not in file.name}
    assert set(os.listdir(out)) == others | {"model.safetensors"}
    for name in others:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE


def test_another_dtype_is_rounded_to_and_told(base: Path, tmp_path: Path) -> None:
    query = factors()
    made = adapter(tmp_path / "adapter", on(QUERY, query))
    out = apply_adapter(base, made, tmp_path / "out", dtype=FLOAT32)
    merged, before = tiny.read_tensors(out), tiny.read_tensors(base)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    weight = before[f"{QUERY}.weight"].float() + 2.0 * product(query)
    assert torch.equal(merged[f"{QUERY}.weight"], weight)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_transposed_weights_and_embeddings_get_the_transposed_product(
    base: Path, tmp_path: Path
) -> None:
    turned, table = factors(), factors(rows=128, columns=261, seed=1)
    embedding = {
        "model.embed_tokens.lora_embedding_A": table["lora_A"],
        "model.embed_tokens.lora_embedding_B": table["lora_B"],
    }
    made = adapter(tmp_path / "adapter", on(QUERY, turned) | embedding, fan_in_fan_out=True)
    merged = tiny.read_tensors(apply_adapter(base, made, tmp_path / "out"))
    before = tiny.read_tensors(base)
    for name, pair in ((f"{QUERY}.weight", turned), ("model.embed_tokens.weight", table)):
        expected = (before[name].float() + 2.0 * product(pair).T).bfloat16()
        assert torch.equal(merged[name], expected), name


def test_modules_that_were_trained_whole_take_the_place_of_the_bases(
    base: Path, tmp_path: Path
) -> None:
    head = torch.randn(261, 128)
    made = adapter(
        tmp_path / "adapter",
        on(QUERY, factors()) | {"lm_head.weight": head},
        modules_to_save=["lm_head"],
    )
    merged = tiny.read_tensors(apply_adapter(base, made, tmp_path / "out"))
    assert torch.equal(merged["lm_head.weight"], head.bfloat16())


def test_a_whole_module_that_the_bases_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    half = tiny.llama(tmp_path / "half", layers=1)
    tiny.rewrite(half, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    made = adapter(tmp_path / "adapter", {"lm_head.weight": torch.full((261, 128), 1e5)})
    with pytest.raises(CandidateError, match=r"lm_head\.weight: has NaN or infinite numbers"):
        apply_adapter(half, made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PEFT_CASES: dict[str, dict[str, object]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "alpha_pattern": {"v_proj": 3},
        "rank_pattern": {"v_proj": 2},
    },
    "head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["k_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("case", sorted(PEFT_CASES))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_result_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install .[train])")
    base = tiny.llama(tmp_path / "base", layers=2, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **PEFT_CASES[case]
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    out = apply_adapter(base, tmp_path / "adapter", tmp_path / "out")
    ours, theirs = tiny.read_tensors(out), tiny.read_tensors(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (on("model.layers.3.self_attn.q_proj", factors()), "but that model has no such tensor"),
        (on(QUERY, factors(rows=64)), r"of shape \[64, 128\], but that model has \[128, 128\]"),
        ({"lm_head.weight": torch.ones(270, 128)}, r"but that model has \[261, 128\] there"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    base: Path, tmp_path: Path, tensors: dict[str, Tensor], said: str
) -> None:
    made = adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ConfigError, match=rf"is an adapter of another model than {base}: .*{said}"):
        apply_adapter(base, made, tmp_path / "out")
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {"peft_type": "IA3"}, "peft_type should be LORA"),
        ({}, {"use_dora": True}, "use_dora: True is not supported"),
        ({}, {"bias": "all"}, "bias: 'all' is not supported"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({}, {"lora_alpha": None}, "lora_alpha: None is no number"),
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(2)}, {}, "kind of adapter is not supported"),
        ({f"{DOWN}.lora_A.weight": torch.ones(2, 2)}, {}, "should have lora_A and lora_B"),
        (
            on(DOWN, {k: v[:, :, None] for k, v in factors().items()}),
            {},
            "are not those of a linear",
        ),
        (on(DOWN, factors(rank=0)), {}, r"factors of shape \[0, \d+\] and \[\d+, 0\] are not"),
        ({}, {"alpha_pattern": {"q_proj(": 3}}, r"alpha_pattern: .* should map patterns of module"),
        ({}, {"alpha_pattern": ["q_proj"]}, r"alpha_pattern: \['q_proj'\] should map patterns"),
        ({}, {"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern: q_proj: '3' is no number"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    base: Path, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, object], said: str
) -> None:
    made = adapter(tmp_path / "adapter", on(QUERY, factors()) | tensors, **config)
    with pytest.raises(ConfigError, match=said):
        apply_adapter(base, made, tmp_path / "out")


def test_changed_embeddings_of_a_tied_model_are_refused(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "tied", layers=1, tied=True)
    made = adapter(tmp_path / "adapter", {"model.embed_tokens.weight": torch.ones(261, 128)})
    with pytest.raises(ConfigError, match="serve as input and as output"):
        apply_adapter(base, made, tmp_path / "out")


def test_what_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", {})
    with pytest.raises(ConfigError, match="has no tensors of an adapter"):
        apply_adapter(base, made, tmp_path / "out")
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(ConfigError, match="only safetensors is read"):
        apply_adapter(base, made, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        apply_adapter(base, base, tmp_path / "out")


def test_an_existing_result_is_kept(base: Path, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", on(QUERY, factors()))
    out = apply_adapter(base, made, tmp_path / "out")
    with pytest.raises(OutputExistsError):
        apply_adapter(base, made, out)
