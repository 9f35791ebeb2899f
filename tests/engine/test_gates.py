"""Gates from prompts, beside an independent computation with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.engine.gates import learned_gates
from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint
from tests import tiny

POSITIVE = ["add two numbers", "seven"]
NEGATIVE = ["sing"]
OTHER = ["a song of spring"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("gates") / "base", layers=3, dtype=torch.float32)


def gates(base: Path, mode: str) -> Tensor:
    return learned_gates(Checkpoint.open(base), [(POSITIVE, NEGATIVE), (OTHER, [])], mode)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.pow(2).sum(-1, keepdim=True).sqrt()


def states(base: Path, prompt: str) -> Tensor:
    """What enters each of the three layers, [3, tokens, hidden], caught at the layers' doors."""
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = [1, *AutoTokenizer.from_pretrained(base)(prompt)["input_ids"]]  # 1 is <s>
    caught: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: caught.append(args[0][0]))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return torch.stack(caught)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_gates_are_what_enters_the_layers(base: Path, mode: str) -> None:
    def state(prompts: list[str]) -> Tensor:
        each = [states(base, prompt) for prompt in prompts]
        one = [s.mean(1) if mode == "hidden_avg" else s[:, -1] for s in each]
        return sum(one[1:], one[0]) / len(one)

    expected = torch.stack([unit(state(POSITIVE) - state(NEGATIVE)), unit(state(OTHER))], dim=1)
    found = gates(base, mode)
    assert found.shape == (3, 2, 128)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_cheap_gates_are_sums_of_embeddings(base: Path) -> None:
    table = tiny.read_tensors(base)["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(base)

    def state(prompts: list[str]) -> Tensor:
        ids = [token for prompt in prompts for token in [1, *tokenizer(prompt)["input_ids"]]]
        return unit(sum((table[token] for token in ids), torch.zeros(128)))

    expected = torch.stack([unit(state(POSITIVE) - state(NEGATIVE)), unit(state(OTHER))])
    found = gates(base, "cheap_embed")
    assert found.shape == (3, 2, 128)
    for layer in found:  # the same for all layers
        torch.testing.assert_close(layer, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_a_prompt_counts_the_same_beside_longer_ones(base: Path, mode: str) -> None:
    checkpoint = Checkpoint.open(base)
    alone = learned_gates(checkpoint, [(["seven"], []), (OTHER, [])], mode)
    beside = learned_gates(
        checkpoint, [(["seven"], []), (["much longer than that " * 9], [])], mode
    )
    assert torch.equal(alone[:, 0], beside[:, 0])


def test_a_bfloat16_base_gives_nearly_the_same_gates(base: Path, tmp_path: Path) -> None:
    rounded = tiny.llama(tmp_path / "rounded", layers=3, dtype=torch.bfloat16)
    torch.testing.assert_close(gates(rounded, "hidden"), gates(base, "hidden"), rtol=0, atol=0.01)


def test_a_prompt_without_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    silent = tiny.variant(base, tmp_path / "silent", seed=0, scale=0)
    tokenizer = tiny.write_tokenizer(silent)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.save_pretrained(silent)
    with pytest.raises(ConfigError, match="'xx' has no tokens"):
        learned_gates(Checkpoint.open(silent), [(["xx"], [])], "cheap_embed")
