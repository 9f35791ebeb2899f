"""The template self-test, with real tokenizers: what it refuses, and the templates that ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.engine.base import Engine
from evomerge.engine.tokenizer import Tokenizer
from evomerge.errors import ConfigError
from evomerge.evaluate.self_test import self_test, shown_prompt
from evomerge.evaluate.suite import Suite, SuiteConfig
from evomerge.evaluate.task import Task
from tests import tiny, tiny_tokenizers
from tests.evaluate.test_suite import EchoEngine

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As llm-jp-3's own: the preamble is its own, whatever the system prompt says.
DROPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}以下は指示です。"
    "{% else %}\n\n### 指示:\n{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n\n### 応答:\n{% endif %}"
)


class TokenizerEngine(EchoEngine):
    """A real tokenizer and no model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id  # type: ignore[assignment]
        self.render = tokenizer.render  # type: ignore[method-assign]

    def has_chat_template(self) -> bool:
        return self.tokenizer.has_chat_template

    def encode(self, prompts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [
            self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            for prompt in prompts
        ]


def engine_with(folder: Path, template: str | None, *, adds_bos: bool = False) -> Engine:
    write = tiny_tokenizers.sentencepiece if adds_bos else tiny.write_tokenizer
    wrapped = write(folder)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return TokenizerEngine(Tokenizer(str(folder)))


def suite_of(user: str = "1+1=", **settings: object) -> Suite:
    task = Task("1", "1+1=", "2", "all", user)
    return Suite(SuiteConfig.model_validate({"data": "tasks.jsonl", **settings}), (task,))


def test_a_good_template_gives_the_prompt_as_the_model_reads_it(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, CHATML)
    prompt = self_test(engine, suite_of(system="Be brief."))
    assert prompt == "<|system|>Be brief.</s>\n<|user|>1+1=</s>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (CHATML.replace("\n", "\\\\n"), {}, r"two characters \\n"),
        (CHATML.partition("{% if add")[0], {}, "nothing in it says that the answer begins"),
        (DROPPING, {"system": "Be brief."}, "silently drops the system prompt"),
        (CHATML.replace("m['content']", "'?'"), {}, "leaves out what the user says"),
        ("{{ raise_exception('no system') }}", {"system": "x"}, "refuses a chat of system, user"),
    ],
)
def test_a_template_that_spoils_the_prompt_is_refused(
    tmp_path: Path, template: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        self_test(engine_with(tmp_path, template), suite_of(**settings))


def test_a_template_that_drops_a_routers_system_prompt_is_refused(tmp_path: Path) -> None:
    suite = suite_of()
    routed = replace(suite, tasks=(*suite.tasks, replace(suite.tasks[0], id="2", system="Count.")))
    with pytest.raises(ConfigError, match="silently drops the system prompt"):
        self_test(engine_with(tmp_path, DROPPING), routed)
    self_test(engine_with(tmp_path, CHATML), routed)


@pytest.mark.parametrize(
    ("template", "number"),
    [
        (DROPPING.replace("{{ bos_token }}", ""), "no token"),
        ("{{ bos_token }}" + DROPPING, "2 tokens"),
    ],
)
def test_no_and_two_tokens_that_begin_a_text_are_refused(
    tmp_path: Path, template: str, number: str
) -> None:
    with pytest.raises(ConfigError, match=f"the prompt has {number} that begin a text"):
        self_test(engine_with(tmp_path, template, adds_bos=True), suite_of())
    self_test(engine_with(tmp_path, DROPPING, adds_bos=True), suite_of())


def test_a_prompt_without_a_chat_has_the_tokenizers_own_beginning_and_no_second(
    tmp_path: Path,
) -> None:
    engine = engine_with(tmp_path, None, adds_bos=True)
    assert self_test(engine, suite_of(chat=False)) == "1+1="
    with pytest.raises(ConfigError, match="prompt: the prompt has 2 tokens"):
        self_test(engine, suite_of("<s>1+1=", chat=False))


def test_a_token_that_begins_each_turn_is_no_second_beginning(tmp_path: Path) -> None:
    template = CHATML.replace("<|{{ m['role'] }}|>", "<s>{{ m['role'] }}:")
    prompt = self_test(engine_with(tmp_path, template), suite_of(system="Be brief."))
    assert prompt.count("<s>") == 2


def test_an_escaped_line_break_of_the_suite_is_refused_and_that_of_a_task_is_its_own() -> None:
    with pytest.raises(ConfigError, match=r"prompt: it has the two characters \\n"):
        self_test(EchoEngine(), suite_of("1+1=\\nA:"))
    task = Task("1", "print('\\n')", "x", "all", "print('\\n')")
    assert self_test(EchoEngine(), Suite(SuiteConfig(data="t.jsonl"), (task,))) == "print('\\n')"
    with pytest.raises(ConfigError, match="system: it has"):
        self_test(EchoEngine(), suite_of(system="One.\\nTwo."))


SYSTEM = "あなたは誠実で優秀な日本人のアシスタントです。"
INSTRUCTION = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
# Both as in the facts of the families: the renderings that the models were trained on.
RENDERED = {
    "llm-jp-3": f"<s>{INSTRUCTION}\n\n### 指示:\n1+1=\n\n### 応答:\n",
    "elyza-llama-2": f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n1+1= [/INST] ",
}


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_the_shipped_templates_render_what_their_models_were_trained_on(
    tmp_path: Path, name: str
) -> None:
    engine = engine_with(tmp_path, None, adds_bos=True)
    assert self_test(engine, suite_of(chat_template=name)) == RENDERED[name]
    assert "Be brief." in self_test(engine, suite_of(chat_template=name, system="Be brief."))


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("llm-jp-3", "1+1=\n\n### 応答:\n2</s>\n\n### 指示:\n1+2=\n\n### 応答:\n"),
        ("elyza-llama-2", "1+1= [/INST] 2 </s><s>[INST] 1+2= [/INST] "),
    ],
)
def test_the_shipped_templates_go_on_after_an_answer(
    tmp_path: Path, name: str, between: str
) -> None:
    engine = engine_with(tmp_path, None, adds_bos=True)
    template = suite_of(chat_template=name).chat.template
    roles = ("user", "assistant", "user")
    said = [
        {"role": role, "content": text}
        for role, text in zip(roles, ("1+1=", "2", "1+2="), strict=True)
    ]
    assert engine.render(said, template=template).endswith(between)


def test_a_long_prompt_is_shown_without_its_middle() -> None:
    shown = shown_prompt("\n".join(f"line {number}" for number in range(100)))
    assert shown.startswith("  | line 0\n")
    assert shown.endswith("  | line 99")
    assert "  | [… 76 lines …]" in shown
    assert "[… 400 characters …]" in shown_prompt("x" * 2000)
