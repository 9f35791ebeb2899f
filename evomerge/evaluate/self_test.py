"""The template self-test: one prompt rendered and looked at, before anything is spent.

Wrong prompts are where scores get lost, and nothing fails: the model only answers worse.
"""

from __future__ import annotations

import re

from evomerge.engine.base import Engine
from evomerge.errors import ConfigError
from evomerge.evaluate.prompts import ask, messages, uses_chat
from evomerge.evaluate.suite import Suite
from evomerge.evaluate.suite_config import chat_template_names

# Texts that no template holds, to be found again in what it makes of them.
_USER, _ASSISTANT = "Evomerge asks this.", "Evomerge answers that."
# A line break that was escaped once too often; LaTeX's \nabla and \neq are none.
_LITERAL_BREAK = re.compile(r"\\n(?![a-z])")
_LINES, _LETTERS = 24, 1600


def self_test(engine: Engine, suite: Suite) -> str:
    """The prompt of the suite's first task, as the engine's model reads it.

    Raises ConfigError where it is not what a model was trained on: with the two characters \\n for
    a line break, with no or two tokens that begin a text, without the cue that an answer begins, or
    without the system prompt.
    """
    if suite.harness is not None:
        return suite.harness.first_prompt(engine, suite.chat.system)
    _check_suite_prompt(suite)
    if uses_chat(engine, suite.chat):
        # A router has system messages of its own.
        systems = [
            suite.chat.system if task.system is None else task.system for task in suite.tasks
        ]
        for system in dict.fromkeys(systems):
            _check_chat(engine, suite, system)
    prompt = ask(engine, suite.chat, suite.tasks[0])
    _check_beginning(engine, suite, prompt)
    return prompt


def shown_prompt(prompt: str) -> str:
    """A prompt for people to look at: each line after a bar, a long one without its middle."""
    if len(prompt) > _LETTERS:
        half = _LETTERS // 2
        prompt = f"{prompt[:half]}\n[… {len(prompt) - 2 * half} characters …]\n{prompt[-half:]}"
    lines = prompt.split("\n")
    if len(lines) > _LINES:
        half = _LINES // 2
        lines = [*lines[:half], f"[… {len(lines) - 2 * half} lines …]", *lines[-half:]]
    return "\n".join(f"  | {line}" for line in lines)


def _check_suite_prompt(suite: Suite) -> None:
    task = suite.tasks[0]
    own = (task.input, *task.fields.values())
    escaped = len(_LITERAL_BREAK.findall(task.user))
    if escaped > sum(len(_LITERAL_BREAK.findall(text)) for text in own):
        which = "prompt" if suite.config.router is None else "the router's prompt"
        raise ConfigError(
            f"{suite.where}: {which}: it has the two characters \\n where a line break is meant; "
            'in YAML write it in double quotes ("Q: {{ input }}\\nA:") or as a block (|)'
        )
    if suite.chat.system is not None and _LITERAL_BREAK.search(suite.chat.system):
        raise ConfigError(
            f"{suite.where}: system: it has the two characters \\n where a line break is meant; "
            "in YAML write it in double quotes or as a block (|)"
        )


def _check_chat(engine: Engine, suite: Suite, system: str | None) -> None:
    """Raises ConfigError where the chat template loses something, or writes \\n as two letters."""
    said = messages(system, [_USER])
    prompt = engine.render(said, template=suite.chat.template)
    if _USER not in prompt:
        raise _refusal(suite, "it leaves out what the user says", prompt)
    if "\\n" in prompt.replace(system or _USER, ""):
        raise _refusal(
            suite, "it writes the two characters \\n where a line break is meant", prompt
        )
    if system is not None and system.strip() not in prompt:
        raise _refusal(
            suite, "it silently drops the system prompt (leave out `system:` to go without)", prompt
        )
    if not _has_cue(engine, suite, system, prompt):
        raise _refusal(suite, "nothing in it says that the answer begins now", prompt)


def _has_cue(engine: Engine, suite: Suite, system: str | None, prompt: str) -> bool:
    """Whether the prompt ends in what comes before an answer.

    Templates add that where they are asked for it. Some (Llama 2's) always end the user's turn
    with it; then nothing stands between the prompt and an answer in a whole chat.
    """
    template = suite.chat.template
    plain = engine.render(messages(system, [_USER]), template=template, cue=False)
    if plain != prompt:
        return True
    whole = engine.render(messages(system, [_USER, _ASSISTANT]), template=template, cue=False)
    before, found, _ = whole.partition(_ASSISTANT)
    between = before.removeprefix(prompt.rstrip())
    return bool(found) and before.startswith(prompt.rstrip()) and not between.strip()


def _check_beginning(engine: Engine, suite: Suite, prompt: str) -> None:
    """Raises ConfigError where the prompt has no or two tokens that begin a text."""
    bos = engine.bos_token_id
    if bos is None:
        return
    is_chat = uses_chat(engine, suite.chat)
    (ids,) = engine.encode([prompt], add_special_tokens=not is_chat)
    (usual,) = engine.encode(["a"], add_special_tokens=True)
    # Of tokenizers that begin no text with it the token has another use: ChatML's begins each turn.
    is_used = usual[:1] == [bos]
    count = ids.count(bos) if is_used else int(ids[:2] == [bos, bos]) + 1
    if count != 1:
        number = "no token" if count == 0 else f"{count} tokens"
        what = f"the prompt has {number} that begin a text (BOS); the model was trained with one"
        if is_chat:
            raise _refusal(suite, what, prompt)
        raise ConfigError(f"{suite.where}: prompt: {what}\n{shown_prompt(prompt)}")


def _refusal(suite: Suite, what: str, prompt: str) -> ConfigError:
    whose = "the model's own" if suite.chat.template is None else "the suite's"
    names = ", ".join(chat_template_names())
    return ConfigError(
        f"{suite.where}: chat template ({whose}): {what}; give the suite another one by "
        f"`chat_template:` (a Jinja text, {{file: NAME}}, or one of {names}), or say `chat: false`"
        f"\n{shown_prompt(prompt)}"
    )
