"""The chat template of a merge: known ones render their models' formats, others must compile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evomerge.errors import ConfigError
from evomerge.merge.chat_template import TEMPLATES, chosen_template, new_template, read_template
from evomerge.merge.materialize import materialize
from evomerge.recipe import recipe_from_mapping
from tests import tiny

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
# As the models' cards print them.
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
        "[|user|]Bye\n[|assistant|]"
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n"
        "### Response:\n"
    ),
}


def model_with(folder: Path, template: str | None, *, legacy: bool = False) -> Path:
    tokenizer = tiny.write_tokenizer(folder)
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder, save_jinja_files=not legacy)
    return folder


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_known_template_renders_its_format(name: str, tmp_path: Path) -> None:
    template = chosen_template(name, [])
    assert template is not None
    tokenizer = AutoTokenizer.from_pretrained(model_with(tmp_path / "model", template))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED[name]
    unprompted = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith(unprompted)


def test_exaone_opens_with_an_empty_system_turn(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_with(tmp_path / "m", TEMPLATES["exaone"]))
    text = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"


def test_mistral_refuses_turns_out_of_order(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_with(tmp_path / "m", TEMPLATES["mistral"]))
    with pytest.raises(Exception, match="take turns"):
        tokenizer.apply_chat_template(CHAT[2:], tokenize=False)


def test_auto_is_the_most_frequent_template_blanks_aside(tmp_path: Path) -> None:
    one, two, three, none = (
        model_with(tmp_path / "one", "{{ 'one' }}"),
        model_with(tmp_path / "two", "{{ 'two' }}\n"),
        model_with(tmp_path / "three", "{{ 'two' }}", legacy=True),
        model_with(tmp_path / "none", None),
    )
    assert read_template(two) == "{{ 'two' }}\n"
    assert chosen_template("auto", [one, none, two, three]) == "{{ 'two' }}"
    assert chosen_template("auto", [one, none, two]) == "{{ 'one' }}"
    assert chosen_template("auto", [two, one]) == "{{ 'two' }}"
    assert chosen_template("auto", [none]) is None


def test_the_templates_of_old_files_are_found(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path) == "d"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert read_template(tmp_path) == "j"


def test_a_template_that_the_tokenizer_has_anyway_changes_nothing(tmp_path: Path) -> None:
    one = model_with(tmp_path / "one", "{{ 'one' }}")
    two = model_with(tmp_path / "two", "{{ 'two' }}")
    assert new_template("auto", [one, two], one) is None
    assert new_template("auto", [one, two], two) == "{{ 'one' }}"
    assert new_template(None, [one], one) is None


def test_a_template_in_the_recipe_may_use_what_transformers_offers() -> None:
    template = (
        "{% for message in messages %}{% generation %}{{ message | tojson }}{% endgeneration %}"
        "{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    )
    assert chosen_template(template, []) == template


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("chatlm", "chat_template: 'chatlm' is neither .* did you mean 'chatml'"),
        ("no jinja at all in this long text", "neither a known name nor a Jinja template"),
        ("{{ too_short }}", "at least 20 characters"),
        ("first line, fine\n{% for x in %}", "chat_template: line 2 .*for x in"),
        ("{{ messages | no_such_filter }}", "line 1 .*no_such_filter"),
    ],
)
def test_a_template_that_is_none_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_template(choice, [])


def test_a_recipes_template_is_written_and_the_generation_config_kept(tmp_path: Path) -> None:
    one = tiny.llama(tmp_path / "one", layers=1, chat=True)
    other = tiny.variant(one, tmp_path / "other", seed=1)
    (one / "generation_config.json").write_text('{"temperature": 0.3}')
    mapping = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in (one, other)],
        "chat_template": "chatml",
    }
    out = materialize(recipe_from_mapping(mapping, "test"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED["chatml"]
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.3}
    assert (out / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
