"""Searches whose answers a judge grades, over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
import pytest

from evomerge.cli import main
from evomerge.engine.live_models import LiveSettings
from evomerge.errors import ConfigError, EngineDiedError, RunError
from evomerge.evaluate.graders import check_graders
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.suite import Suite, load_suite
from evomerge.evaluate.suite_config import SuiteConfig
from evomerge.evaluate.task import GradeRequest, TaskResult
from evomerge.recipe import Recipe
from evomerge.search.answers import study_answers
from evomerge.search.evaluator import EngineEvaluator, Evaluators, TimeSplit
from evomerge.search.loop import run_search
from evomerge.search.resolve import ResolvedStudy, resolve_study, what_changed
from evomerge.search.side_by_side import measure_models
from evomerge.search.status import stored_study, study_status
from evomerge.search.study import StudyConfig, read_study, study_from_mapping
from tests.evaluate import judge_server as faults
from tests.evaluate.judge_server import ScriptedJudge, scripted
from tests.shared_data import shared_data

SUITE = {"scorer": "judge", "data": "tasks.jsonl", "max_tokens": 4}

Study = Callable[..., StudyConfig]


def grade_by_length(prompt: str) -> str:
    """A judge that likes some answers better than others."""
    answer = prompt.partition("# The answer to grade\n")[2].partition("\n\n# What")[0]
    return json.dumps({"reason": "its characters", "grade": 1 + sum(map(ord, answer)) % 5})


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with scripted(ScriptedJudge(reply=grade_by_length)) as judge:
        yield judge


@pytest.fixture
def judged(study: Study, server: ScriptedJudge) -> Study:
    """A study of 10 tasks that `server` grades, with other values for some keys of its judge."""

    def make(judge: Any = None, **changes: Any) -> StudyConfig:
        settings = {"model": faults.MODEL, "base_url": server.url, **(judge or {})}
        return study(**{"suite": SUITE, "judge": settings, "budget": {"trials": 6}, **changes})

    return make


def search(config: StudyConfig, storage: Path, trials: int | None = None) -> dict[str, Any]:
    """The status that the search ends with."""
    with Evaluators() as evaluators:
        outcome = run_search(config, storage=storage, open_evaluator=evaluators.open, trials=trials)
    return dict(outcome.status)


def test_a_search_is_decided_by_its_judge(
    judged: Study, server: ScriptedJudge, tmp_path: Path
) -> None:
    status = search(judged(), tmp_path / "storage")
    assert status["state"] == "finished"
    scores = [trial["score"] for trial in status["trials"]]
    assert all(1 <= score <= 5 for score in scores)
    assert len(set(scores)) > 1
    # Another study of the same answers pays for none of them.
    asked = len(server.prompts)
    again = search(judged(study="again"), tmp_path / "storage")
    assert [trial["score"] for trial in again["trials"]] == scores
    assert len(server.prompts) == asked


def test_a_suite_with_a_judge_needs_one_named(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: judge: is missing.*judge: \{local: MODEL"):
        resolve_study(study(suite=SUITE), tmp_path)


def test_a_judge_takes_turns_with_an_engine_that_can_rest_alone(
    study: Study, tmp_path: Path
) -> None:
    judge = {"local": "m", "sleep": True}
    with pytest.raises(ConfigError, match=r"study\.yaml: judge\.sleep: takes turns with vLLM in"):
        resolve_study(study(suite=SUITE, judge=judge), tmp_path)


@pytest.mark.parametrize(
    ("judge", "complaint"),
    [
        ({"model": "m", "api_key": "x"}, "judge.api_key: unknown key; did you mean 'api_key_env'?"),
        ({"model": "m"}, "judge: api_key_env: is missing; name the variable with the key of api"),
        (
            {"local": "m", "others": [{"local": "n", "gpus": 1}]},
            "judge.others.0.gpus: unknown key; did you mean 'gpu'?",
        ),
        (
            {"local": "m", "finalists": {"grading": 1}},
            "judge.finalists.grading: unknown key; did you mean 'gradings'?",
        ),
        ({"local": "m", "temperature": 3}, "judge.temperature: Input should be less than"),
        (
            {"local": "m", "sleep": True, "gpu": 1},
            "judge: sleep: is for a judge on the candidates'",
        ),
        ({"local": "m", "max_tokens": 3}, "judge: max_tokens: say reply_tokens for the length"),
    ],
    ids=str,
)
def test_mistakes_of_a_judge_are_named_by_their_place(
    study: Study, judge: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study(suite=SUITE, judge=judge)
    assert f"study.yaml: {complaint}" in str(caught.value)


def test_a_judge_that_is_not_there_is_found_before_an_engine_starts(
    judged: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for judge, complaint in (
        ({"base_url": "http://127.0.0.1:9/v1", "patience": 0.2}, "could not be had for 0.2 s"),
        ({"api_key_env": "NO_SUCH_KEY"}, "the variable NO_SUCH_KEY is not set"),
    ):
        config = judged(
            judge=judge, engine={"name": "vllm", "url": "http://127.0.0.1:9", "repeatable": False}
        )
        storage = tmp_path / "nothing"
        assert main(["search", config.where, "--storage", str(storage)]) == 2
        assert "study.yaml: judge: " in (said := capfd.readouterr().err)
        assert complaint in said
        assert not storage.exists()


def test_what_changes_a_grade_is_another_study_and_what_does_not_is_not(
    judged: Study, tmp_path: Path
) -> None:
    fingerprint = resolve_study(judged(), tmp_path).fingerprint
    harmless = {"concurrency": 2, "max_total_tokens": 10**9, "patience": 9.0, "timeout": 1.0}
    assert resolve_study(judged(judge=harmless), tmp_path).fingerprint == fingerprint
    other = resolve_study(judged(judge={"temperature": 0.5, "gradings": 2}), tmp_path).fingerprint
    assert what_changed(fingerprint, other) == [
        "judge.temperature: was 0.0, is 0.5",
        "judge.gradings: was 1, is 2",
    ]
    unused = judged(suite={"scorer": "exact", "data": "tasks.jsonl"})
    assert not any(key.startswith("judge") for key in resolve_study(unused, tmp_path).fingerprint)


@pytest.mark.parametrize(
    "judge", [{"temperature": None}, {"model": None, "local": "m", "options": {"dtype": "auto"}}]
)
def test_a_stored_study_has_the_judge_that_was_asked_for(
    study: Study, judge: dict[str, Any], tmp_path: Path
) -> None:
    asked = {"model": "m", "base_url": "http://127.0.0.1:9/v1"} | judge
    if "local" in judge:
        del asked["model"], asked["base_url"]
    config = study(suite=SUITE, judge=asked)
    stored = study_from_mapping(config.to_mapping(), where="study s", folder=config.folder)
    assert stored.judge == config.judge
    assert stored.to_mapping() == config.to_mapping()


def test_answers_are_shown_and_written_with_the_judges_words(
    judged: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "storage"
    prices = {"input": 1.0, "output": 10.0}
    search(judged(judge={"prices": prices}), storage)
    command = ["answers", "formula", "--storage", str(storage)]

    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["study"] == "formula"
    everything = shown["answers"]
    wanted = next(each for each in everything if each["trial"] == 2)
    assert wanted["candidate"] == "trial 2"
    assert wanted["settings"]["max_tokens"] == 4
    (part,) = wanted["parts"]
    assert json.loads(part["reply"])["grade"] == part["grade"] == wanted["grade"]

    one = ["--trial", "2", "--task", wanted["task"]]
    assert main([*command, *one, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == [wanted]
    assert main([*command, *one]) == 0
    page = capsys.readouterr().out
    assert "base" in page
    assert "trial 2" in page
    assert "its characters" in page
    assert "{" not in page, "of the judge's reply the reason is shown"
    assert main([*command, "--task", wanted["task"]]) == 0
    page = capsys.readouterr().out
    assert "trial 2" in page
    assert "model 0" not in page, "a model is called as the study calls it"

    for file in ("all.parquet", "all.csv"):
        assert main([*command, "--export", str(tmp_path / file)]) == 0
        assert main([*command, "--export", str(tmp_path / file)]) == 2
    table = pandas.read_parquet(tmp_path / "all.parquet")
    assert len(table) == len(pandas.read_csv(tmp_path / "all.csv")) == len(everything)
    assert table["answer"].tolist() == [each["answer"] for each in everything]
    assert set(table["trial"].dropna()) == set(range(6))
    paid = table["cost"].sum()
    capsys.readouterr()
    assert main(["status", "formula", "--storage", str(storage), "--json"]) == 0
    (usage,) = json.loads(capsys.readouterr().out)["judges"]
    assert usage["judge"] == faults.MODEL
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        100 * usage["calls"],
        10 * usage["calls"],
    )
    assert usage["cost"] == pytest.approx(paid) == pytest.approx(2e-4 * usage["calls"])
    assert main(["status", "formula", "--storage", str(storage)]) == 0
    shown = capsys.readouterr().out
    assert f"judge   scripted: {usage['calls']} calls, {110 * usage['calls']} tokens, cost" in shown
    assert main([*command, "--trial", "6"]) == 2
    assert "has no trial 6; there are 6, from 0" in capsys.readouterr().err
    assert main([*command, "--task", "x"]) == 2
    assert main([*command, "--export", "table.txt"]) == 2
    assert "a table ends in .parquet or .csv" in capsys.readouterr().err


# Every answer to every task is a call of its own.
EACH = {
    **SUITE,
    "rubric": {"prompt": "Task {{ id }}. # The answer to grade\n{{ answer }}", "low": 1, "high": 5},
}


def scores_of(status: dict[str, Any]) -> list[float | None]:
    return [trial["score"] for trial in status["trials"]]


@pytest.mark.slow
def test_a_killed_search_repeats_no_call_but_those_in_flight(
    judged: Study, server: ScriptedJudge, tmp_path: Path
) -> None:
    unbroken = search(judged(suite=EACH), tmp_path / "unbroken")
    needed = len(server.prompts)
    server.prompts.clear()
    server.latency = 0.05
    config = judged(suite=EACH, judge={"concurrency": 4})
    command = [sys.executable, "-m", "evomerge", "search", config.where]
    command += ["--storage", str(tmp_path / "broken")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while len(server.prompts) < needed // 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    server.latency = 0.0
    resumed = search(config, tmp_path / "broken")
    assert scores_of(resumed) == scores_of(unbroken)
    assert needed <= len(server.prompts) <= needed + 4


def test_a_judge_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(
    judged: Study, server: ScriptedJudge, tmp_path: Path
) -> None:
    unbroken = search(judged(suite=EACH), tmp_path / "unbroken")
    needed = len(server.prompts)
    server.prompts.clear()

    def goes_away(prompt: str) -> str:
        if len(server.prompts) == needed // 2:
            server.faults = [faults.BROKEN] * 10_000
        return grade_by_length(prompt)

    server.reply = goes_away
    config = judged(suite=EACH, judge={"patience": 0.3, "concurrency": 4})
    with pytest.raises(RunError, match=r"could not be had for 0\.3 s: 500: out of order"):
        search(config, tmp_path / "broken")
    stopped = study_status(tmp_path / "broken", "formula")
    assert stopped["state"] == "interrupted"
    assert "could not be had" in stopped["stopped"]
    done = scores_of(stopped)
    assert None not in done  # nobody failed of it
    assert done == scores_of(unbroken)[: len(done)]
    server.faults, server.reply = [], grade_by_length
    assert scores_of(search(config, tmp_path / "broken")) == scores_of(unbroken)
    assert len(server.prompts) == needed


def test_a_limit_of_the_cost_stops_the_run_which_goes_on_when_it_is_raised(
    judged: Study, server: ScriptedJudge, tmp_path: Path
) -> None:
    limit = {"max_total_tokens": 3000, "concurrency": 2}  # 110 a call
    with pytest.raises(RunError, match=r"max_total_tokens is 3000; raise it and resume"):
        search(judged(suite=EACH, judge=limit), tmp_path / "storage")
    assert 28 <= len(server.prompts) <= 29
    status = search(judged(suite=EACH, judge={"max_total_tokens": 10**6}), tmp_path / "storage")
    assert status["state"] == "finished"
    (usage,) = study_status(tmp_path / "storage", "formula")["judges"]
    assert usage["calls"] == len(server.prompts)
    by_name = stored_study(tmp_path / "storage", "formula")
    assert by_name.judge is not None
    assert by_name.judge.max_total_tokens == 10**6


def test_a_candidate_whose_answers_get_no_grades_fails_alone(
    judged: Study,
    server: ScriptedJudge,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dislikes_some(prompt: str) -> str:
        answer = prompt.partition("# The answer to grade\n")[2].partition("\n\nEnd")[0]
        return "Hm." if sum(map(ord, answer)) % 3 == 0 else grade_by_length(prompt)

    server.reply = dislikes_some
    status = search(judged(suite=EACH, budget={"trials": 12}), tmp_path / "storage")
    failed = [trial for trial in status["trials"] if trial["state"] == "failed"]
    assert 0 < len(failed) < 12
    for trial in failed:
        assert trial["reason"] == (
            "7 of 7 answers could not be graded, 1 at most may be left out: "
            "the judge's replies hold no grade"
        )
        assert trial["score"] is None
        rows = study_answers(tmp_path / "storage", "formula", [trial["number"]])
        assert len(rows) == 7
        assert {(row.grade, row.reason) for row in rows} == {(None, trial["reason"])}
        assert {(part.grade, part.reply) for row in rows for part in row.parts} == {(None, "Hm.")}
    one = ["--trial", str(failed[0]["number"]), "--storage", str(tmp_path / "storage")]
    assert main(["answers", "formula", *one]) == 0
    assert "no grade that counts: 7 of 7 answers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("ended_by", ["judge", "Ctrl-C", "Ctrl-C while the engine starts again"])
def test_answers_that_were_not_graded_are_kept_and_not_written_again(
    judged: Study,
    server: ScriptedJudge,
    tmp_path: Path,
    ended_by: str,
) -> None:
    written: list[int] = []
    interrupted_after: list[int] = []

    def run(storage: Path, **judge: Any) -> dict[str, Any]:
        class Counting(EngineEvaluator):
            def begin(
                self, recipe: Recipe, task_ids: Sequence[str], attempt: int
            ) -> Future[list[TaskResult]]:
                if sum(written) in interrupted_after:
                    raise KeyboardInterrupt if ended_by == "Ctrl-C" else EngineDiedError("gone")
                results = super().begin(recipe, task_ids, attempt)
                written.append(len(task_ids))
                return results

        with Evaluators() as evaluators:

            @contextmanager
            def counted(study: ResolvedStudy, split: TimeSplit) -> Iterator[EngineEvaluator]:
                if sum(written) in interrupted_after:
                    raise KeyboardInterrupt
                with evaluators.open(study, split) as evaluator:
                    yield Counting(**vars(evaluator))

            config = judged(suite=EACH, judge={"concurrency": 4, **judge})
            return dict(run_search(config, storage=storage, open_evaluator=counted).status)

    unbroken = run(tmp_path / "unbroken")
    needed = sum(written)
    written.clear()
    server.prompts.clear()

    def goes_away(prompt: str) -> str:
        if len(server.prompts) == 20 and ended_by == "judge":
            server.faults = [faults.BROKEN] * 10_000
        time.sleep(0.05 if ended_by == "judge" else 0.5)  # so that answers wait for their grades
        return grade_by_length(prompt)

    server.reply = goes_away
    storage = tmp_path / "broken"
    if ended_by == "judge":
        why = "could not be had for 0.3 s: 500: out of order"
        with pytest.raises(RunError, match=why):
            run(storage, patience=0.3)
    else:
        why = "the run ended before all was graded"
        interrupted_after.append(42)  # within a generation
        with pytest.raises(KeyboardInterrupt):
            run(storage)
        interrupted_after.clear()
    kept = [row for row in study_answers(storage, "formula") if row.reason is not None]
    # How many wait for grades when the engine is gone is a matter of this machine's load.
    assert len({row.candidate for row in kept}) > (ended_by in ("judge", "Ctrl-C"))
    assert all(why in (row.reason or "") and row.grade is None for row in kept)
    assert sum(written) < needed
    server.faults, server.reply = [], grade_by_length
    assert scores_of(run(storage)) == scores_of(unbroken)
    assert sum(written) == needed
    assert all(row.reason is None for row in study_answers(storage, "formula"))
    assert len(server.prompts) == len({*server.prompts})  # and no grade was paid for twice


def test_the_engine_goes_on_while_the_judge_still_grades(
    judged: Study, server: ScriptedJudge, tmp_path: Path
) -> None:
    server.latency = 0.4
    on_their_way: list[int] = []

    class Watching:
        def __init__(self, evaluator: EngineEvaluator) -> None:
            self._evaluator = evaluator

        def begin(
            self, recipe: Recipe, task_ids: Sequence[str], attempt: int
        ) -> Future[list[TaskResult]]:
            on_their_way.append(server.at_once)
            return self._evaluator.begin(recipe, task_ids, attempt)

    with Evaluators() as evaluators:

        @contextmanager
        def watched(study: ResolvedStudy, split: TimeSplit) -> Iterator[Watching]:
            with evaluators.open(study, split) as evaluator:
                yield Watching(evaluator)

        config = judged(suite=EACH)
        outcome = run_search(config, storage=tmp_path / "storage", open_evaluator=watched)
    assert outcome.status["state"] == "finished"
    # Candidates began while calls for the ones before were on their way.
    assert sum(calls > 0 for calls in on_their_way) >= 3


def test_the_preset_for_llm_jp_names_the_tasks_of_elyza_and_their_judge() -> None:
    study = read_study("llm-jp-3-13b-task-arithmetic")
    assert study.judge is not None
    assert (study.judge.name, study.judge.host) == ("gpt-4.1", "api.openai.com")
    assert isinstance(study.suite, SuiteConfig)
    assert study.suite.rubric is not None
    assert "{{ eval_aspect }}" in study.suite.rubric.prompt


def test_the_presets_judge_is_told_what_each_task_of_elyza_is_about() -> None:
    study = read_study("llm-jp-3-13b-task-arithmetic")
    suite = load_suite(study.suite, study.folder, data=shared_data("elyza_tasks_100.csv"))
    check_graders(suite, study.judge)
    assert len(suite.tasks) == 100
    assert suite.rubric is not None
    asked = suite.rubric.question(GradeRequest(suite.tasks[0], "はい", 0))
    assert suite.tasks[0].fields["eval_aspect"] in asked


def test_a_judge_with_its_replies_in_postgresql(
    judged: Study,
    server: ScriptedJudge,
    postgresql: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUDIES_URL", postgresql)
    server.reply = lambda prompt: f"nul \0 and half \ud800 of a pair. GRADE: {1 + len(prompt) % 5}"
    config = judged(suite=EACH, study="judged", storage={"database_env": "STUDIES_URL"})
    status = search(config, tmp_path / "pg")
    (usage,) = status["judges"]
    assert usage["calls"] == len(server.prompts)
    answers = study_answers(tmp_path / "pg", "judged", [0])
    assert all("nul \ufffd and half" in (row.parts[0].reply or "") for row in answers)
    server.prompts.clear()
    again = judged(suite=EACH, study="again", storage={"database_env": "STUDIES_URL"})
    assert scores_of(search(again, tmp_path / "pg")) == scores_of(status)
    assert server.prompts == []


def test_models_beside_each_other_have_no_judge_on_their_gpu(tmp_path: Path) -> None:
    config = SuiteConfig.model_validate({**EACH, "data": "tasks.jsonl"})
    with pytest.raises(ConfigError, match="judge: sleep: is for searches"):
        measure_models(
            Suite(config, ()),
            [],
            [],
            live=LiveSettings("vllm"),
            judge=judge_from_mapping({"local": "m", "sleep": True}, "study.yaml"),
            storage=tmp_path,
            folder=tmp_path,
            environment={},
            say=lambda line: None,
        )
