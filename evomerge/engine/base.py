"""What holds a model and generates: the interface that every engine offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self

from evomerge.recipe import Recipe

# A text, or token ids.
Prompt = str | list[int]


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is sampled.

    `temperature` 0 is greedy; a `stop` string ends an answer and is not part of it.
    `repetition_penalty` divides the positive logits of tokens that stand in prompt or answer
    already, and multiplies the negative ones (Keskar et al. 2019, arXiv:1909.05858, §4.1).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one prompt.

    `finish_reason` is "stop" or "length" (cut at max_tokens); `version` names the candidate whose
    weights wrote it (`Loaded.version`).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    version: str


# Is told a completion, and its place among those asked for, as soon as it is finished.
Each = Callable[[int, Completion], None]


@dataclass(frozen=True)
class Loaded:
    """A candidate that the engine now is: its version, how it came in, seconds until ready."""

    version: str
    how: Literal["live", "disk"]
    seconds: float


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is started with.

    `model` is the local directory whose configuration and tokenizer the engine takes (the base);
    `sources` are the local directories that recipes may name. `options` go to the engine's own
    constructor as they are (for vLLM: its engine arguments). `load` says how a candidate comes in:
    "live" into the running engine wherever it can, "disk" always by way of a model directory under
    `scratch`. `threads` bounds the CPU threads of this process or an engine's own (None: one per
    core); models of a few million parameters run faster with one. `url` is the address of a running
    server to use instead of an engine of our own.
    """

    model: str
    sources: tuple[str, ...]
    dtype: str = "bfloat16"
    repeatable: bool = True
    load: Literal["live", "disk"] = "live"
    scratch: str | None = None
    threads: int | None = None
    url: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)


class Engine(ABC):
    """A live model that can become any merge of its sources.

    `generate` and `log_probabilities` submit all their prompts in one call to a drained engine, so
    that the same prompts in the same order batch alike. A prompt is text as rendered: the engine
    adds no special tokens of its own to a text that comes out of a chat template (`render`), and
    the tokenizer's usual ones to any other (`add_special_tokens`).
    """

    name: str
    _version = "default"

    @property
    def version(self) -> str:
        """The candidate that the engine now is (`Loaded.version`)."""
        return self._version

    @abstractmethod
    def supports(self, recipe: Recipe) -> str | None:
        """Why `recipe` cannot be loaded live (layer count, vocabulary, dtype …); None if it can."""

    @abstractmethod
    def load(self, recipe: Recipe) -> Loaded:
        """Makes the engine the model of `recipe`; every cache of the previous one is dropped.

        Raises CandidateError where this recipe has no model (NaN weights, weights that sum to 0).
        """

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        """The prompt text of a chat (roles system, user, assistant), with the response cue or not.

        By the Jinja text `template`, or by the model's own chat template. Raises ConfigError where
        the template refuses the chat.
        """

    @abstractmethod
    def has_chat_template(self) -> bool:
        """Whether `render` has a template to use."""

    def count_tokens(self, prompt: str, *, add_special_tokens: bool) -> int:
        """The number of tokens that `prompt` becomes."""
        return len(self.encode([prompt], add_special_tokens=add_special_tokens)[0])

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt], *, add_special_tokens: bool) -> list[list[int]]:
        """The token ids of each prompt; what is token ids already stays as it is."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None where the tokenizer has none."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        return None

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """The most tokens that prompt and answer may have together."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in their order; `settings` for all, or one for each.

        `each` gets every completion as soon as the engine knows it, in the caller's thread; the
        completions are the same with and without it. What it raises ends the call.
        """

    @abstractmethod
    def log_probabilities(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool
    ) -> list[list[float]]:
        """Per prompt the log-probability (nats) of each of its tokens but the first."""

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is asked of the engine in the block: others may have its GPU, where it can rest.

        vLLM on a GPU can, in this process and started with `enable_sleep_mode`: its weights wait in
        the host's memory, its KV cache is given up.
        """
        yield

    @abstractmethod
    def close(self) -> None:
        """Gives the engine's memory back; it cannot be used after."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
