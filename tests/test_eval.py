"""`evomerge eval`: models side by side, in one live engine where they are of one kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from evomerge.database import open_database
from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import GenerationSettings
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.ledger_query import LedgerRow, ledger_rows
from evomerge.evaluate.task import TaskResult
from evomerge.report.answers import export_answers
from evomerge.search.side_by_side import Measured, difference, own_interval
from tests import tiny
from tests.evaluate.judge_server import Fault, ScriptedJudge, scripted
from tests.test_cli import Ran, run

CATEGORIES = ("数学", "math", "code")
INPUTS = [f"{number} と {number}?" for number in range(9)]
OPTIONS = ("--engine", "transformers", "--threads", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "a", layers=2, dtype=torch.float32)
    tiny.variant(folder / "a", folder / "b", seed=1, scale=0.01)
    tiny.qwen2(folder / "other", layers=2, dtype=torch.float32)
    broken = tiny.variant(folder / "a", folder / "broken", seed=2)
    tiny.rewrite(broken, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite whose right answers are those of the model a."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    rows = [
        {"id": f"t{place}", "input": text, "output": answer, "category": CATEGORIES[place % 3]}
        for place, (text, answer) in enumerate(zip(INPUTS, answers(models / "a"), strict=True))
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(
        "scorer: exact\ndata: tasks.jsonl\ncategory: category\nmax_tokens: 3\nchat: false\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(model: Path) -> list[str]:
    config = EngineConfig(str(model), (str(model),), dtype="float32", threads=1)
    with open_engine("transformers", config) as engine:
        done = engine.generate(INPUTS, GenerationSettings(max_tokens=3), add_special_tokens=True)
    return [one.text for one in done]


def evaluated(*arguments: str) -> tuple[dict[str, Any], Ran]:
    ran = run("eval", *arguments, "--json", *OPTIONS)
    assert ran.status == 0, ran.err
    return json.loads(ran.out), ran


def ledger(storage: Path) -> list[LedgerRow]:
    with open_database(storage).begin() as connection:
        return ledger_rows(connection, None)


def test_models_of_one_kind_share_an_engine_and_answer_as_each_does_alone(here: Path) -> None:
    found, ran = evaluated("a", "b", "other", "--suite", "suite.yaml")
    assert ran.err.count("starting transformers") == 2
    assert [row["model"] for row in found["models"]] == ["a", "b", "other"]
    first, second, third = found["models"]
    assert (first["score"], first["interval"]) == (1.0, [1.0, 1.0])
    expected = [
        float(one == right)
        for one, right in zip(answers(here / "b"), answers(here / "a"), strict=True)
    ]
    assert second["score"] == math.fsum(expected) / 9
    assert 0 < second["score"] < 1, "the models should differ, but not in all answers"
    assert second["difference"]["to"] == "a"
    assert second["difference"]["mean"] == pytest.approx(second["score"] - 1.0)
    by_category = {CATEGORIES[at]: np.mean(expected[at::3]) for at in range(3)}
    assert second["categories"] == pytest.approx(by_category)
    low, high = second["interval"]
    assert low < second["score"] < high
    assert (first["difference"], third["tasks"], third["unscored"]) == (None, 9, 0)
    rows = ledger(here / "evol_merge_storage")
    assert [row.answer for row in rows if row.candidate == "b"] == answers(here / "b")
    assert len(rows) == 27


def test_the_interval_of_a_score_ends_where_the_grades_do() -> None:
    results = [
        TaskResult(str(place), "?", "!", "stop", grade, 0.0, "v0")
        for place, grade in enumerate((1, 5, 5, 5, 5))
    ]
    low, high = own_interval(results, (-math.inf, math.inf)) or (0.0, 0.0)
    assert high > 5
    assert own_interval(results, (1.0, 5.0)) == (low, 5.0)


def test_the_interval_of_a_difference_ends_where_grades_can_differ_no_more() -> None:
    def measured(name: str, grades: tuple[int, ...]) -> Measured:
        results = [
            TaskResult(str(place), "?", "!", "stop", grade, 0.0, "v0")
            for place, grade in enumerate(grades)
        ]
        return Measured(name, tuple(results))

    one, first = measured("one", (1, 1, 1, 1, 0)), measured("first", (0, 0, 0, 0, 0))
    free = difference(one, first, (-math.inf, math.inf))
    cut = difference(one, first, (0.0, 1.0))
    assert free is not None
    assert cut is not None
    assert free.interval[1] > 1
    assert cut.interval == (free.interval[0], 1.0)


def test_what_the_ledger_has_is_not_answered_again_unless_asked(here: Path) -> None:
    first, _ = evaluated("a", "b", "--suite", "suite.yaml")
    again, ran = evaluated("a", "b", "--suite", "suite.yaml")
    assert again == first
    assert "starting" not in ran.err
    assert ran.err.count("in the ledger already") == 2
    fresh, ran = evaluated("b", "--suite", "suite.yaml", "--fresh")
    assert "starting transformers" in ran.err
    assert fresh["models"][0]["score"] == first["models"][1]["score"]
    assert len(ledger(here / "evol_merge_storage")) == 27


def test_the_answers_are_written_as_the_ledger_has_them(here: Path) -> None:
    arguments = ("a", "b", "--suite", "suite.yaml")
    evaluated(*arguments, "--answers", "first.parquet")
    export_answers(ledger(here / "evol_merge_storage"), here / "ledger.parquet")
    wanted = pandas.read_parquet("ledger.parquet")
    assert list(wanted["candidate"]) == ["a"] * 9 + ["b"] * 9
    assert list(wanted["answer"]) == answers(here / "a") + answers(here / "b")
    evaluated(*arguments, "--answers", "again.csv")  # from the ledger
    pandas.testing.assert_frame_equal(pandas.read_parquet("first.parquet"), wanted)
    again = pandas.read_csv("again.csv", keep_default_na=False)
    assert list(again["answer"]) == list(wanted["answer"])
    ran = run("eval", *arguments, "--answers", "again.csv", *OPTIONS)
    assert (ran.status, "again.csv" in ran.err) == (2, True)
    ran = run("eval", *arguments, "--answers", "answers.txt", *OPTIONS)
    assert (ran.status, "ends in .parquet or .csv" in ran.err) == (2, True)


def test_an_interrupted_evaluation_goes_on_with_the_model_it_was_at(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, calls = Evaluation.begin, []

    def interrupted(evaluation: Evaluation, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return begin(evaluation, *arguments)

    monkeypatch.setattr(Evaluation, "begin", interrupted)
    ran = run("eval", "a", "b", "--suite", "suite.yaml", *OPTIONS)
    assert (ran.status, ran.out) == (130, "")
    assert "the same command goes on" in ran.err
    found, ran = evaluated("a", "b", "--suite", "suite.yaml")
    assert [line.partition(" |")[0] for line in ran.err.splitlines() if "score" in line] == [
        "a",
        "b",
    ]
    assert ran.err.count("in the ledger already") == 1
    assert found["models"][0]["score"] == 1.0
    assert len(calls) == 3


def test_a_model_that_has_no_answers_fails_alone(here: Path) -> None:
    ran = run("eval", "a", "broken", "b", "--suite", "suite.yaml", "--json", *OPTIONS)
    assert ran.status == 1
    good, broken, other = json.loads(ran.out)["models"]
    assert "NaN" in broken["reason"]
    assert (broken["score"], broken["difference"], broken["tasks"]) == (None, None, 0)
    assert (good["reason"], other["reason"]) == (None, None)
    assert other["score"] > 0
    assert {row.candidate for row in ledger(here / "evol_merge_storage")} == {"a", "b"}


def test_tables_markdown_and_a_radar_chart_with_error_bars(here: Path) -> None:
    command = ("eval", "a", "b", "--suite", "suite.yaml", "--markdown", "t.md", *OPTIONS)
    ran = run(*command, "--radar", "r.png", "--radar", "r.svg")
    assert ran.status == 0, ran.err
    assert all(
        word in ran.out for word in ("are to a, paired", "By category", "数学", "95 % bootstrap")
    )
    assert (here / "r.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (here / "r.svg").read_bytes()
    lines = (here / "t.md").read_text("utf-8").splitlines()
    assert lines[0] == "Suite: suite.yaml. Mean grade on 9 tasks (exact)."
    assert lines[4] == "| a | 1.000 [1.00, 1.00] | – |"
    assert "| model | 数学 | math | code |" in lines
    refused = run(*command)
    assert refused.status == 2
    assert "t.md: exists already" in refused.err


def test_a_limit_takes_of_all_categories_alike(here: Path) -> None:
    found, _ = evaluated("a", "--suite", "suite.yaml", "--limit", "6")
    assert found["models"][0]["tasks"] == 6
    rows = ledger(here / "evol_merge_storage")
    assert sorted(int(row.task[1:]) % 3 for row in rows) == [0, 0, 1, 1, 2, 2]


def judged(here: Path) -> tuple[str, ...]:
    (here / "judged.yaml").write_text(
        "scorer: judge\ndata: tasks.jsonl\ncategory: category\nmax_tokens: 3\nchat: false\n"
        "rubric: {prompt: 'Grade {{ answer }} to {{ input }}', low: 1, high: 10}\n"
    )
    return ("--suite", "judged.yaml", "--judge-model", "scripted")


def by_length(prompt: str) -> str:
    return json.dumps({"reason": "so long", "grade": 1 + len(prompt.encode()) % 10})


def test_a_judge_over_http_grades_and_nothing_is_paid_for_twice(here: Path) -> None:
    with scripted(ScriptedJudge(reply=by_length)) as judge:
        arguments = ("a", "b", *judged(here), "--judge-url", judge.url)
        found, _ = evaluated(*arguments)
        expected = [
            1 + len(f"Grade {answer} to {text}".encode()) % 10
            for answer, text in zip(answers(here / "b"), INPUTS, strict=True)
        ]
        assert found["models"][1]["score"] == np.mean(expected)
        paid = len(judge.prompts)
        # What b answers as a does has a grade already.
        alike = sum(map(str.__eq__, answers(here / "a"), answers(here / "b")))
        took = {"grades": 9, "prompt_tokens": 100 * (9 - alike), "cost": None}
        took["completion_tokens"] = 10 * (9 - alike)
        assert found["models"][1]["judging"] == {**took, "reused": alike}
        again = evaluated(*arguments)[0]
        assert again["models"][1].pop("judging") == {**took, "reused": 9}
        del found["models"][1]["judging"]
        assert again["models"][1] == found["models"][1]
        fresh = evaluated(*arguments, "--fresh")[0]["models"][1]
        assert fresh["score"] == np.mean(expected)
        nothing = {"prompt_tokens": 0, "completion_tokens": 0}
        assert fresh["judging"] == {**took, **nothing, "reused": 9}
        ran = run("eval", *arguments, *OPTIONS)
        told = "a: the judge took 900 tokens of prompts and 90 of replies for 9 grades; all of them"
        assert told in ran.out
        assert len(judge.prompts) == paid


def test_answers_without_a_grade_are_counted_and_left_out(here: Path) -> None:
    def not_all(prompt: str) -> str:
        return "Hm." if INPUTS[4] in prompt else json.dumps({"reason": "", "grade": 7})

    with scripted(ScriptedJudge(reply=not_all)) as judge:
        found, ran = evaluated("a", *judged(here), "--judge-url", judge.url)
    row = found["models"][0]
    assert (row["score"], row["tasks"], row["unscored"]) == (7.0, 9, 1)
    assert "1 unscored" in ran.err


def test_an_answer_without_a_grade_is_graded_alone_when_the_same_is_evaluated_again(
    here: Path,
) -> None:
    def not_all(prompt: str) -> str:
        return "Hm." if INPUTS[4] in prompt else json.dumps({"reason": "", "grade": 7})

    with scripted(ScriptedJudge(reply=not_all)) as judge:
        arguments = ("a", *judged(here), "--judge-url", judge.url)
        first, _ = evaluated(*arguments)
        assert len(judge.prompts) == 8 + 3
        judge.reply = lambda prompt: "GRADE: 3"
        second, ran = evaluated(*arguments)
        assert "a: its 9 answers are in the ledger, not all graded" in ran.err
        assert "starting" not in ran.err
        assert len(judge.prompts) == 8 + 3 + 1
        row = second["models"][0]
        assert (row["score"], row["unscored"]) == ((8 * 7 + 3) / 9, 0)
        assert row["seconds"] == first["models"][0]["seconds"]
        assert (row["judging"]["reused"], row["judging"]["prompt_tokens"]) == (8, 100)
        third, ran = evaluated(*arguments)
        assert "in the ledger already" in ran.err
        assert third["models"][0]["judging"]["prompt_tokens"] == 900
    rows = ledger(here / "evol_merge_storage")
    assert sorted(row.grade or 0 for row in rows) == [3] + 8 * [7]


@pytest.mark.parametrize("ended_by", ["judge", "too many without a grade", "Ctrl-C"])
def test_answers_that_were_not_graded_are_kept_and_only_graded_next_time(
    here: Path, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    monkeypatch.setattr("evomerge.evaluate.judge._GRACE_SECONDS", 0.1)
    with scripted(ScriptedJudge(reply=by_length)) as judge:
        arguments = ("a", "other", *judged(here), "--judge-url", judge.url)
        expected, _ = evaluated(*arguments, "--storage", "unbroken")
        judge.prompts.clear()
        begin, begun = Evaluation.begin, []

        def begin_or_end(evaluation: Evaluation, *given: Any) -> Any:
            begun.append(given)
            if ended_by == "Ctrl-C" and len(begun) == 2:
                raise KeyboardInterrupt
            return begin(evaluation, *given)

        def fails(prompt: str) -> str:
            if ended_by == "judge":
                judge.faults = [Fault(401, {}, "{}")] * 1000
            if ended_by == "Ctrl-C":
                judge.latency = 1.0
            return "Hm." if ended_by.startswith("too") else by_length(prompt)

        monkeypatch.setattr(Evaluation, "begin", begin_or_end)
        judge.reply = fails
        ran = run("eval", *arguments, *OPTIONS)
        assert ran.status == (130 if ended_by == "Ctrl-C" else 1), ran.err
        assert "the same command goes on" in ran.err
        kept = ledger(here / "evol_merge_storage")
        answered = {row.candidate for row in kept}
        assert "a" in answered
        assert len(kept) == 9 * len(answered)
        assert {row.grade for row in kept} == {None}

        paid = {*judge.prompts} if not ended_by.startswith("too") else set()
        judge.faults, judge.reply, judge.latency = [], by_length, 0.0
        judge.prompts.clear()
        monkeypatch.setattr(Evaluation, "begin", begin)
        found, ran = evaluated(*arguments)
        assert "a: its 9 answers are in the ledger, not all graded" in ran.err
        assert ran.err.count("starting transformers") == 2 - len(answered)
        assert not paid & {*judge.prompts}
    for one, other in zip(found["models"], expected["models"], strict=True):
        assert (one["score"], one["categories"]) == (other["score"], other["categories"])
    rows = ledger(here / "evol_merge_storage")
    assert (len(rows), all(row.grade is not None for row in rows)) == (18, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--suite", "judged.yaml"), ["--judge-model", "judged.yaml"]),
        (("a", "--suite", "nowhere.yaml"), ["nowhere.yaml"]),
        (("a", "--suite", "elyza-task-100"), ["elyza-tasks-100"]),
        (("a", "nowhere", "gone", "--suite", "suite.yaml"), ["nowhere", "gone"]),
        (("a", "a", "--suite", "suite.yaml"), ["a: is there twice"]),
        (("a", "--suite", "flat.yaml", "--radar", "r.png"), ["--radar", "3 categories"]),
        (("a", "--suite", "suite.yaml", "--radar", "r.gif"), ["r.gif", ".png"]),
        (("a", "--suite", "suite.yaml", "--radar", "no/r.png"), ["no/r.png", "no folder no"]),
        (("a", "--suite", "suite.yaml", "--markdown", "no/t.md"), ["no/t.md", "no folder no"]),
        (("a", "--suite", "suite.yaml", "--split", "dev"), ["no split 'dev'"]),
        (("a", "--suite", "suite.yaml", "--data", "no.jsonl"), ["no.jsonl"]),
        (("a", "--suite", "suite.yaml", "--max-model-len", "4"), ["context", "4 tokens"]),
        (
            ("a", "--suite", "judged.yaml", "--judge-model", "x", "--judge-url", "http://h.invalid/v1"),
            ["api_key_env"],
        ),
        (
            ("a", "--suite", "judged.yaml", "--judge-model", "x", "--judge-key-env", "JUDGE_KEY"),
            ["JUDGE_KEY is not set"],
        ),
        (
            ("a", "--suite", "judged.yaml", "--judge-model", "x", "--judge-key-env", "sk-123"),
            ["_KEY or _TOKEN"],
        ),
        (
            ("a", "--suite", "judged.yaml", "--judge-model", "x", "--judge-url", "http://127.0.0.1:9/v1"),
            ["127.0.0.1:9"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_before_an_engine_starts(
    arguments: tuple[str, ...], words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judged(here)
    (here / "flat.yaml").write_text("scorer: exact\ndata: tasks.jsonl\n")
    ran = run("eval", *arguments, *OPTIONS)
    assert ran.status == 2, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert "score" not in ran.err


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of their own deprecations
def test_a_vllm_that_switched_answers_as_one_that_was_started_on_the_model(here: Path) -> None:
    pytest.importorskip("vllm")
    options = ("--engine", "vllm", "--threads", "1", "--max-model-len", "64")
    ran = run("eval", "a", "b", "--suite", "suite.yaml", *options)
    assert ran.status == 0, ran.err
    assert ran.err.count("starting vllm") == 1
    alone = run("eval", "b", "--suite", "suite.yaml", *options, "--storage", "alone")
    assert alone.status == 0, alone.err
    switched = {
        row.task: row.answer for row in ledger(here / "evol_merge_storage") if row.candidate == "b"
    }
    assert switched == {row.task: row.answer for row in ledger(here / "alone")}
    assert len(set(switched.values())) > 1
