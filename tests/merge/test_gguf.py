"""GGUF files, read by llama.cpp itself and by transformers' own loader."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from evomerge.cli import main
from evomerge.errors import ConfigError, OutputExistsError, RunError
from evomerge.merge import gguf as gguf_module
from evomerge.merge import gguf_vocabulary
from evomerge.merge.gguf import TYPES, write_gguf
from evomerge.merge.inputs import InputModels
from evomerge.merge.lora import apply_adapter
from tests import tiny, tiny_tokenizers

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install .[gguf])")

VOCABULARY = 410
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3 = GEMMA2 | {"num_hidden_layers": 7}

# By name: config class, model class, what its config has beside `shape()`.
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-wide-heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 64}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN_ROPE}),
    "mistral-7": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "mixtral-tied": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 4, "tie_word_embeddings": True},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
    "qwen2-moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, EXPERTS | SHARED_EXPERT),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    ),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen2-moe-tied": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        EXPERTS | SHARED_EXPERT | {"tie_word_embeddings": True},
    ),
    "qwen2-moe-of-all": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        EXPERTS | SHARED_EXPERT | {"norm_topk_prob": True, "num_experts_per_tok": 4},
    ),
    "qwen3-moe-tied": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"head_dim": 32, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 64}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA2),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA3),
    "gemma3-untied": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA3 | {"tie_word_embeddings": False},
    ),
    "gemma3-linear": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA3 | {"rope_parameters": GEMMA3_ROPE},
    ),
}
# What transformers' loader reads right: it knows no experts of Mixtral, no biases, no rope scaling,
# and takes Gemma's attention scale for 1/√256.
READ_BY_TRANSFORMERS = ("llama", "mistral-7", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe")
PROMPT = torch.randint(5, 380, (40,), generator=torch.Generator().manual_seed(3)).tolist()
STEPS, EOS = 12, 2


def build(directory: Path, family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random model of MODELS with a byte-level tokenizer, in `directory`."""
    config_class, model_class, own = MODELS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**(shape() | own | config)))
        with torch.no_grad():  # large layers, so that more than the last token decides
            for name, parameter in model.named_parameters():
                scale = 0.25 if "layers" in name and parameter.dim() > 1 else 0.1
                parameter.add_(scale * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    tiny_tokenizers.byte_level(directory)
    return directory


def shape() -> dict[str, int]:
    return {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }


def greedy(model: Any) -> list[int]:
    """The STEPS tokens after PROMPT."""
    ids = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(ids[0, len(PROMPT) :].tolist())


def assert_greedy(model: Any, tokens: list[int]) -> None:
    """That `tokens` are the likeliest after PROMPT, each after those before it, EOS left out.

    Another program's sums decide between two that are as likely to 3 % (llama.cpp rounds what goes
    into bf16 and f16 matrices).
    """
    assert len(tokens) == STEPS
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].float()
    likely = torch.log_softmax(logits, -1)
    likely[:, EOS] = -torch.inf
    chosen = likely[torch.arange(STEPS), torch.tensor(tokens)]
    assert float((likely.amax(-1) - chosen).max()) < 0.03
    assert len(set(tokens)) > 2


