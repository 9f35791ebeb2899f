"""Tiny real checkpoints, written by transformers: what the tests merge, load and generate with.

Every function is deterministic by its `seed` and takes a fraction of a second.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(directory: Path, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (5 special tokens, then 256 bytes: 261 ids), for chats or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    wrapped.save_pretrained(directory)
    return wrapped


def llama(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 8,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 128,
    vocabulary: int = 261,
    chat: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """A Llama with head_dim 64, grouped key-value heads and random weights, in `directory`."""
    config = LlamaConfig(
        **_shape(layers, hidden, vocabulary), head_dim=64, tie_word_embeddings=tied
    )
    return _write(directory, LlamaForCausalLM, config, seed, dtype, chat, max_shard_size)


def qwen2(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 128,
    vocabulary: int = 261,
    chat: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """A Qwen2 (biases on q, k, v) with head_dim 64 and random weights, in `directory`."""
    config = Qwen2Config(**_shape(layers, hidden, vocabulary), tie_word_embeddings=tied)
    return _write(directory, Qwen2ForCausalLM, config, seed, dtype, chat, max_shard_size)


def qwen3(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 128,
    vocabulary: int = 261,
    chat: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """A Qwen3 (norms on q and k) with head_dim 64 and random weights, in `directory`."""
    config = Qwen3Config(
        **_shape(layers, hidden, vocabulary), head_dim=64, tie_word_embeddings=tied
    )
    return _write(directory, Qwen3ForCausalLM, config, seed, dtype, chat, max_shard_size)


def variant(directory: Path, out: Path, *, seed: int, scale: float = 0.02) -> Path:
    """A 'fine-tuned' sibling of `directory` in `out`: every weight plus `scale` · normal noise."""
    shutil.copytree(directory, out)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(out.glob("*.safetensors")):
        tensors = read_tensors(file)
        moved = {
            name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(
                tensor.dtype
            )
            for name, tensor in tensors.items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    return out


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of all such files in a directory, by name."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update({name: tensor.clone() for name, tensor in load_file(file).items()})
    return tensors


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Lets `change` edit the tensors of a one-file checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def edit_config(directory: Path, **changes: object) -> Path:
    """Overwrites keys of a checkpoint's config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))
    return directory


def _shape(layers: int, hidden: int, vocabulary: int) -> dict[str, int]:
    heads = hidden // 64
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write(  # noqa: PLR0917
    directory: Path,
    architecture: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    seed: int,
    dtype: torch.dtype,
    chat: bool,
    max_shard_size: str | int,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
        with torch.no_grad():  # norms and biases too, which start as 1 and 0
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory, chat=chat)
    return directory
