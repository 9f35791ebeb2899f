"""Models with different vocabularies, and what mergekit 0.1.5 makes of them.

    python -m tests.golden.vocabularies PATH/TO/mergekit-yaml

records each case of `RECIPES`: the recipe is in this file, the result (embeddings by token, config)
goes into vocabularies.safetensors and vocabularies.json beside it. mergekit numbers new tokens by
chance, so that only rows by token can be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from evomerge.recipe import Recipe, parse_recipe
from tests.golden.inputs import model_shapes, scattered_numbers

HERE = Path(__file__).parent
HIDDEN = 8
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

# By name: special tokens, letters, merges, rows of the embeddings (more than tokens: padding).
MODELS: Mapping[str, tuple[Sequence[str], str, Sequence[str], int]] = {
    "first": (["<s>", "</s>"], "abcd", ["a b", "ab c"], 11),
    "second": (["<pad>", "<s>", "</s>", "<|end|>"], "dcbae", ["c d", "a b"], 12),
    "third": (["</s>", "<s>"], "abce", ["c e", "a b", "ab c"], 9),
    "outside": (["<s>", "</s>"], "fedcba", ["c d", "e f"], 10),
}

RECIPES = {
    "union_of_three": """
        merge_method: linear
        models:
        - {model: first, parameters: {weight: 0.3}}
        - {model: second, parameters: {weight: 0.5}}
        - {model: third, parameters: {weight: 0.2}}
        tokenizer_source: union
        dtype: float32
        """,
    "union_over_a_base": """
        merge_method: task_arithmetic
        base_model: first
        models:
        - {model: second, parameters: {weight: 0.5}}
        - {model: third, parameters: {weight: 0.75}}
        tokenizer_source: union
        dtype: float32
        """,
    "base": """
        merge_method: task_arithmetic
        base_model: first
        models:
        - {model: second, parameters: {weight: 0.5}}
        - {model: third, parameters: {weight: 0.75}}
        tokenizer_source: base
        dtype: float32
        """,
    "outside": """
        merge_method: linear
        models:
        - {model: first, parameters: {weight: 0.25}}
        - {model: third, parameters: {weight: 0.75}}
        tokenizer_source: outside
        dtype: float32
        """,
    "choices": """
        merge_method: linear
        base_model: first
        models:
        - {model: first, parameters: {weight: 0.3}}
        - {model: second, parameters: {weight: 0.5}}
        - {model: third, parameters: {weight: 0.2}}
        tokenizer:
          source: union
          tokens:
            <|end|>: {source: {kind: model_token, model: first, token: </s>}}
            ab: {source: second, force: true}
            e: {source: {kind: zero}}
            a: {source: {kind: zero}, force: true}
            ce: {source: {kind: model_token, model: second, token_id: 11}}
            <new>: {source: {kind: model_token, model: third, token: abc}, force: true}
          pad_to_multiple_of: 8
        dtype: float32
        """,
}


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    return {name: parse_recipe(text, name) for name, text in RECIPES.items()}


def write_models(directory: Path) -> dict[str, str]:
    """Writes every model below `directory`; returns its folder by its name."""
    return {name: str(write_model(directory / name, name)) for name in MODELS}


def write_model(directory: Path, name: str, *, tied: bool = False) -> Path:
    """One of MODELS: a Llama of one layer in bfloat16, and its byte-level tokenizer."""
    specials, letters, merges, rows = MODELS[name]
    directory.mkdir(parents=True)
    shapes = model_shapes(tied=tied, vocabulary=rows, layers=1)
    salt = 100 * (list(MODELS).index(name) + 1)
    tensors = {
        tensor: scattered_numbers(shape, salt + index)
        for index, (tensor, shape) in enumerate(shapes.items())
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config(specials, rows, tied), indent=2))
    write_tokenizer(directory, specials, letters, merges)
    return directory


def write_tokenizer(
    directory: Path, specials: Sequence[str], letters: str, merges: Sequence[str]
) -> None:
    """A byte-level BPE of a few letters: special tokens first, then letters, then merged pairs."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = [*specials, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **({"pad_token": "<pad>"} if "<pad>" in specials else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _config(specials: Sequence[str], rows: int, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "bos_token_id": specials.index("<s>"),
        "eos_token_id": specials.index("</s>"),
        "pad_token_id": specials.index("<pad>") if "<pad>" in specials else None,
        "tie_word_embeddings": tied,
    }


def main(mergekit_yaml: str) -> None:
    """Replaces both recorded files."""
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as work:
        folders = write_models(Path(work) / "inputs")
        for name, recipe in recipes().items():
            config, merged = Path(work) / f"{name}.yaml", Path(work) / "merged" / name
            config.write_text(recipe.with_models(folders).to_yaml())
            command = [mergekit_yaml, str(config), str(merged), "--no-write-model-card", "--quiet"]
            subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            written = load_file(merged / "model.safetensors")
            tensors |= {f"{name}/{tensor}": written[tensor] for tensor in EMBEDDINGS}
            facts[name] = {
                "tokens": AutoTokenizer.from_pretrained(merged).get_vocab(),
                "vocab_size": json.loads((merged / "config.json").read_text())["vocab_size"],
            }
    save_file(tensors, HERE / "vocabularies.safetensors")
    (HERE / "vocabularies.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
