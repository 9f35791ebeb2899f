"""From a task to the text that the model reads: the suite's template, then the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.engine.base import Engine
from evomerge.errors import ConfigError
from evomerge.evaluate.task import Task


@dataclass(frozen=True)
class Chat:
    """How prompts become chats: `wanted` None means if there is a chat template.

    `system` goes before the first turn; `template` is the Jinja text of a chat template to use in
    place of the tokenizer's own (None).
    """

    wanted: bool | None = None
    system: str | None = None
    template: str | None = None


# RuntimeError: a macro that calls itself without end.
_OF_EXPRESSIONS = (
    *(TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, AssertionError, RuntimeError),
)


def render_template(template: str, fields: Mapping[str, object], where: str) -> str:
    """The jinja text `template` filled with `fields`, in jinja's sandbox.

    Raises ConfigError, beginning with `where`, on a faulty template or an unknown field.
    """
    try:
        return _compiled(template).render(fields)
    # The sandbox's own refusals are TemplateErrors; the rest is what an expression can do wrong.
    except (TemplateError, *_OF_EXPRESSIONS) as error:
        known = ", ".join(sorted(fields))
        raise ConfigError(f"{where}: prompt: {error} (the template may use: {known})") from error


def messages(system: str | None, turns: Sequence[str]) -> list[dict[str, str]]:
    """The chat after `system` (where there is one) of what user and assistant say in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    said = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return [*first, *said]


def uses_chat(engine: Engine, chat: Chat) -> bool:
    """Whether prompts go through a chat template: as wanted, else if there is one.

    Raises ConfigError where a chat is wanted and there is no template.
    """
    if chat.template is not None:
        return True
    if chat.wanted and not engine.has_chat_template():
        raise ConfigError(
            "suite: chat: true, but the base model's tokenizer has no chat template; "
            "say chat: false, or give the tokenizer one"
        )
    return engine.has_chat_template() if chat.wanted is None else chat.wanted


def ask(engine: Engine, chat: Chat, task: Task, answers: Sequence[str] = ()) -> str:
    """What the model reads for the turn of `task` that comes after `answers`.

    Without a chat template the turns follow each other as they are, a line break between them.
    """
    users = (task.user, *task.turns)[: len(answers) + 1]
    system = chat.system if task.system is None else task.system
    said = [text for pair in zip(users, answers, strict=False) for text in pair] + [users[-1]]
    if uses_chat(engine, chat):
        return engine.render(messages(system, said), template=chat.template)
    # A prompt ends with its cue and the answer follows at once; the next one begins a line.
    spoken = "\n".join("".join(said[place : place + 2]) for place in range(0, len(said), 2))
    return spoken if system is None else f"{system}\n{spoken}"


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    return environment.from_string(template)
