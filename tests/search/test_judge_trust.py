"""What a judge on another machine is sent only where the user trusts the file that names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main
from evomerge.errors import ConfigError
from evomerge.evaluate.graders import check_graders
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.search.loop import run_search
from evomerge.search.resolve import resolve_study
from evomerge.search.status import stored_study
from evomerge.search.study import StudyConfig, read_study, with_options
from tests.search.formula import opener

Study = Callable[..., StudyConfig]

FAR = {"model": "m", "base_url": "https://far.example/v1", "api_key_env": "JUDGE_KEY"}
NEAR = {"model": "m", "base_url": "http://127.0.0.1:9/v1"}
RUBRIC = {"prompt": "Grade {{ answer }}", "low": 1, "high": 5}
TASK = json.dumps({"id": "1", "input": "1+1=", "output": "2"}) + "\n"
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a study with its tasks; beside it lie files of the same kinds."""
    inside = tmp_path / "shared"
    inside.mkdir()
    for place in (tmp_path, inside):
        (place / "tasks.jsonl").write_text(TASK)
        (place / "note.txt").write_text("{{ input }} {{ answer }}")
        (place / "user.txt").write_text("{{ input }}")
        (place / "chat.jinja").write_text(CHAT)
        (place / "table.csv").write_text("input,prompt\n1+1=,Say {{ input }}\n")
        (place / "more.csv").write_text("id,hint\n1,none\n")
        (place / "other.yaml").write_text(yaml.safe_dump({"scorer": "judge", "rubric": RUBRIC}))
    (inside / "link.txt").symlink_to(tmp_path / "note.txt")
    return inside


def suite_in(folder: Path, **settings: Any) -> Suite:
    config = {"scorer": "judge", "rubric": RUBRIC, "data": "tasks.jsonl"} | settings
    return load_suite(SuiteConfig.model_validate(config, context={"folder": folder}), folder)


NAMING: Mapping[str, tuple[str, Callable[[str], Mapping[str, Any]]]] = {
    "rubric.prompt": ("note.txt", lambda name: {"rubric": {**RUBRIC, "prompt": {"file": name}}}),
    "prompt": ("user.txt", lambda name: {"prompt": {"file": name}}),
    "chat_template": ("chat.jinja", lambda name: {"chat_template": {"file": name}}),
    "data": ("tasks.jsonl", lambda name: {"data": name}),
    "router.table": ("table.csv", lambda name: {"router": {"table": name}}),
    "join.file": ("more.csv", lambda name: {"join": {"file": [name], "key": "id"}}),
    "like": ("other.yaml", lambda name: {"like": name}),
}


@pytest.mark.parametrize("key", NAMING)
def test_a_file_beside_the_study_goes_to_a_judge_elsewhere_and_one_outside_does_not(
    key: str, folder: Path
) -> None:
    name, naming = NAMING[key]
    far, near = (judge_from_mapping(one, "study.yaml") for one in (FAR, NEAR))
    check_graders(suite_in(folder, **naming(name if key != "like" else f"./{name}")), far)
    for outside in (f"../{name}", str(folder.parent / name)):
        suite = suite_in(folder, **naming(outside))
        with pytest.raises(ConfigError) as caught:
            check_graders(suite, far)
        said = str(caught.value)
        path = folder.parent / name
        assert said.startswith(f"{key}: {path} lies outside of {folder}, the folder of the file")
        assert "its text would go to the judge at far.example; move it" in said
        assert said.endswith("or allow it by --trust-code")
        assert said.count("\n") == 0
        check_graders(suite, far, trust_code=True)
        check_graders(suite, near)


def test_a_link_out_of_the_folder_is_followed(folder: Path) -> None:
    suite = suite_in(folder, rubric={**RUBRIC, "prompt": {"file": "link.txt"}})
    with pytest.raises(ConfigError, match=r"link\.txt \(a link to .*/note\.txt\) lies outside"):
        check_graders(suite, judge_from_mapping(FAR, "study.yaml"))


