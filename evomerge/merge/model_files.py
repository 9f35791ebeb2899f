"""The small files of a model's folder: what they are called, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
ADAPTER_CONFIG = "adapter_config.json"
# Any one of them is enough to make a tokenizer from.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# All that a tokenizer may consist of; TEMPLATE_FOLDER may hold more of its chat templates.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def require_tokenizer(directory: Path) -> None:
    """Raises ConfigError where `directory` has nothing to make a tokenizer from."""
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(
            f"{directory}: this model has no tokenizer (one of {', '.join(VOCABULARY_FILES)}); "
            "copy the one that it was trained with into it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file; ConfigError where it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent}: has no {path.name}, so it is no model directory"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: should be a JSON object")
    return content


def small_files(directory: Path) -> list[Path]:
    """What beside config and tensors decides a model's answers."""
    named = [directory / name for name in (*TOKENIZER_FILES, GENERATION_FILE)]
    templates = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return [file for file in (*named, *templates) if file.is_file()]
