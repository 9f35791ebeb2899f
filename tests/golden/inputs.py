"""The models that the recorded merges were made of: exact on every machine, from no random numbers.

Three Llamas with four layers (`base`, `first`, `second`), two with tied embeddings (`tied_base`,
`tied_first`) and two Qwen2 with biases (`qwen_base`, `qwen_first`), all in bfloat16; and a base
with three fine-tunes in float32 (`fine_base` …), whose differences are all of another magnitude:
which of equal ones a method keeps is left open by mergekit.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 4, 8, 12, 4, 10
NAMES = (
    *("base", "first", "second", "tied_base", "tied_first", "qwen_base", "qwen_first"),
    *("fine_base", "fine_first", "fine_second", "fine_third"),
)


def write_inputs(directory: Path) -> dict[str, str]:
    """Writes every model below `directory`; returns its folder by its name."""
    for salt, name in enumerate(NAMES):
        _write_model(directory / name, salt, tied="tied" in name, qwen="qwen" in name)
    return {name: str(directory / name) for name in NAMES}


def _write_model(directory: Path, salt: int, *, tied: bool, qwen: bool) -> None:
    directory.mkdir(parents=True)
    shapes = model_shapes(tied=tied, qwen=qwen)
    fine = directory.name.startswith("fine")
    tensors = {
        name: (
            _fine_numbers(shape, salt, index)
            if fine
            else scattered_numbers(shape, 1000 * salt + index)
        )
        for index, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = _config(tied=tied, qwen=qwen) | ({"dtype": "float32"} if fine else {})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    words = {f"word{index}": index for index in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(directory / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "word0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def scattered_numbers(shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) with 8 significant bits, scattered by a multiplicative hash."""
    count = int(torch.Size(shape).numel())
    places = torch.arange(1, count + 1, dtype=torch.int64) + 7919 * (salt + 1)
    return ((places * 2654435761 % 2**32 // 2**24 - 128) / 256).reshape(shape).to(torch.bfloat16)


def _fine_numbers(shape: tuple[int, ...], salt: int, index: int) -> torch.Tensor:
    """The base's numbers in [-0.5, 0.5), and for a fine-tune others in [-1/16, 1/16) added."""
    base = NAMES.index("fine_base")
    numbers = _finely_scattered(shape, 1000 * base + index)
    return numbers if salt == base else numbers + _finely_scattered(shape, 1000 * salt + index) / 8


def _finely_scattered(shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) with 24 bits, whose differences are scattered as well."""
    count = int(torch.Size(shape).numel())
    places = torch.arange(1, count + 1, dtype=torch.int64) + 7919 * (salt + 1)
    for _ in range(2):
        places = places * 2654435761 % 2**31
        places ^= places >> 15
    return ((places % 2**24).double() / 2**24 - 0.5).float().reshape(shape)


def model_shapes(
    *, tied: bool, qwen: bool = False, vocabulary: int = VOCABULARY, layers: int = LAYERS
) -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny model by name, in the order of its parts."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", HIDDEN), ("k_proj", KEYS), ("v_proj", KEYS)):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (rows, HIDDEN)
            if qwen:
                shapes[f"{prefix}.self_attn.{name}.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, HIDDEN)}


def _config(*, tied: bool, qwen: bool) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
    }