def test_what_another_suite_names_is_beside_that_one_and_counts_where_it_is_not_replaced(
    folder: Path,
) -> None:
    far = judge_from_mapping(FAR, "study.yaml")
    (folder / "deep").mkdir()
    below = {"scorer": "judge", "rubric": {**RUBRIC, "prompt": {"file": "../note.txt"}}}
    (folder / "deep" / "suite.yaml").write_text(yaml.safe_dump(below))
    like = {"like": "deep/suite.yaml", "data": "tasks.jsonl"}
    inherited = SuiteConfig.model_validate(like, context={"folder": folder})
    with pytest.raises(ConfigError, match=rf"^rubric\.prompt: .* lies outside of {folder}/deep, "):
        check_graders(load_suite(inherited, folder), far)
    like["rubric"] = {"prompt": {"file": "note.txt"}}  # type: ignore[assignment]
    replaced = SuiteConfig.model_validate(like, context={"folder": folder})
    check_graders(load_suite(replaced, folder), far)


def test_a_suite_file_of_the_study_lies_beside_it_and_one_that_is_typed_anywhere(
    folder: Path,
) -> None:
    far = judge_from_mapping(FAR, "study.yaml")
    text = yaml.safe_dump({"scorer": "judge", "rubric": RUBRIC, "data": "tasks.jsonl"})
    (folder.parent / "suite.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^suite: .*suite\.yaml lies outside of"):
        check_graders(load_suite("../suite.yaml", folder), far)
    check_graders(load_suite("../suite.yaml", folder, typed=True), far)


