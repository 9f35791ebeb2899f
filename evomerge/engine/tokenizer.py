"""A model directory's tokenizer: chats to prompt text, prompt text to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError


class Tokenizer:
    """The tokenizer of a model directory; chat templates run in transformers' Jinja sandbox."""

    def __init__(self, directory: str, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self.directory = directory
        try:
            self.inner: Any = AutoTokenizer.from_pretrained(
                Path(directory), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # whatever a broken file makes its many readers raise
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ConfigError(f"{directory}: no tokenizer can be read there: {reason}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self.inner.chat_template)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a chat up to the response cue.

        Raises ConfigError where the model's chat template refuses it (a system message, often).
        """
        plain = [dict(message) for message in messages]
        try:
            text = self.inner.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's, and whatever a template's own code runs into
            roles = ", ".join(message["role"] for message in plain)
            raise ConfigError(
                f"{self.directory}: its chat template refuses a chat of {roles}: {error}; change "
                "`system:` or set `chat: false` in the suite"
            ) from error
        return str(text)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(token_ids), skip_special_tokens=True))
