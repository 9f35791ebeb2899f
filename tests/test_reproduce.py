"""`evomerge reproduce`: a published mixture, or a study, in one file; here on tiny models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.moe_config import mixture_text, parse_moe_config, read_moe_config
from evomerge.report.reproduction import read_mixture_file
from evomerge.resources import preset_file
from tests import tiny, tiny_tokenizers
from tests.evaluate.judge_server import ScriptedJudge, scripted
from tests.shared_data import shared_data
from tests.test_cli import STUDY, Ran, run

PRESET = preset_file("elyza-moe-2x13b", "mixtures")
CATEGORIES = (
    *("coding", "extraction", "humanities", "math"),
    *("reasoning", "roleplay", "stem", "writing"),
)
QUESTIONS = [
    {"question_id": number, "category": category, "turns": [f"問{number}?", "では?"]}
    for number, category in enumerate(CATEGORIES)
]


def tiny_llama2(folder: Path) -> None:
    """A Llama with a tokenizer of Llama 2's kind."""
    tiny.llama(folder, layers=2, vocabulary=412, dtype=torch.float32)
    tiny_tokenizers.sentencepiece(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The preset's file with tiny models in place of the two of 13B, and a few questions."""
    tiny_llama2(tmp_path / "instruct")
    tiny.variant(tmp_path / "instruct", tmp_path / "plain", seed=1, scale=0.05)
    text = PRESET.read_text("utf-8")
    for name, model in (("13b-instruct", "instruct"), ("13b", "plain")):
        text = text.replace(f"elyza/ELYZA-japanese-Llama-2-{name}", model)
    text = text.replace("bfloat16", "float32").replace("max_model_len: 4096", "threads: 1")
    text = text.replace("like: japanese-mt-bench,", "like: japanese-mt-bench, max_tokens: 4,")
    text = text.replace("gpt-4, api_key_env: OPENAI_API_KEY", "scripted, base_url: JUDGE")
    (tmp_path / "moe.yaml").write_text(text, "utf-8")
    write(tmp_path / "questions.jsonl", QUESTIONS)
    references = [{"question_id": n, "choices": [{"turns": ["1"]}]} for n in range(8)]
    write(tmp_path / "reference_answer_gpt-4.jsonl", references)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def grade(prompt: str) -> str:
    return json.dumps({"reason": "by its length", "grade": 1 + len(prompt.encode()) % 10})


@pytest.fixture
def judge(here: Path) -> Iterator[ScriptedJudge]:
    with scripted(ScriptedJudge(reply=grade)) as judge:
        file = here / "moe.yaml"
        file.write_text(file.read_text("utf-8").replace("JUDGE", judge.url), "utf-8")
        yield judge


def reproduce(*arguments: str) -> Ran:
    given = ("--data", "questions.jsonl", "--engine", "transformers")
    return run("reproduce", "moe.yaml", *given, *arguments)


def stamps(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.suffix in {".safetensors", ".gguf"}]
    return {path.name: path.stat().st_mtime_ns for path in files}


def test_the_published_mixture_in_one_file_scaled_down(here: Path, judge: ScriptedJudge) -> None:
    pytest.importorskip("gguf")
    ran = reproduce("--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    name = "ELYZA-japanese-Llama-2-MoE-2x13B"
    assert (found["suite"], found["judge"]) == ("japanese-mt-bench", "scripted")
    instruct, mixture = found["models"]
    assert [instruct["model"], mixture["model"]] == ["instruct", name]
    assert (instruct["published"], mixture["published"]) == (4.925, 5.675)
    assert tuple(mixture["categories"]) == CATEGORIES
    assert mixture["difference"]["to"] == "instruct"
    # One turn of each question, from each model; identical answers are graded once.
    assert 8 <= len(judge.prompts) <= 16
    assert all("では?" not in prompt for prompt in judge.prompts)
    assert any("参考解答" in prompt for prompt in judge.prompts)

    out = here / name
    config = json.loads((out / name / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
    card = (out / name / "README.md").read_text("utf-8")
    assert "## Evaluation" in card
    assert "![Mean grades by category](radar.png)" in card
    assert f"* {name}: 5.675" in card
    recorded = (out / name / "mergekit_moe_config.yml").read_text("utf-8")
    assert "reproduce" not in yaml.safe_load(recorded)
    for file, start in (("radar.png", b"\x89PNG"), (f"{name}/radar.png", b"\x89PNG")):
        assert (out / file).read_bytes().startswith(start)
    assert (out / f"{name}.q8_0.gguf").read_bytes().startswith(b"GGUF")
    assert "[INST] <<SYS>>\nあなたは誠実で優秀な日本人のアシスタントです。" in prompts(here)

    paid, before = len(judge.prompts), stamps(out)
    again = reproduce("--json")
    assert json.loads(again.out) == found
    assert (len(judge.prompts), stamps(out)) == (paid, before)
    for words in ("the mixture is there", "in the ledger already", "the GGUF file is there"):
        assert words in again.err


def prompts(here: Path) -> str:
    from evomerge.database import open_database
    from evomerge.evaluate.ledger_query import ledger_rows

    with open_database(here / "evol_merge_storage").begin() as connection:
        return "\n".join(row.prompt for row in ledger_rows(connection, None))


def test_a_step_that_failed_is_the_first_one_of_the_next_run(
    here: Path, judge: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evomerge.report.reproduction.write_gguf", broken)
    ran = reproduce()
    assert ran.status == 130
    assert "the same command goes on" in ran.err
    paid = len(judge.prompts)
    monkeypatch.undo()
    os.chdir(here)
    ran = reproduce()
    assert ran.status == 0, ran.err
    assert len(judge.prompts) == paid
    assert "the mixture is there" in ran.err
    assert ran.out.count("ELYZA-japanese-Llama-2-MoE-2x13B.q8_0.gguf") == 1


def test_another_mixture_is_not_written_over_this_one(here: Path, judge: ScriptedJudge) -> None:
    assert reproduce("--gguf", "none", "--limit", "4").status == 0
    file = here / "moe.yaml"
    file.write_text(
        file.read_text("utf-8").replace("gate_mode: random", "gate_mode: uniform_random")
    )
    ran = reproduce("--gguf", "none", "--limit", "4")
    assert ran.status == 2
    assert "another mixture" in ran.err
    ran = reproduce("--gguf", "none", "--limit", "4", "--overwrite")
    assert ran.status == 0, ran.err
    assert "building the mixture" in ran.err


def test_a_study_is_searched_and_then_its_winner_evaluated_on_the_held_out_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    tiny_llama2(tmp_path / "base")
    tiny.variant(tmp_path / "base", tmp_path / "expert", seed=1)
    write(tmp_path / "tasks.jsonl", [{"input": f"say {n}", "output": str(n)} for n in range(4)])
    suite = {"scorer": "numeric", "data": "tasks.jsonl", "max_tokens": 2, "chat": False}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"suite": suite}))
    ran = run("reproduce", "study.yaml", "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert [row["model"] for row in found["models"]] == ["base", "expert", "tiny"]
    assert [row["tasks"] for row in found["models"]] == [2, 2, 2]
    assert found["suite"].endswith("2 tasks held out of the search")
    folder = tmp_path / "evol_merge_storage" / "studies" / "tiny"
    assert (folder / "tiny.q8_0.gguf").read_bytes().startswith(b"GGUF")
    assert (folder / "evaluation.md").is_file()
    assert "no radar chart" in ran.err


def test_a_key_that_is_not_set_is_told_before_any_model_of_a_study_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    write(tmp_path / "tasks.jsonl", [{"input": f"say {n}", "output": str(n)} for n in range(4)])
    study = STUDY | {
        "suite": {"like": "jsonl-judge", "data": "tasks.jsonl"},
        "judge": {"model": "m", "api_key_env": "JUDGE_KEY"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    ran = run("reproduce", "study.yaml")
    assert (ran.status, ran.out) == (2, "")
    assert "study.yaml: judge: api_key_env: the variable JUDGE_KEY is not set" in ran.err
    assert "base" not in ran.err


def test_a_name_that_no_preset_has_is_told_with_those_there_are() -> None:
    ran = run("reproduce", "elyza-moe-2x13")
    assert ran.status == 2
    assert "no mixture or study preset" in ran.err
    assert "did you mean elyza-moe-2x13b?" in ran.err
    assert "llm-jp-3-13b-task-arithmetic" in ran.err
    ran = run("reproduce", "elyza-moe-2x13b")
    assert ran.status == 2
    assert "--data FILE names its tasks, too" in ran.err


def test_what_only_reproduce_reads_makes_no_other_mixture() -> None:
    text = PRESET.read_text("utf-8")
    assert "reproduce:" in text
    assert "published" not in mixture_text(text).replace("published mixture", "")
    assert parse_moe_config(mixture_text(text), "text") == read_moe_config(PRESET)
    middle = "experts: []\nreproduce:\n  name: x\n\n  suite: y\n# a comment\ndtype: float32\n"
    assert mixture_text(middle) == "experts: []\n# a comment\ndtype: float32\n"


def test_the_published_file_is_the_preset_and_its_table_gives_its_means() -> None:
    published = yaml.safe_load(shared_data("published/elyza_moe_2x13b.yaml").read_text("utf-8"))
    ours = read_mixture_file(PRESET)
    assert [expert["source_model"].removeprefix("./") for expert in published["experts"]] == [
        expert.source_model.removeprefix("elyza/") for expert in ours.mixture.experts
    ]
    assert published["gate_mode"] == ours.mixture.gate_mode
    table = shared_data("published/elyza_moe_japanese_mt_bench.csv").read_text("utf-8")
    means = {float(line.split(",")[-1]) for line in table.splitlines()[1:]}
    assert means == set(ours.reproduce.published.values())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  name: ELYZA", "  nam: ELYZA", ["reproduce.nam", "did you mean 'name'"]),
        ("  models: [instruct]", "  models: []", ["reproduce.models"]),
        ("  gguf: q8_0", "  gguf: q4_k", ["reproduce.gguf", "'q4_k'"]),
        ("like: japanese-mt-bench,", "like: japanese-mt,", ["reproduce.suite", "japanese-mt"]),
        ("base_url: JUDGE", "api_key_env: OPENAI_API_KEY", ["OPENAI_API_KEY is not set"]),
        ("  judge: {", "  # {", ["reproduce.judge", "is missing"]),
        ("reproduce:", "reproduc:", ["no key reproduce", "evomerge moe"]),
        ("  models: [instruct]", "  models: [nowhere]", ["nowhere"]),
        # Nothing is wrong with the file: the judge is not there.
        ("base_url: JUDGE", "base_url: JUDGE, patience: 1", ["judge: http", "be had for 1 s"]),
        ("  name: ELYZA-japanese", "  name: ../x", ["reproduce.name"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_before_anything_is_built(
    old: str, new: str, words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = here / "moe.yaml"
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new).replace("JUDGE", "http://127.0.0.1:9/v1"), "utf-8")
    before = sorted(here.iterdir())
    ran = reproduce()
    assert ran.status == 2, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert sorted(here.iterdir()) == before


def test_the_real_questions_are_asked_of_both_models(here: Path, judge: ScriptedJudge) -> None:
    for name in ("question_full.jsonl", "reference_answer_gpt-4.jsonl"):
        real = shared_data(f"japanese_mt_bench/{name}")
        (here / name).write_bytes(real.read_bytes())
    text = (here / "moe.yaml").read_text("utf-8").replace("max_tokens: 4,", "max_tokens: 1,")
    (here / "moe.yaml").write_text(text.replace("gguf: q8_0", "gguf: null"), "utf-8")
    for folder in ("instruct", "plain"):  # the longest question is of 700 tokens of this tokenizer
        tiny.edit_config(here / folder, max_position_embeddings=2048)
    arguments = ("--data", "question_full.jsonl", "--engine", "transformers", "--json")
    ran = run("reproduce", "moe.yaml", *arguments, "--limit", "16")
    assert ran.status == 0, ran.err
    instruct, mixture = json.loads(ran.out)["models"]
    for row in (instruct, mixture):
        assert (row["tasks"], row["unscored"]) == (16, 0)
        assert sorted(row["categories"]) == sorted(CATEGORIES)
        assert all(1 <= grade <= 10 for grade in row["categories"].values())
    # With a right answer to compare with are math, reasoning and coding: 6 of the 16.
    asked = set(judge.prompts)
    assert 6 <= sum("参考解答" in prompt for prompt in asked) <= 12
    assert 16 <= len(asked) <= 32
