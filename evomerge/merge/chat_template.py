"""The chat template of a merge: the inputs' most frequent one, a well-known one, or a text.

Templates are Jinja as transformers runs it: blocks trimmed, in a sandbox, with `bos_token`,
`eos_token` and `raise_exception`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, nearest

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE_FILE = "chat_template.jinja"
_LEGACY_FILE = "chat_template.json"
_SHORTEST = 20  # as in mergekit: what is shorter is a name that was misspelt

_ALPACA = """\
{%- for message in messages %}
    {%- set content = message['content'] | trim %}
    {%- if message['role'] == 'system' %}
        {{- content + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + content + '\\n\\n' }}
    {%- elif message['role'] == 'user_context' %}
        {{- '### Input:\\n' + content + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' + content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_EXAONE = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message['role'] + '|]' + message['content'] }}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_MISTRAL = """\
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('after an optional system message, user and assistant take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# The formats as their models' cards describe them; the names are mergekit's.
TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def new_template(choice: str | None, folders: Sequence[Path], source: Path) -> str | None:
    """What replaces the chat template of the tokenizer in `source`; None where it stays as it is.

    `choice` is the recipe's `chat_template`, `folders` are the models'.
    """
    template = chosen_template(choice, folders)
    if template is None or template.strip() == (read_template(source) or "").strip():
        return None
    return template


def chosen_template(choice: str | None, folders: Sequence[Path]) -> str | None:
    """The template that a recipe's `chat_template` names; None where the tokenizer keeps its own.

    "auto" is the one that most of the models in `folders` have, surrounding blanks aside; of
    equally many the first listed, None where no model has one. Raises ConfigError where `choice`
    is neither that, a known name nor a template that compiles.
    """
    if choice is None:
        return None
    if choice == "auto":
        found = [template.strip() for folder in folders if (template := read_template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    _check_template(choice)
    return choice


def read_template(folder: Path) -> str | None:
    """The chat template of the model in `folder`, from wherever transformers keeps it; else None.

    Of several named ones it is the default. Raises ConfigError where a file cannot be read.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return _text(file)
    for name in ("tokenizer_config.json", _LEGACY_FILE):
        template = _mapping(folder / name).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def _check_template(template: str) -> None:
    if len(template) < _SHORTEST or "{" not in template:
        names = ["auto", *TEMPLATES]
        raise ConfigError(
            f"chat_template: {template!r} is neither a known name nor a Jinja template (at least "
            f"{_SHORTEST} characters with a '{{'){nearest(template, names)}"
        )
    from jinja2 import TemplateSyntaxError  # few recipes need it, and its import takes a while

    try:
        _environment().from_string(template)
    except TemplateSyntaxError as error:
        lines = template.splitlines()
        line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
        raise ConfigError(
            f"chat_template: line {error.lineno} ({line!r}) is no Jinja: {error.message}"
        ) from error


def _environment() -> Environment:
    """What transformers compiles templates with."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' {% generation %} blocks, which mark what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012  (so it is declared in jinja)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