def test_presets_and_tables_that_are_typed_go_to_any_judge(folder: Path) -> None:
    far = judge_from_mapping(FAR, "study.yaml")
    table = folder.parent / "tasks.jsonl"
    check_graders(load_suite("jsonl-judge", folder, table), far)
    like = SuiteConfig.model_validate({"like": "jsonl-judge"}, context={"folder": folder})
    check_graders(load_suite(like.with_data(table), folder), far)
    # With the second table that this preset looks for beside the first one.
    names = [
        "writing",
        "roleplay",
        "extraction",
        "stem",
        "humanities",
        "math",
        "coding",
        "reasoning",
    ]
    rows = [{"question_id": n, "category": name, "turns": ["?"]} for n, name in enumerate(names)]
    answers = [{"question_id": n, "choices": [{"turns": ["!"]}]} for n in range(len(names))]
    for file, lines in (("question_full.jsonl", rows), ("reference_answer_gpt-4.jsonl", answers)):
        (folder.parent / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite = load_suite("japanese-mt-bench", folder, folder.parent / "question_full.jsonl")
    assert suite.tasks[-1].reference == "!"
    check_graders(suite, far)


@pytest.mark.parametrize(
    ("variable", "url", "complaint"),
    [
        ("JUDGE_KEY", "https://far.example/v1", None),
        ("MY_JUDGE_TOKEN", "https://far.example/v1", None),
        ("OPENAI_API_KEY", "https://api.openai.com/v1", None),
        ("OPENAI_API_KEY", "https://eu.api.openai.com/v1", None),
        ("AZURE_OPENAI_API_KEY", "https://mine.openai.azure.com/openai/v1", None),
        ("OPENAI_API_KEY", "http://localhost:4000/v1", None),
        ("AWS_SECRET_ACCESS_KEY", "http://127.0.0.1:4000/v1", None),
        ("OPENAI_API_KEY", "https://far.example/v1", "OPENAI_API_KEY holds a key for api.openai"),
        ("OPENAI_API_KEY", "https://api.openai.com.far.example/v1", "holds a key for"),
        ("OPENAI_API_KEY", "https://notapi.openai.com/v1", "holds a key for"),
        ("HF_TOKEN", "https://x.endpoints.huggingface.cloud/v1", "HF_TOKEN holds a key for router"),
        ("AWS_SECRET_ACCESS_KEY", "https://far.example/v1", "is not known to hold a key for far"),
        ("AWS_SESSION_TOKEN", "https://api.openai.com/v1", "is not known to hold a key for api"),
        ("PREJUDGED_KEY", "https://far.example/v1", "is not known to hold a key for far.example"),
        ("JUDGE_KEY", "http://far.example/v1", "base_url: http://far.example/v1 would get the key"),
    ],
)
def test_a_key_goes_to_whom_it_is_for_and_never_in_the_clear(
    variable: str, url: str, complaint: str | None, folder: Path
) -> None:
    suite = suite_in(folder)
    judge = judge_from_mapping({"model": "m", "base_url": url, "api_key_env": variable}, "s.yaml")
    check_graders(suite, judge, trust_code=True)
    if complaint is None:
        check_graders(suite, judge)
        return
    with pytest.raises(ConfigError, match=r"^judge: .*--trust-code$") as caught:
        check_graders(suite, judge)
    assert complaint in str(caught.value)


def test_every_judge_of_a_panel_is_looked_at(folder: Path) -> None:
    other = {**FAR, "api_key_env": "SOME_KEY"}
    judge = judge_from_mapping({**NEAR, "finalists": {"others": [other]}}, "study.yaml")
    with pytest.raises(ConfigError, match="SOME_KEY is not known"):
        check_graders(suite_in(folder), judge)


@pytest.mark.parametrize("command", ["search", "reproduce", "eval", "reproduce a mixture"])
def test_every_command_that_asks_a_judge_asks_first(
    command: str,
    folder: Path,
    study: Study,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    suite = {"scorer": "judge", "rubric": RUBRIC, "data": "../tasks.jsonl"}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    storage = ["--storage", str(folder.parent / "storage")]
    judge = {**FAR, "api_key_env": "OPENAI_API_KEY"}
    if command == "eval":
        asked = ["eval", "no/model", "--suite", str(folder / "suite.yaml"), "--judge-model", "m"]
        asked += ["--judge-url", FAR["base_url"], "--judge-key-env", "OPENAI_API_KEY"]
    elif command == "reproduce a mixture":
        mixture = {"base_model": "no/model", "experts": [{"source_model": "no/other"}] * 2}
        section = {"name": "it", "models": ["no/model"], "suite": suite, "judge": judge}
        text = yaml.safe_dump({**mixture, "gate_mode": "random", "reproduce": section})
        (folder / "mixture.yaml").write_text(text)
        asked = ["reproduce", str(folder / "mixture.yaml"), "--out", str(folder / "out")]
    else:
        config = study(suite=suite, judge=judge, models=["no/model"]).to_mapping()
        (folder / "study.yaml").write_text(yaml.safe_dump(config))
        asked = [command, str(folder / "study.yaml"), *(["--gguf", "none"] * (command != "search"))]
    assert main([*asked, *storage]) == 2
    said = capfd.readouterr().err
    assert "OPENAI_API_KEY holds a key for api.openai.com" in said
    assert "tasks.jsonl lies outside of" in said
    assert "no/model" not in said
    # Allowed, it is the key that is not there: before any model is looked for.
    assert main([*asked, *storage, "--trust-code"]) == 2
    assert "the variable OPENAI_API_KEY is not set" in capfd.readouterr().err


def test_a_table_in_place_of_the_studys_is_the_users_word(folder: Path, study: Study) -> None:
    config = read_study(study(suite="jsonl-judge", judge=FAR).where)
    changed = with_options(config, data=folder / "tasks.jsonl")
    check_graders(load_suite(changed.suite, changed.folder), changed.judge)


def test_a_table_that_was_typed_stays_the_users_word_when_the_study_goes_on(
    folder: Path, study: Study, tmp_path: Path
) -> None:
    """And what the suite says by null stays said."""
    suite = {"like": "jsonl-judge", "rubric": RUBRIC, "reference": None}
    (folder / "own.jsonl").write_text(TASK + TASK.replace('"1"', '"2"'))
    config = with_options(
        study(suite=suite, judge=NEAR, holdout=0.5), data=tmp_path / "shared" / "own.jsonl"
    )
    storage = tmp_path / "storage"
    run_search(config, storage=storage, open_evaluator=opener(grade=lambda *_: 3.0))
    again = stored_study(storage, "formula")
    assert isinstance(again.suite, SuiteConfig)
    assert again.suite.reference is None
    assert (again.has_typed_table, study().has_typed_table) == (True, False)
    check_graders(load_suite(again.suite, folder.parent / "x"), judge_from_mapping(FAR, "f"))
    assert resolve_study(again, storage).fingerprint == resolve_study(config, storage).fingerprint


def test_a_dataset_on_the_hub_has_no_names_outside_of_it() -> None:
    data = {"hub": "owner/name", "file": ["tasks.jsonl", "../../../../.ssh/key.jsonl"]}
    with pytest.raises(ValueError, match=r"'\.\./\.\./\.\./\.\./\.ssh/key\.jsonl' is no name in a"):
        SuiteConfig.model_validate({"data": data})
