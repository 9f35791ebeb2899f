"""The judge against a scripted server over real HTTP: grades, faults, limits, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from evomerge.database import open_database
from evomerge.errors import CandidateError, ConfigError, RunError
from evomerge.evaluate import local_judge
from evomerge.evaluate.judge import Judge, Rubric, Seat, open_judge
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.replies import Replies
from evomerge.evaluate.task import GradeRequest, ScorerGrade, Task, UngradedError
from evomerge.schema import replies
from tests.evaluate import judge_server as faults
from tests.evaluate.judge_server import Fault, ScriptedJudge, scripted

RUBRIC = Rubric("Grade {{ input }} by {{ aspect }}: {{ answer }}", 1, 5)

Open = Callable[..., Judge]


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with scripted(ScriptedJudge()) as judge:
        yield judge


@pytest.fixture
def opened(server: ScriptedJudge, tmp_path: Path) -> Iterator[Open]:
    """Opens the judge of `server` with other settings; all are closed at the end."""
    with ExitStack() as stack:

        def open_one(rubric: Rubric = RUBRIC, payer: str | None = None, **more: Any) -> Judge:
            return stack.enter_context(opening(server, tmp_path, rubric, payer, **more))

        yield open_one


def opening(
    server: ScriptedJudge,
    storage: Path,
    rubric: Rubric = RUBRIC,
    payer: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **more: Any,
) -> AbstractContextManager[Judge]:
    mapping = {"model": faults.MODEL, "base_url": server.url, "patience": 5.0} | more
    return open_judge(
        judge_from_mapping(mapping, "study.yaml"),
        rubric,
        open_database=lambda: open_database(storage),
        payer=payer,
        folder=storage,
        environment=os.environ,
        say=say,
    )


def request(number: int, grade: int, attempt: int = 0) -> GradeRequest:
    task = Task(str(number), f"question {number}", "right", "all", "?", fields={"aspect": "taste"})
    return GradeRequest(task, f"answer {number} deserves {grade}", attempt)


def requests(count: int, attempt: int = 0) -> list[GradeRequest]:
    return [request(number, 1 + number % 5, attempt) for number in range(count)]


def grades(judge: Judge, items: Sequence[GradeRequest]) -> list[float | None]:
    return [one.grade for one in judge.grade_all(items).result(60)]


def kept(storage: Path) -> list[dict[str, Any]]:
    database = open_database(storage)
    with database.connect() as connection:
        rows = [dict(row) for row in connection.execute(sql.select(replies)).mappings()]
    database.dispose()
    return rows


def test_answers_get_the_judges_grades_in_their_order(opened: Open, server: ScriptedJudge) -> None:
    found = opened().grade_all(requests(7)).result(60)
    assert [one.grade for one in found] == [1, 2, 3, 4, 5, 1, 2]
    assert found[0] == ScorerGrade(
        "judge", 1.0, '{"reason": "as it says", "grade": 1}', found[0].usage
    )
    assert sorted(server.prompts)[3] == "Grade question 3 by taste: answer 3 deserves 4"
    (asked,) = {json.dumps(one | {"messages": None}, sort_keys=True) for one in server.requests}
    said = json.loads(asked)
    assert (said["temperature"], said["max_tokens"], said["model"]) == (0.0, 1024, "scripted")
    schema = said["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["grade", "reason"]  # sorted by this test's dumps
    assert schema["properties"]["grade"]["enum"] == [1, 2, 3, 4, 5]
    first = server.requests[0]["response_format"]["json_schema"]["schema"]["properties"]
    assert list(first) == ["reason", "grade"]  # a model writes its reason first


def test_a_server_without_structured_output_is_read_as_text(
    opened: Open, server: ScriptedJudge
) -> None:
    server.takes_schema = False
    server.reply = lambda prompt: "Of 5 points it has some.\nGRADE: 4"
    judge = opened(concurrency=1)
    assert grades(judge, requests(3)) == [4, 4, 4]
    # Found out once.
    assert ["response_format" in one for one in server.requests] == [True, False, False, False]


@pytest.mark.parametrize(
    "fault",
    [faults.BROKEN, faults.GARBAGE, faults.HALF_JSON, faults.HALF_BODY],
    ids=["500", "garbage", "half JSON", "half a body"],
)
def test_a_passing_fault_is_tried_again(opened: Open, server: ScriptedJudge, fault: Fault) -> None:
    server.faults = [fault]
    assert grades(opened(), requests(3)) == [1, 2, 3]
    assert len(server.requests) == 4


def test_a_busy_server_is_left_alone_as_long_as_it_asks(
    opened: Open, server: ScriptedJudge
) -> None:
    server.faults = [faults.BUSY]
    judge = opened(concurrency=1)
    start = time.monotonic()
    assert grades(judge, requests(2)) == [1, 2]
    assert time.monotonic() - start >= 1.0
    assert len(server.requests) == 3


def test_who_waits_for_a_judge_is_told_once_what_for(
    server: ScriptedJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.evaluate.judge_client._SILENT_SECONDS", 0.0)
    told: list[str] = []
    with opening(server, tmp_path, say=told.append, patience=60.0) as judge:
        server.faults = [faults.BROKEN] * 3
        assert grades(judge, requests(4)) == [1, 2, 3, 4]
    assert told[1:] == [
        f"judge: {server.url} fails (500: out of order); it is tried for 60 s (patience)"
    ]


def test_a_server_that_wants_to_be_left_alone_for_too_long_stops_the_run_at_once(
    opened: Open, server: ScriptedJudge
) -> None:
    server.faults = [Fault(429, {"Retry-After": "3600"}, '{"error": {"message": "slow down"}}')] * 9
    words = r"/v1 asks to be left alone for 3600 s, longer than 9 s: 429: slow down$"
    with pytest.raises(RunError, match=words):
        opened(patience=9.0).grade_all(requests(3)).result(5)


def test_a_server_that_is_busy_for_too_long_is_told_as_that(
    opened: Open, server: ScriptedJudge
) -> None:
    server.faults = [faults.BUSY] * 100  # it asks for a second each time
    with pytest.raises(RunError, match=r"/v1 could not be had for 2 s: 429: slow down$"):
        opened(patience=2.0).grade_all(requests(3)).result(10)


def test_a_judge_that_never_gives_a_grade_stops_the_run(
    opened: Open, server: ScriptedJudge
) -> None:
    server.reply = lambda prompt: "Hm.\nNo."
    judge = opened()
    words = "the judge's replies hold no grade, for none of 4 answers; the last is 'Hm. No.'"
    with pytest.raises(RunError, match=words):
        judge.grade_all(requests(4)).result(60)
    server.finish_reason = "length"
    with pytest.raises(RunError, match=r"no grade \(4 were cut: raise reply_tokens, "):
        opened().grade_all(requests(4)).result(60)
    # Of one that did before it is the candidate's.
    server.reply, server.finish_reason = faults.grade_in_prompt, "stop"
    assert grades(judge, requests(6)[4:]) == [5, 1]
    with pytest.raises(UngradedError, match="4 of 4 answers could not be graded"):
        judge.grade_all(requests(4)).result(60)
    # Nor does another run of it stop there, at each try: what its payer got of it before counts.
    server.reply = lambda prompt: "Hm.\nNo."
    with pytest.raises(UngradedError, match="4 of 4 answers could not be graded"):
        opened().grade_all(requests(4)).result(60)
    with pytest.raises(RunError, match="for none of 4 answers"):
        opened(payer="another").grade_all(requests(4)).result(60)
    with pytest.raises(RunError, match="for none of 4 answers"):
        opened(reply_tokens=7).grade_all(requests(4)).result(60)


def test_a_server_that_says_nothing_is_asked_again_after_the_timeout(
    opened: Open, server: ScriptedJudge
) -> None:
    server.faults = [faults.SILENCE]
    assert grades(opened(timeout=0.5), requests(2)) == [1, 2]
    assert len(server.requests) == 3


def test_a_judge_that_stays_away_stops_the_run_and_keeps_what_was_paid(
    opened: Open, server: ScriptedJudge, tmp_path: Path
) -> None:
    judge = opened(concurrency=1, patience=0.4)
    assert grades(judge, requests(2)) == [1, 2]
    server.faults = [faults.BROKEN] * 1000
    with pytest.raises(RunError, match=r"could not be had for 0\.4 s: 500: out of order"):
        judge.grade_all(requests(6)).result(60)
    # Who waited for a place did not try by itself.
    asked = len(server.requests)
    with pytest.raises(RunError, match="could not be had"):
        judge.grade_all(requests(6)).result(60)
    assert len(server.requests) == asked
    server.faults = []
    assert grades(opened(), requests(6)) == [1, 2, 3, 4, 5, 1]
    assert len(server.prompts) == len(kept(tmp_path)) == 6


def test_a_reply_without_a_grade_is_asked_for_again_and_never_a_zero(
    opened: Open, server: ScriptedJudge, tmp_path: Path
) -> None:
    server.reply = lambda prompt: "GRADE: 3" if "whole number from 1 to 5" in prompt else "Hm."
    assert grades(opened(), requests(2)) == [3, 3]
    assert sorted(row["grade"] or 0 for row in kept(tmp_path)) == [0, 0, 3, 3]
    assert [row["grade"] for row in kept(tmp_path)].count(None) == 2


def test_a_reply_that_was_cut_has_no_grade(opened: Open, server: ScriptedJudge) -> None:
    server.finish_reason = "length"
    server.reply = lambda prompt: "I would say 4"
    assert grades(opened(), requests(1)) == [None]
    assert len(server.prompts) == 3


def test_a_reply_without_end_has_no_grade_and_is_not_kept_whole(
    opened: Open, server: ScriptedJudge, tmp_path: Path
) -> None:
    server.reply = lambda prompt: "4" if "whole number" in prompt else "{" * 3_000_000 + " GRADE: 4"
    assert grades(opened(), requests(1)) == [4]
    assert [len(row["reply"]) for row in kept(tmp_path)] == [102_400, 1]


def test_one_answer_or_two_percent_may_stay_without_a_grade(
    opened: Open, server: ScriptedJudge
) -> None:
    unlucky = {"question 0 ", "question 7 "}

    def reply(prompt: str) -> str:
        return "Hm." if any(f"{q}by" in prompt for q in unlucky) else faults.grade_in_prompt(prompt)

    server.reply = reply
    judge = opened()
    assert grades(judge, requests(7)) == [None, 2, 3, 4, 5, 1, 2]
    with pytest.raises(CandidateError, match=r"2 of 8 answers could not be graded, 1 at most"):
        judge.grade_all(requests(8)).result(60)
    assert grades(judge, requests(100)).count(None) == 2
    # What had no grade three times is not paid for a fourth time in the same run.
    asked = len(server.prompts)
    assert grades(judge, requests(7))[0] is None
    assert len(server.prompts) == asked


def test_what_one_run_got_no_grade_for_another_run_asks_about_anew(
    opened: Open, server: ScriptedJudge, tmp_path: Path
) -> None:
    server.reply = lambda prompt: (
        "Hm." if "question 0 " in prompt else faults.grade_in_prompt(prompt)
    )
    assert grades(opened(), requests(2)) == [None, 2]
    assert grades(opened(), requests(2)) == [None, 2]
    server.reply = faults.grade_in_prompt  # somebody has mended it
    assert grades(opened(), requests(2)) == [1, 2]
    # In its first words, as if it had not been asked before.
    assert server.prompts[-1] == "Grade question 0 by taste: answer 0 deserves 1"
    assert grades(opened(), requests(2)) == [1, 2]
    assert len(server.prompts) == 1 + 3 + 3 + 1
    assert [row["grade"] for row in kept(tmp_path)].count(None) == 6, "what they were stays"


def test_a_judge_that_is_stopped_keeps_what_arrives_soon_and_fails_the_rest(
    opened: Open, server: ScriptedJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.evaluate.judge._GRACE_SECONDS", 0.5)
    server.latency = 0.2
    judge = opened(concurrency=2)
    future = judge.grade_all(requests(6))
    while server.at_once < 2:
        time.sleep(0.01)
    judge.stop()
    with pytest.raises(RunError, match="the run ended before all was graded"):
        future.result(1)
    assert len(server.prompts) == len(kept(tmp_path)) == 2
    server.latency = 3.0  # longer than anybody waits
    other = opened()
    future = other.grade_all(requests(6))
    while not server.at_once:
        time.sleep(0.01)
    other.stop()
    with pytest.raises(RunError, match="the run ended before all was graded"):
        future.result(1)


def test_an_answer_that_the_judge_does_not_take_stays_without_a_grade(
    opened: Open, server: ScriptedJudge
) -> None:
    judge = opened(concurrency=1, structured="text")
    assert grades(judge, requests(1)) == [1]
    server.faults = [Fault(400, {}, '{"error": {"message": "context is too long"}}')]
    assert grades(judge, [request(1, 4), request(2, 5)]) == [None, 5]
    server.faults = [Fault(400, {}, '{"error": {"message": "temperature is unknown"}}')] * 9
    with pytest.raises(RunError, match=r"no answer was taken.*temperature is unknown"):
        judge.grade_all([request(11, 4), request(12, 5)]).result(60)


def test_an_answer_that_the_rubric_fails_of_stays_without_a_grade(
    opened: Open, server: ScriptedJudge
) -> None:
    judge = opened(Rubric("{{ answer.split()[2] }}: {{ answer }}", 1, 5))
    items = [*requests(3), replace(request(3, 4), answer="word")]
    found = judge.grade_all(items).result(60)
    assert [one.grade for one in found] == [1, 2, 3, None]
    assert (found[3].reply or "").startswith("[not asked: suite: judge: task 3: prompt: ")
    with judge.unit() as unit:
        for place, item in enumerate(items):
            unit.add(place, item)
    assert unit.future.result(60)[3] == found[3]
    items[0] = replace(items[0], answer="")
    with pytest.raises(
        UngradedError, match=r"^2 of 4 answers .* left out: suite: judge: task 3: prompt: "
    ):
        judge.grade_all(items).result(60)
    assert len(server.prompts) == 3


def test_an_answer_with_half_a_surrogate_is_graded_as_what_can_be_sent(
    opened: Open, server: ScriptedJudge
) -> None:
    item = replace(request(0, 1), answer="\ud800 deserves 4")
    assert grades(opened(), [item]) == [4]
    assert server.prompts == ["Grade question 0 by taste: \ufffd deserves 4"]


def test_no_grade_is_paid_for_twice(opened: Open, server: ScriptedJudge, tmp_path: Path) -> None:
    first = opened(payer="one").grade_all(requests(5)).result(60)
    again = opened(payer="two").grade_all(requests(5)).result(60)
    assert [one.grade for one in again] == [one.grade for one in first]
    assert [one.reply for one in again] == [one.reply for one in first]
    assert len(server.prompts) == 5
    assert {row["payer"] for row in kept(tmp_path)} == {"one"}
    # The same answer of two candidates at the same time is one call, too.
    server.latency = 0.3
    judge = opened()
    futures = [judge.grade_all([request(9, 2)]) for _ in range(3)]
    found = [future.result(60)[0] for future in futures]
    assert [one.grade for one in found] == [2, 2, 2]
    assert [one.usage is None for one in found].count(False) == 1
    (one, other) = judge.grade_all([request(10, 2)] * 2).result(60)
    assert (one.usage is None, other.usage is None) == (False, True)
    assert len(server.prompts) == 7


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"reply_tokens": 64}, {"request": {"seed": 1}}], ids=str
)
def test_other_settings_of_the_judge_are_other_grades(
    opened: Open, server: ScriptedJudge, change: dict[str, Any]
) -> None:
    grades(opened(), requests(2))
    grades(opened(concurrency=3, patience=9.0), requests(2))
    assert len(server.prompts) == 2
    grades(opened(**change), requests(2))
    grades(opened(Rubric(RUBRIC.prompt, 1, 10)), requests(2))
    assert len(server.prompts) == 6


def test_a_wanted_repetition_is_graded_again(opened: Open, server: ScriptedJudge) -> None:
    judge = opened()
    grades(judge, requests(2))
    grades(judge, requests(2, attempt=1))
    assert len(server.prompts) == 4


def test_finalists_are_graded_by_the_whole_panel(opened: Open, server: ScriptedJudge) -> None:
    said = iter([2, 3, 5, 5, 5, 1])
    server.reply = lambda prompt: str(next(said))
    with scripted(ScriptedJudge(reply=lambda prompt: "1")) as second:
        other = {"model": faults.MODEL, "base_url": second.url, "reply_tokens": 8}
        judge = opened(concurrency=1, finalists={"gradings": 3, "others": [other]})
        assert grades(judge, [request(0, 1)]) == [2]
        (final,) = judge.grade_all([request(0, 1, attempt=1)]).result(60)
        # (3 + 5 + 5) / 3 by the first, 1 by the second.
        assert final.grade == pytest.approx((13 / 3 + 1) / 2)
        assert final.reply is not None
        assert final.reply.startswith("[scripted, grading 1]\n3\n\n[scripted, grading 2]\n5")
        assert (len(server.prompts), len(second.prompts)) == (4, 3)


def test_empty_answers_are_graded_as_the_rubric_says(opened: Open, server: ScriptedJudge) -> None:
    silent = GradeRequest(request(0, 1).task, " \n", 0)
    server.reply = lambda prompt: "2"
    assert grades(opened(Rubric(RUBRIC.prompt, 1, 5, empty=1.0)), [silent]) == [1.0]
    assert server.prompts == []
    assert grades(opened(), [silent]) == [2]


def test_the_rubric_sees_every_turn(opened: Open, server: ScriptedJudge) -> None:
    template = "{% for turn in turns %}{{ turn.user }}|{{ turn.answer }};{% endfor %}{{ answer }}"
    task = Task("1", "in", "ref", "all", "first?", turns=("second?",))
    server.reply = lambda prompt: "2"
    item = GradeRequest(task, "two", 0, earlier=("one",))
    (found,) = opened(Rubric(template, 1, 5)).grade_all([item]).result(60)
    assert found.turn == 1
    assert server.prompts == ["first?|one;second?|two;two"]


def test_no_more_calls_run_at_once_than_are_allowed(opened: Open, server: ScriptedJudge) -> None:
    server.latency = 0.05
    grades(opened(concurrency=4), requests(24))
    assert server.most_at_once == 4


def test_calls_keep_to_requests_and_tokens_per_minute(opened: Open, server: ScriptedJudge) -> None:
    start = time.monotonic()
    grades(opened(requests_per_minute=600), requests(6))  # one each 0.1 s
    assert time.monotonic() - start >= 0.5
    start = time.monotonic()
    # 110 tokens a call at 330 a second.
    grades(opened(tokens_per_minute=19800, concurrency=1, reply_tokens=9), requests(4))
    assert time.monotonic() - start >= 1.0


def test_tokens_and_cost_are_counted_and_end_the_run_at_their_limit(
    opened: Open, server: ScriptedJudge, tmp_path: Path
) -> None:
    prices = {"input": 1.0, "output": 10.0}  # a call: 100 · 1 + 10 · 10 = 200 per million
    limits = {"prices": prices, "concurrency": 1}
    judge = opened(payer="study", **limits, max_cost=5e-4)
    with pytest.raises(RunError, match=r"max_cost is 0\.0005; raise it and resume"):
        judge.grade_all(requests(5)).result(60)
    assert len(server.prompts) == 3
    # The limit counts all runs of the study, not those of others.
    with pytest.raises(RunError, match="max_cost is"):
        opened(payer="study", **limits, max_cost=6e-4).grade_all(requests(5)).result(60)
    assert len(server.prompts) == 3
    found = opened(payer="study", **limits, max_cost=1.0).grade_all(requests(5)).result(60)
    usage = found[4].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 10)
    assert usage.cost == pytest.approx(2e-4)
    assert found[0].usage is None  # was known
    assert sum(row["cost"] for row in kept(tmp_path)) == pytest.approx(5 * 2e-4)
    with pytest.raises(RunError, match=r"taken 110 tokens, max_total_tokens is 100"):
        opened(concurrency=1, max_total_tokens=100).grade_all(requests(9)).result(60)
    assert len(server.prompts) == 6


def test_nobody_sends_the_judges_questions_on_to_another_host(
    opened: Open, server: ScriptedJudge
) -> None:
    judges = [opened(temperature=0.1), opened(temperature=0.2)]
    with scripted(ScriptedJudge()) as other:
        for status, judge in zip((307, 308), judges, strict=True):
            server.faults = [Fault(status, {"Location": f"{other.url}/chat/completions"})]
            with pytest.raises(RunError, match=f"says {status}"):
                judge.grade_all(requests(1)).result(60)
        assert other.requests == []


def test_the_key_is_sent_and_never_shown(
    opened: Open,
    server: ScriptedJudge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "hidden-value")
    monkeypatch.setenv("OPENAI_ORG_ID", "our-organization")
    server.lists_with_key = "hidden-value"
    lines: list[str] = []
    grades(opened(api_key_env="TEST_JUDGE_KEY", say=lines.append), requests(1))
    assert server.headers[0]["authorization"] == "Bearer hidden-value"
    assert "our-organization" not in str(server.headers)
    host = server.url.removeprefix("http://").removesuffix("/v1")
    assert lines == [f"judge: answers go to {host} (scripted), with the key in TEST_JUDGE_KEY"]
    assert b"hidden-value" not in (tmp_path / "evomerge.db").read_bytes()
    server.faults = [Fault(401, {}, '{"error": {"message": "wrong key"}}')]
    with pytest.raises(RunError, match=r"401: wrong key \(the key in TEST_JUDGE_KEY\)") as caught:
        opened(api_key_env="TEST_JUDGE_KEY").grade_all(requests(2)).result(60)
    assert "hidden-value" not in str(caught.value)
    # Where the server itself quotes it, too.
    quoting = '{"error": {"message": "no such key: hidden-value"}}'
    server.faults = [Fault(401, {}, quoting)]
    with pytest.raises(RunError, match="401: no such key: …") as caught:
        opened(api_key_env="TEST_JUDGE_KEY").grade_all(requests(4)).result(60)
    assert "hidden-value" not in str(caught.value)


def test_a_wrong_key_is_found_before_the_first_answer_wherever_it_is_asked_for(
    opened: Open, server: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "wrong-value")
    server.faults = [Fault(401, {}, '{"error": {"message": "wrong key"}}')]
    with pytest.raises(ConfigError, match=r"401: wrong key \(the key in TEST_JUDGE_KEY\)"):
        opened(api_key_env="TEST_JUDGE_KEY")  # its models it lists to anybody
    assert server.requests.pop()["max_tokens"] == 1
    server.lists_with_key = "right-value"
    with pytest.raises(ConfigError, match=r"401: wrong key \(the key in TEST_JUDGE_KEY\)"):
        opened(api_key_env="TEST_JUDGE_KEY")
    monkeypatch.setenv("TEST_JUDGE_KEY", "right-value")
    opened(api_key_env="TEST_JUDGE_KEY")
    server.lists_with_key = None
    opened()  # no key, nothing to try
    assert server.requests == []


@pytest.mark.parametrize("key", ["hidden\nvalue", "hidden value", "hidden–value"])
def test_a_key_that_no_header_takes_is_refused_unseen(
    opened: Open, server: ScriptedJudge, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", key)
    with pytest.raises(ConfigError, match="TEST_JUDGE_KEY holds is no key: one has") as caught:
        opened(api_key_env="TEST_JUDGE_KEY")
    assert "hidden" not in str(caught.value)
    assert server.headers == []


def test_an_unset_key_variable_is_named_before_anything_else(
    server: ScriptedJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with (
        pytest.raises(ConfigError, match="the variable NO_SUCH_KEY is not set"),
        opening(server, tmp_path, api_key_env="NO_SUCH_KEY"),
    ):
        pass
    assert server.headers == []


def test_a_judge_that_is_not_there_is_wrong_input(server: ScriptedJudge, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9.* could not be had.*no connection"):
        opening(server, tmp_path, base_url=url, patience=0.3).__enter__()
    with pytest.raises(ConfigError, match=r"no such model.*did you mean 'scripted'"):
        opening(server, tmp_path, model="scriptet").__enter__()
    server.lists_models = False
    with pytest.raises(ConfigError, match="most base_urls end in /v1"):
        opening(server, tmp_path, base_url=server.url.removesuffix("/v1")).__enter__()
    with opening(server, tmp_path):  # the one token that it was asked for
        assert server.requests[-1]["max_tokens"] == 1


def test_a_judge_on_the_engines_gpu_is_awake_while_it_grades(
    server: ScriptedJudge, tmp_path: Path
) -> None:
    asked = judge_from_mapping({"model": faults.MODEL, "base_url": server.url}, "study.yaml").first
    asleep = asked.model_copy(update={"sleep": True})  # as `served` hands it on
    seat = Seat("judge", asleep, None, {})
    judge = Judge(
        judge_from_mapping({"local": "m", "sleep": True}, "study.yaml"),
        RUBRIC,
        [seat],
        Replies(lambda: open_database(tmp_path), None),
    )
    try:
        assert judge.needs_gpu
        found = judge.grade_all(requests(3))
        assert found.done()
        assert [one.grade for one in found.result()] == [1, 2, 3]
        # What is known needs nobody awake.
        assert [one.grade for one in judge.grade_all(requests(3)).result(60)] == [1, 2, 3]
    finally:
        judge.close()
    assert server.turns == ["/wake_up after 0", "/sleep?level=1 after 3"]


KILLED = """
import os, sys
from pathlib import Path
from tests.evaluate.test_judge import opening, requests
from tests.evaluate.judge_server import ScriptedJudge
server = ScriptedJudge(url=sys.argv[1])
with opening(server, Path(sys.argv[2]), concurrency=4) as judge:
    print("ready", flush=True)
    judge.grade_all(requests(40)).result()