def likelihoods(model: Any, length: int) -> Tensor:
    """Log-probabilities [vocabulary] of what follows PROMPT[:length]."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT[:length]])).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)


def loaded(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


class LlamaCpp:
    """A GGUF file in llama.cpp, asked through its own server's routes."""

    def __init__(self, file: Path) -> None:
        llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel here")
        parameters = llama_cpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = 256
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.warmup = False
        parameters.fit_params = False
        parameters.verbosity = 1
        parameters.cache_type_k = llama_cpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        self.server = llama_cpp.Server(parameters)

    def ask(self, route: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def greedy(self) -> list[int]:
        settings = {"temperature": 0, "ignore_eos": True, "return_tokens": True}
        answer = self.ask("/completion", prompt=PROMPT, n_predict=STEPS, **settings)
        return list(answer["tokens"])

    def likelihoods(self, count: int = 20) -> tuple[int, dict[int, float]]:
        """The log-probabilities of the likeliest `count` tokens after PROMPT[:length], and length.

        That is the longest beginning after which a whole letter comes: of parts the server does
        not tell.
        """
        settings = {"n_predict": 1, "temperature": 0, "n_probs": count}
        for length in range(len(PROMPT), 0, -1):
            answer = self.ask("/completion", prompt=PROMPT[:length], **settings)
            for told in answer.get("completion_probabilities", []):
                return length, {entry["id"]: entry["logprob"] for entry in told["top_logprobs"]}
        raise AssertionError("no likelihoods")

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        answer = self.ask("/tokenize", content=text, add_special=add_special, parse_special=True)
        return list(answer["tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_as_the_model_does(name: str, tmp_path: Path) -> None:
    model = build(tmp_path / name, name)
    assert write_gguf(model, tmp_path / "m.gguf", "f32") == ()
    ours, theirs = loaded(model), LlamaCpp(tmp_path / "m.gguf")
    assert_greedy(ours, theirs.greedy())
    length, likely = theirs.likelihoods()
    expected = likelihoods(ours, length)
    for token, likelihood in likely.items():
        assert likelihood == pytest.approx(float(expected[token]), abs=0.02)


def ungated(directory: Path, **config: Any) -> Path:
    """A Qwen2-MoE whose shared experts have gates of 0."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("shared_expert_gate.weight"):
                tensor.zero_()

    return tiny.rewrite(build(directory, "qwen2-moe", **config), spoil)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_experts_without_gates_are_exported_as_a_model_that_has_none(
    normalised: bool, tied: bool, tmp_path: Path
) -> None:
    model = ungated(tmp_path / "m", norm_topk_prob=normalised, tie_word_embeddings=tied)
    write_gguf(model, tmp_path / "m.gguf", "f32")
    assert fields_of(tmp_path / "m.gguf")["general.architecture"] == "bailingmoe"
    ours, theirs = loaded(model), LlamaCpp(tmp_path / "m.gguf")
    length, likely = theirs.likelihoods()
    expected = likelihoods(ours, length)
    for token, likelihood in likely.items():
        assert likelihood == pytest.approx(float(expected[token]), abs=0.02)


MIXTURES = {
    "mixtral": ("llama", "", "llama"),
    "mixtral-of-mistral": ("mistral-7", "", "llama"),
    "qwen2-moe": ("qwen2", "shared_experts: [{source_model: a, residual_scale: 0.5}]", "qwen2moe"),
    "deepseek": (
        "llama",
        "architecture: deepseek\nexperts_per_token: 1\nshared_experts: [{source_model: b}]",
        "bailingmoe",
    ),
    "qwen3-moe": ("qwen3-tied", "", "qwen3moe"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_evomerge_made_are_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dense, more, arch = MIXTURES[name]
    tiny.variant(build(tmp_path / "a", dense), tmp_path / "b", seed=1)
    if "shared" in more and dense == "qwen2":
        more += "\narchitecture: qwen"
    gates = "\n".join(
        f"  - {{source_model: {model}, positive_prompts: [{prompt}]}}"
        for model, prompt in (("a", "hello world"), ("b", "the models"))
    )
    if dense == "qwen2":
        more = more.replace("{source_model: a,", "{source_model: a, positive_prompts: [a],")
    text = f"base_model: a\ngate_mode: hidden\ndtype: float32\nexperts:\n{gates}\n{more}\n"
    (tmp_path / "moe.yaml").write_text(text)
    assert main(["moe", "moe.yaml", "mixture"]) == 0
    write_gguf(tmp_path / "mixture", tmp_path / "m.gguf", "f32")
    assert fields_of(tmp_path / "m.gguf")["general.architecture"] == arch
    assert_greedy(loaded(tmp_path / "mixture"), LlamaCpp(tmp_path / "m.gguf").greedy())


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    model = build(tmp_path / name, name)
    write_gguf(model, tmp_path / "m.gguf", "f32")
    ours, theirs = loaded(model), loaded(tmp_path, gguf_file="m.gguf")
    weights = ours.state_dict()
    assert theirs.state_dict().keys() == weights.keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(weight, weights[key]), key
    assert greedy(theirs) == greedy(ours)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_transformers_reads_gemmas_weights_to_the_rounding_of_one_plus(
    name: str, tmp_path: Path
) -> None:
    model = build(tmp_path / name, name, head_dim=256, query_pre_attn_scalar=256)
    write_gguf(model, tmp_path / "m.gguf", "f32")
    ours, theirs = loaded(model), loaded(tmp_path, gguf_file="m.gguf")
    weights = ours.state_dict()
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-7)
    assert greedy(theirs) == greedy(ours)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_wide_types_hold_the_weights_rounded_once(kind: str, name: str, tmp_path: Path) -> None:
    model = build(tmp_path / name, name, dtype=torch.bfloat16)
    write_gguf(model, tmp_path / "m.gguf", kind)
    ours, theirs = loaded(model), LlamaCpp(tmp_path / "m.gguf")
    assert_greedy(ours, theirs.greedy())
    stored = read_file(tmp_path / "m.gguf")
    embeddings = tiny.read_tensors(model)["model.embed_tokens.weight"]
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
    assert torch.equal(stored["token_embd.weight"], embeddings.to(dtype).float())
    assert types_of(tmp_path / "m.gguf")["token_embd.weight"] == kind
    assert types_of(tmp_path / "m.gguf")["output_norm.weight"] == "f32"


# Half a step of the widest block, in units of its largest number; q8_0's is 1/254.
STEP = {"q8_0": 1 / 254, "q5_1": 1 / 30, "q5_0": 1 / 16, "q4_1": 1 / 14, "q4_0": 1 / 8}


@pytest.mark.parametrize("kind", sorted(STEP))
def test_q_types_are_near_the_weights_and_load(kind: str, tmp_path: Path) -> None:
    model = build(tmp_path / "llama", "llama")
    assert write_gguf(model, tmp_path / "m.gguf", kind) == ()
    weight = tiny.read_tensors(model)["model.layers.1.mlp.down_proj.weight"]
    stored = read_file(tmp_path / "m.gguf")["blk.1.ffn_down.weight"]
    largest = weight.reshape(-1, 32).abs().amax(1, keepdim=True)
    off = (stored - weight).reshape(-1, 32).abs() / largest
    assert STEP[kind] / 4 < float(off.max()) <= STEP[kind] * 1.05 + 2**-11  # of a scale in f16
    assert types_of(tmp_path / "m.gguf")["blk.1.ffn_down.weight"] == kind
    assert types_of(tmp_path / "m.gguf")["output.weight"] == "q8_0"
    assert len(LlamaCpp(tmp_path / "m.gguf").greedy()) == STEPS


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "qwen2"])
def test_q8_0_has_close_likelihoods(name: str, tmp_path: Path) -> None:
    model = build(tmp_path / name, name)
    write_gguf(model, tmp_path / "m.gguf", "q8_0")
    length, likely = LlamaCpp(tmp_path / "m.gguf").likelihoods(VOCABULARY)
    expected = likelihoods(loaded(model), length)
    assert len(likely) == VOCABULARY
    divergence = sum(
        float(expected[token].exp() * (expected[token] - other)) for token, other in likely.items()
    )
    assert -1e-6 < divergence < 0.01


def test_rows_that_are_no_multiple_of_32_are_f16(tmp_path: Path) -> None:
    model = build(tmp_path / "llama", "llama", intermediate_size=80)
    (note,) = write_gguf(model, tmp_path / "m.gguf", "q4_0")
    assert note.startswith("3 tensors whose rows are no multiple of 32 are f16: blk.0.ffn_down")
    types = types_of(tmp_path / "m.gguf")
    assert (types["blk.2.ffn_down.weight"], types["blk.2.ffn_up.weight"]) == ("f16", "q4_0")
    assert len(LlamaCpp(tmp_path / "m.gguf").greedy()) == STEPS


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_small_pieces_make_the_same_file(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / name, name)
    write_gguf(model, tmp_path / "whole.gguf", kind)
    monkeypatch.setattr(gguf_module, "_PIECE", 500)
    write_gguf(model, tmp_path / "pieces.gguf", kind)
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("name", "old", "matrices"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3-moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_fused_experts_make_the_same_tensors(
    name: str, old: str, matrices: tuple[str, str, str], tmp_path: Path
) -> None:
    model = build(tmp_path / name, name)
    write_gguf(model, tmp_path / "each.gguf", "f16")

    def fuse(tensors: dict[str, Tensor]) -> None:
        for layer in range(3):
            start = f"model.layers.{layer}"
            gate, up, down = (
                torch.stack(
                    [tensors.pop(f"{start}.{old}.experts.{e}.{matrix}.weight") for e in range(4)]
                )
                for matrix in matrices
            )
            tensors[f"{start}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            tensors[f"{start}.mlp.experts.down_proj"] = down
            tensors[f"{start}.mlp.gate.weight"] = tensors.pop(f"{start}.{old}.gate.weight")

    write_gguf(tiny.rewrite(model, fuse), tmp_path / "fused.gguf", "f16")
    each, fused = read_file(tmp_path / "each.gguf"), read_file(tmp_path / "fused.gguf")
    assert each.keys() == fused.keys()
    for key, tensor in each.items():
        assert torch.equal(fused[key], tensor), key
    assert each["blk.0.ffn_down_exps.weight"].shape[0] == 4


def test_a_stored_head_of_a_tied_model_and_old_tables_are_left_out(tmp_path: Path) -> None:
    model = build(tmp_path / "llama3", "llama3")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones(VOCABULARY, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    write_gguf(tiny.rewrite(model, add), tmp_path / "m.gguf", "f32")
    names = types_of(tmp_path / "m.gguf").keys()
    assert "output.weight" not in names
    assert {name for name in names if "rope" in name} == {"rope_freqs.weight"}


TEXTS = (
    "こんにちは hello don't 1234 ぬ",
    "The quick brown fox",
    "東京タワー と東京 <|user|>東京",
    "new line\n\n\ttab 😀 zzz, merge  models",
    "日本語のテスト、models THEY'RE 12345",
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# By name: what writes the tokenizer, and llama.cpp's names for its kind and its words.
TOKENIZERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "gpt-2": (tiny_tokenizers.byte_level, "gpt2", "gpt-2"),
    "llama3": (
        lambda out: tiny_tokenizers.byte_level(out, split(LLAMA3_WORDS), ignore_merges=True),
        "gpt2",
        "llama-bpe",
    ),
    "qwen2": (
        lambda out: tiny_tokenizers.byte_level(out, split(LLAMA3_WORDS.replace("{1,3}", ""))),
        "gpt2",
        "qwen2",
    ),
    "tekken": (
        lambda out: tiny_tokenizers.byte_level(out, split(TEKKEN_WORDS), ignore_merges=True),
        "gpt2",
        "tekken",
    ),
    "llama2": (tiny_tokenizers.sentencepiece, "llama", "default"),
    "gemma": (
        lambda out: tiny_tokenizers.sentencepiece(out, adds_space=False),
        "llama",
        "default",
    ),
    "t5": (tiny_tokenizers.unigram, "t5", "default"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_has_the_tokenizers_ids(name: str, tmp_path: Path) -> None:
    write, kind, words = TOKENIZERS[name]
    model = build(tmp_path / "m", "llama")
    write(model)
    write_gguf(model, tmp_path / "m.gguf", "f16")
    fields = fields_of(tmp_path / "m.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == (kind, words)
    tokenizer, llama_cpp = AutoTokenizer.from_pretrained(model), LlamaCpp(tmp_path / "m.gguf")
    # llama.cpp puts a space after a special token, too, wherever it puts one first.
    for text in TEXTS if name != "t5" else [text.replace("<|user|>", "") for text in TEXTS]:
        assert llama_cpp.encode(text) == tokenizer(text)["input_ids"], text
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama_cpp.encode(text, add_special=False) == plain
    chat = [{"role": "user", "content": "東京?"}]
    answer = llama_cpp.ask("/apply-template", messages=chat)
    assert answer["prompt"] == tokenizer.apply_chat_template(chat, tokenize=False)


def test_transformers_reads_the_byte_level_tokenizer_back(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    write_gguf(model, tmp_path / "m.gguf", "f16")
    ours = AutoTokenizer.from_pretrained(model)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == tiny_tokenizers.CHAT_TEMPLATE
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_types_and_ids_of_tokens(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    tokenizer = tiny_tokenizers.sentencepiece(model)
    write_gguf(model, tmp_path / "m.gguf", "f16")
    fields = fields_of(tmp_path / "m.gguf")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kinds = gguf.TokenType
    assert len(tokens) == VOCABULARY
    assert types[1] == kinds.CONTROL
    assert types[3] == kinds.UNKNOWN
    assert types[tokens.index("<0x0A>")] == kinds.BYTE
    assert types[tokens.index("東京タワー")] == kinds.USER_DEFINED
    pieces = [token for token in tokens if len(token) > 1 and token.startswith("▁")]
    assert types[tokens.index(pieces[0])] == kinds.NORMAL
    assert types[len(tokenizer) :] == [kinds.UNUSED] * (VOCABULARY - len(tokenizer))
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 3}
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def test_named_chat_templates_are_all_kept(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(model)
    write_gguf(model, tmp_path / "m.gguf", "f16")
    fields = fields_of(tmp_path / "m.gguf")
    assert fields["tokenizer.chat_template"] == "plain"
    assert fields["tokenizer.chat_template.tool_use"] == "with tools"


def test_a_unigram_with_byte_fallback_is_told_about(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    tiny_tokenizers.unigram(model)
    file = model / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["byte_fallback"] = True
    described["normalizer"] = {"type": "NFKC"}
    file.write_text(json.dumps(described))
    notes = write_gguf(model, tmp_path / "m.gguf", "f16")
    assert len(notes) == 2
    assert "no byte fallback" in notes[0]
    assert "does not normalise text (NFKC)" in notes[1]


def test_tokens_beyond_the_embeddings_are_left_out_and_told_about(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra-{index}>" for index in range(VOCABULARY - len(tokenizer) + 4)])
    tokenizer.save_pretrained(model)
    (note,) = write_gguf(model, tmp_path / "m.gguf", "f16")
    assert note.startswith("tokenizer: 4 tokens (<extra-")
    assert note.endswith("have ids beyond the model's 410 embeddings and are left out")
    assert len(fields_of(tmp_path / "m.gguf")["tokenizer.ggml.tokens"]) == VOCABULARY
    assert len(LlamaCpp(tmp_path / "m.gguf").greedy()) == STEPS


def test_a_window_that_llama_cpp_does_not_have_is_told_about(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "mistral-7", sliding_window=64)
    (note,) = write_gguf(model, tmp_path / "m.gguf", "f16")
    assert note.startswith("sliding_window: 64: llama.cpp attends to the whole context")


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar: 100: it has 32"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: false"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "full attention in every 6th layer"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob: False: it has True"),
        ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob: True: it has False"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "it has experts in every layer"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu: it has silu"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "rope_type: llama3: it has default, linear"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = build(tmp_path / "m", name, **config)
    with pytest.raises(ConfigError, match=said) as told:
        write_gguf(model, tmp_path / "m.gguf", "f16")
    assert str(told.value).startswith(f"{model / 'config.json'}: llama.cpp's ")
    assert os.listdir(tmp_path) == ["m"]


def whole_word(directory: Path) -> None:
    tiny_tokenizers.byte_level(directory, pre_tokenizers.Whitespace())


def unmerged(directory: Path) -> None:
    tiny.write_tokenizer(directory)


def without_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def word_pieces(directory: Path) -> None:
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"] = {
        "type": "WordLevel",
        "vocab": described["model"]["vocab"],
        "unk_token": "<unk>",
    }
    file.write_text(json.dumps(described))


def unknown_architecture(directory: Path) -> None:
    tiny.edit_config(directory, architectures=["OlmoForCausalLM"])


def missing_expert(directory: Path) -> None:
    tiny.edit_config(directory, num_local_experts=5)


def odd_tensor(directory: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_norm.weight"] = torch.ones(32)

    tiny.rewrite(directory, add)


def large(directory: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 70000.0

    tiny.rewrite(directory, spoil)


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "words": (
        "llama",
        whole_word,
        r"into words in a way .* \(Whitespace \+ bytes\); known are gpt-2",
    ),
    "merges": ("llama", unmerged, "the tokenizer merges no bytes"),
    "no tokenizer": ("llama", without_tokenizer, "no tokenizer can be read there"),
    "kind": ("llama", word_pieces, "a tokenizer of kind WordLevel cannot be exported"),
    "architecture": (
        "llama",
        unknown_architecture,
        "OlmoForCausalLM cannot be exported to GGUF; Ll",
    ),
    "expert": ("mixtral", missing_expert, "config.json counts 5 experts, but the tensors"),
    "tensor": ("llama", odd_tensor, r"k_norm\.weight has no place in llama\.cpp's llama"),
    "number": ("llama", large, r"blk\.1\.attn_output\.weight: has a number that f16 cannot hold"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    name, damage, said = BROKEN[case]
    model = build(tmp_path / "m", name)
    damage(model)
    with pytest.raises(ConfigError, match=said):
        write_gguf(model, tmp_path / "m.gguf", "f16")
    assert os.listdir(tmp_path) == ["m"]


def test_shared_experts_of_both_kinds_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "qwen2-moe")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.shared_expert_gate.weight"].zero_()

    with pytest.raises(ConfigError, match=r"layers\.1\.\S+ is 0 and \S+ is not; llama\.cpp has no"):
        write_gguf(tiny.rewrite(model, spoil), tmp_path / "m.gguf", "f16")
    uneven = ungated(tmp_path / "uneven", shared_expert_intermediate_size=48)
    with pytest.raises(ConfigError, match="shared_expert_intermediate_size: 48: without gates"):
        write_gguf(uneven, tmp_path / "m.gguf", "f16")


def test_a_missing_gguf_package_is_named_with_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"one more package: pip install 'evomerge\[gguf\]'"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16")


def test_numbers_beyond_f16_are_exported_as_bf16(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    large(model)
    write_gguf(model, tmp_path / "m.gguf", "bf16")
    stored = read_file(tmp_path / "m.gguf")["blk.1.attn_output.weight"]
    assert float(stored[0, 0]) == float(torch.tensor(70000.0).bfloat16())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more bytes than `size` to one file: a full disk, nearly."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_disk_that_fails_leaves_what_was_there(size: int, tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with files_of_at_most(size), pytest.raises(RunError, match=r"m\.gguf: writing failed"):
        write_gguf(model, out, "f32", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["m", "m.gguf"]
    assert out.read_text() == "precious"


def test_what_a_killed_export_left_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    left = tmp_path / "m.gguf.partial"
    left.write_bytes(b"GGUF and then nothing" * 100_000)
    with left.open("ab") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing it"):
            write_gguf(model, tmp_path / "m.gguf", "f16")
        assert left.exists()
    write_gguf(model, tmp_path / "m.gguf", "f16")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.gguf"]
    assert len(LlamaCpp(tmp_path / "m.gguf").greedy()) == STEPS


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # transformers' own progress
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_exports_any_model_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build(tmp_path / "m", "llama", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter")
    status, out, _ = run(capsys, "gguf", "m+adapter", "out/tuned.gguf", "--type", "bf16")
    assert (status, out) == (0, "out/tuned.gguf\n")
    tuned = apply_adapter(model, adapter, tmp_path / "tuned")
    assert_greedy(loaded(tuned), LlamaCpp(tmp_path / "out" / "tuned.gguf").greedy())
    assert fields_of(tmp_path / "out" / "tuned.gguf")["general.name"] == "m+adapter"
    # A GGUF file is a model, too: what it becomes and is exported again holds the same numbers.
    status, out, err = run(capsys, "gguf", "out/tuned.gguf", "again.gguf", "--type", "bf16")
    assert status == 0, err
    first, second = read_file(tmp_path / "out" / "tuned.gguf"), read_file(tmp_path / "again.gguf")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_the_command_tells_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "m", "llama", intermediate_size=80)
    status, out, err = run(capsys, "gguf", "m", "m.gguf", "--type", "q8_0")
    assert (status, out) == (0, "m.gguf\n")
    assert err.startswith("note: 3 tensors whose rows are no multiple of 32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("m", "m.gguf", "--type", "q8"), "--type: 'q8' is not written here; did you mean 'q8_0'?"),
        (("m", "m.gguf", "--type", "q4_k_m"), "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0"),
        (("m", "m.bin"), "m.bin: the name of a GGUF file should end in .gguf"),
        (("m", "taken.gguf"), "taken.gguf: exists already; --overwrite replaces it"),
        (("m", "folder.gguf", "--overwrite"), "folder.gguf: exists and is no file"),
        (("taken.gguf", "taken.gguf", "--overwrite"), "taken.gguf: is an input, too"),
        (("taken.gguf+a", "taken.gguf", "--overwrite"), "taken.gguf: is an input, too"),
        (("nothing", "m.gguf"), "nothing: this model is neither a folder"),
        (("m", "taken.gguf/m.gguf"), "m.gguf.partial: cannot be made ("),
    ],
)
def test_a_command_that_cannot_be_right_is_refused(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "m", "llama")
    (tmp_path / "taken.gguf").write_text("precious")
    (tmp_path / "folder.gguf").mkdir()
    before = sorted(os.listdir(tmp_path))
    status, out, err = run(capsys, "gguf", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "taken.gguf").read_text() == "precious"


def test_an_existing_file_is_replaced_on_request(tmp_path: Path) -> None:
    model = build(tmp_path / "m", "llama")
    out = tmp_path / "m.gguf"
    out.write_text("old")
    with pytest.raises(OutputExistsError):
        write_gguf(model, out, "f16")
    write_gguf(model, out, "f16", overwrite=True)
    assert types_of(out)["token_embd.weight"] == "f16"


def test_all_types_are_those_that_the_gguf_package_can_write() -> None:
    for kind in TYPES:
        assert gguf.GGMLQuantizationType[kind.upper()] in gguf.GGML_QUANT_SIZES
    assert gguf_vocabulary.CONTROL == gguf.TokenType.CONTROL
    names = ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
    for name in names:
        assert getattr(gguf_vocabulary, name) == gguf.TokenType[name]


def write_adapter(directory: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    directory.mkdir()
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": torch.randn(4, 64, generator=generator),
        f"{name}.lora_B.weight": torch.randn(64, 4, generator=generator),
    }
    tiny.save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def read_file(file: Path) -> dict[str, Tensor]:
    """A GGUF file's tensors in float32, by name; rows of q and k in its own order."""
    reader = gguf.GGUFReader(file)
    return {
        tensor.name: torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).copy()
        ).float()
        for tensor in reader.tensors
    }


def types_of(file: Path) -> dict[str, str]:
    return {
        tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors
    }


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def as_input(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and what its GGUF file becomes where a recipe names it."""
    model = build(tmp_path / name, name)
    write_gguf(model, tmp_path / "m.gguf", "f32")
    inputs = InputModels(tmp_path / "storage", folder=tmp_path, dtype="float32")
    return model, inputs.resolve("m.gguf")


# Tied ones, too.
READ_AS_INPUTS = ("llama", "mistral-7", "qwen2", "qwen3")


@pytest.mark.parametrize("name", READ_AS_INPUTS)
def test_a_gguf_file_as_an_input_is_its_model(name: str, tmp_path: Path) -> None:
    model, read = as_input(name, tmp_path)
    with torch.no_grad():
        ours, theirs = (loaded(path)(torch.tensor([PROMPT])).logits for path in (model, read))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama3", r"m\.gguf: its scaling of positions \(rope_freqs\) would be lost"),
        ("llama-biases", r"m\.gguf: .*not read all.*numbers in the file"),
        ("llama-linear", r"m\.gguf: its scaling of positions \(linear\) would be lost"),
        ("llama-yarn", r"m\.gguf: its scaling of positions \(yarn\) would be lost"),
        ("mixtral", r"m\.gguf: .*(cannot be read|not read all)"),
        ("qwen3-moe", r"m\.gguf: GGUF files of llama, qwen2, qwen3 are read right, .* qwen3moe"),
        ("gemma2", r"m\.gguf: GGUF files of .* are read right, this one is of gemma2"),
    ],
)
def test_a_gguf_file_that_would_become_another_model_is_refused(
    name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        as_input(name, tmp_path)
    assert not any((tmp_path / "storage").rglob("*.safetensors"))
