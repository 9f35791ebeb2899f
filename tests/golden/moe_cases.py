"""The mixtures of experts that mergekit 0.1.5 recorded, by name; models as in `inputs.py`.

Prompts of one expert have equal lengths here: mergekit lets padding into its averages.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.golden.inputs import VOCABULARY, write_inputs

_PROMPTS = """
        - source_model: base
          positive_prompts: [word2 word3, word4 word4]
          negative_prompts: [word5]
        - source_model: first
          positive_prompts: [word6 word7 word8]
        """
CASES = {
    # ELYZA-japanese-Llama-2-MoE-2x13B as published, with tiny models in place of the 13B ones.
    "moe_elyza": """
        base_model: base
        gate_mode: random
        dtype: bfloat16
        experts:
        - {source_model: base, positive_prompts: []}
        - {source_model: first, positive_prompts: []}
        tokenizer_source: model:base
        """,
    "moe_cheap_embed": f"""
        base_model: base
        gate_mode: cheap_embed
        dtype: float32
        experts: {_PROMPTS}
        """,
    "moe_hidden": f"""
        base_model: base
        gate_mode: hidden
        dtype: float32
        experts: {_PROMPTS}
        """,
    "moe_hidden_avg": f"""
        base_model: base
        gate_mode: hidden_avg
        dtype: float32
        experts: {_PROMPTS}
        """,
    "moe_qwen_scaled": """
        base_model: qwen_base
        gate_mode: random
        dtype: float32
        experts:
        - {source_model: qwen_base, residual_scale: 0.3}
        - {source_model: qwen_first}
        shared_experts:
        - {source_model: qwen_first, residual_scale: 0.5}
        """,
    # mergekit fails where the shared expert is not among the other models.
    "moe_deepseek": """
        base_model: base
        gate_mode: cheap_embed
        dtype: float32
        architecture: deepseek
        experts:
        - {source_model: base, positive_prompts: [word2]}
        - {source_model: first, positive_prompts: [word3]}
        shared_experts:
        - {source_model: first}
        """,
}


def write_moe_inputs(directory: Path) -> dict[str, str]:
    """The models of `inputs.py`, whose tokenizers split at spaces and begin with word1."""
    folders = write_inputs(directory)
    for folder in folders.values():
        words = {f"word{index}": index for index in range(VOCABULARY)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "word0",
            "bos_token": "word1",
            "eos_token": "word9",
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    return folders