"""


# It ends at the first question; what it leaves behind keeps port and connection open, as the
# workers of a real one may.
_ENDING_SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"object": "list", "data": [{"id": "judge", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        print("ERROR out of memory\\nleaked: a semaphore", flush=True)
        if os.fork():
            os._exit(7)
        time.sleep(60)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="a local judge needs vLLM")
def test_a_server_of_ours_that_ends_stops_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        local_judge, "_command", lambda server, folder, port: ["-c", _ENDING_SERVER, str(port)]
    )
    judged = open_judge(
        judge_from_mapping({"local": "some/model"}, "study.yaml"),
        RUBRIC,
        open_database=lambda: open_database(tmp_path),
        payer=None,
        folder=tmp_path,
        environment={},
        say=lambda line: None,
    )
    with judged as judge:
        start = time.monotonic()
        with pytest.raises(RunError) as caught:
            judge.grade_all(requests(1)).result(60)
        assert time.monotonic() - start < 30  # its `timeout` is 120, its `patience` 300
    assert str(caught.value) == (
        "judge: local: vLLM, which served some/model, ended with status 7; the end of what it "
        "wrote:\nERROR out of memory\n"
    )


def test_a_killed_evaluation_repeats_no_call_but_those_in_flight(
    server: ScriptedJudge, tmp_path: Path, opened: Open
) -> None:
    server.latency = 0.1
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}) as process:
        while len(server.prompts) < 13:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # what was in flight ends at the server
    before, rows = len(server.prompts), len(kept(tmp_path))
    assert before - 4 <= rows <= before < 40
    assert grades(opened(), requests(40)) == [1 + number % 5 for number in range(40)]
    assert len(server.prompts) == before + 40 - rows
