"""Tiny random decoders of many architectures, each made by transformers from its own config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tests import tiny

LAYERS = 4
_COMMON = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_LOCAL = {"head_dim": 8, "sliding_window": 8}

# Their embeddings have columns for each layer.
BOUND_TO_THEIR_LAYERS = {"gemma4_text"}

# Configs by model type: what transformers needs beside its own defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON,
    "mixtral": {**_COMMON, "num_local_experts": 3},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "qwen2_moe": {
        **_COMMON,
        **_MOE,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {**_COMMON, **_MOE, "head_dim": 8},
    "qwen3_next": {**_COMMON, **_MOE, "shared_expert_intermediate_size": 16, "head_dim": 8},
    "gemma2": {**_COMMON, **_LOCAL},
    "gemma3_text": {**_COMMON, **_LOCAL},
    "gemma4_text": {
        **_COMMON,
        **_LOCAL,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 264,
    },
    "phi3": _COMMON,
    "phi": _COMMON,
    "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "olmo": _COMMON,
    "olmo2": _COMMON,
    "olmo3": {**_COMMON, "sliding_window": 8},
    "gpt2": {**_GPT, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gptj": {
        **_GPT,
        **{"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    },
    "gpt_neo": {
        **_GPT,
        **{"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4},
        **{"max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]]},
    },
    "falcon": {**_GPT, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "bloom": {**_GPT, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "mpt": {"vocab_size": 264, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64},
    "opt": {
        **{key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
        **{"ffn_dim": 48, "word_embed_proj_dim": 32},
    },
    "stablelm": {**_COMMON, "use_qkv_bias": True},
    "starcoder2": _COMMON,
    "cohere": _COMMON,
    "granite": _COMMON,
    "granitemoe": {**_COMMON, "num_local_experts": 3},
    "smollm3": _COMMON,
    "glm4": {**_COMMON, "head_dim": 8},
    "deepseek_v3": {**_COMMON, **_LATENT},
    "gpt_oss": {**_COMMON, **_LOCAL, "num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {**_COMMON, "num_experts": 3, "num_experts_per_tok": 2},
    "mamba": {**_COMMON, "state_size": 8},
    "jamba": {
        **_COMMON,
        **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    },
}


def write(directory: Path, model_type: str, **settings: object) -> Path:
    """A float32 model of `model_type` with four layers and random weights, in `directory`."""
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms and biases too, which start as 1 and 0
            for parameter in model.parameters():
                parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def load(directory: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `directory`, into which every tensor of its files went, and from them alone."""
    model, said = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not any(said.values()), said
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """What `model` says after each of 12 tokens."""
    tokens = torch.arange(12).remainder(7).add(5).unsqueeze(0)
    with torch.no_grad():
        return model(tokens).logits
