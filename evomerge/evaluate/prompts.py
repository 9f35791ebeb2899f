"""From a task to the text that the model reads: the suite's template, then the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.engine.base import Engine
from evomerge.errors import ConfigError


def render_template(template: str, fields: Mapping[str, str], where: str) -> str:
    """The jinja text `template` filled with `fields`, in jinja's sandbox.

    Raises ConfigError, beginning with `where`, on a faulty template or an unknown field.
    """
    try:
        return _compiled(template).render(fields)
    # The sandbox's own refusals are TemplateErrors; the rest is what an expression can do wrong.
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        known = ", ".join(sorted(fields))
        raise ConfigError(f"{where}: prompt: {error} (the template may use: {known})") from error


def messages(system: str | None, user: str) -> list[dict[str, str]]:
    """The chat that asks `user`, after `system` where there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def uses_chat(engine: Engine, wanted: bool | None) -> bool:
    """Whether prompts go through the chat template: as wanted, else if the tokenizer has one.

    Raises ConfigError where a chat is wanted and the tokenizer has no template.
    """
    if wanted and not engine.has_chat_template():
        raise ConfigError(
            "suite: chat: true, but the base model's tokenizer has no chat template; "
            "say chat: false, or give the tokenizer one"
        )
    return engine.has_chat_template() if wanted is None else wanted


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    return environment.from_string(template)
