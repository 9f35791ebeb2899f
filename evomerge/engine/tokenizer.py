"""A model directory's tokenizer: chats to prompt text, prompt text to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, reason_of


def read_config(directory: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model directory; ConfigError where it is broken."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            Path(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a broken file makes an architecture's own code raise
        raise ConfigError(f"{directory}: its config.json: {reason_of(error)}") from error


def longest_context(config: Any, directory: str) -> int:
    """The tokens, prompt and answer together, that a model was made for, by its configuration.

    Raises ConfigError where that does not say.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise ConfigError(
            f"{directory}: its config.json does not say how long a context may be; give it by "
            "`engine: {max_model_len: N}`, or --max-model-len"
        )
    return positions


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
            reason = reason_of(error)
            raise ConfigError(f"{directory}: no tokenizer can be read there: {reason}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self.inner.chat_template)

    @property
    def bos_token_id(self) -> int | None:
        found: int | None = self.inner.bos_token_id
        return found

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self.inner.eos_token_id
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        """The prompt text of a chat, with the response cue or not.

        By the Jinja text `template`, or by the model's own chat template.

        Raises ConfigError where the chat template refuses it (a system message, often).
        """
        plain = [dict(message) for message in messages]
        try:
            text = self.inner.apply_chat_template(
                plain, chat_template=template, tokenize=False, add_generation_prompt=cue
            )
        except Exception as error:  # jinja2's, and whatever a template's own code runs into
            roles = ", ".join(message["role"] for message in plain)
            whose = "its chat template" if template is None else "the suite's chat_template"
            raise ConfigError(
                f"{self.directory}: {whose} refuses a chat of {roles}: {error}; change "
                "`system:`, `chat_template:` or `chat:` in the suite"
            ) from error
        return str(text)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(token_ids), skip_special_tokens=True))
