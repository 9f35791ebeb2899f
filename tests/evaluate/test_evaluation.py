"""Evaluations: turns, scorers together, graders that answer later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest

from evomerge.engine.base import Completion, Each, Engine, GenerationSettings, Loaded
from evomerge.errors import CandidateError, ConfigError, RunError
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.own_scorers import FunctionScorer
from evomerge.evaluate.suite import Suite, SuiteConfig
from evomerge.evaluate.task import AnsweredRunError, GradeRequest, ScorerGrade, Task
from evomerge.recipe import Recipe


class CountingEngine(Engine):
    """Answers every prompt with how many words it has; renders chats as `role:text` lines."""

    name = "counting"
    max_model_len = 100
    bos_token_id = None

    def __init__(self, chat: bool = False) -> None:
        self.chat = chat
        self.calls: list[tuple[list[str], object]] = []

    def supports(self, recipe: Recipe) -> str | None:
        return None

    def load(self, recipe: Recipe) -> Loaded:
        return Loaded("v", "live", 0.0)

    def has_chat_template(self) -> bool:
        return self.chat

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        return "\n".join([template or "own", *lines, *(["assistant:"] if cue else [])])

    def encode(self, prompts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [[1 for _ in prompt.split()] for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        self.calls.append((list(prompts), settings))
        written = [Completion(str(len(p.split())), (1,), "stop", 1, "v") for p in prompts]
        for place in reversed(range(len(written))):  # the last is finished first
            if each is not None:
                each(place, written[place])
        return written

    def log_probabilities(
        self, prompts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[float]]:
        raise NotImplementedError

    def close(self) -> None: ...


class LateUnit:
    """Answers as they came, by place, and a future that is never done by itself."""

    def __init__(self) -> None:
        self.items: dict[int, GradeRequest] = {}
        self.future: Future[list[ScorerGrade]] = Future()

    def add(self, place: int, item: GradeRequest) -> None:
        self.items[place] = item


class LateGrader:
    """Grades nothing until it is told what to give."""

    name = "judge"
    low, high = 1.0, 5.0
    needs_gpu = False

    def __init__(self) -> None:
        self.asked: list[tuple[GradeRequest, ...]] = []
        self.futures: list[Future[list[ScorerGrade]]] = []

    def grade_all(self, items: Sequence[GradeRequest]) -> Future[list[ScorerGrade]]:
        self.asked.append(tuple(items))
        self.futures.append(Future())
        return self.futures[-1]

    @contextmanager
    def unit(self) -> Iterator[LateUnit]:
        unit = LateUnit()
        yield unit
        self.asked.append(tuple(unit.items[place] for place in range(len(unit.items))))
        self.futures.append(unit.future)

    def give(self, call: int, *grades: float | None) -> None:
        turn = len(self.asked[call][0].earlier)
        given = [ScorerGrade("judge", grade, "because", turn=turn) for grade in grades]
        self.futures[call].set_result(given)


def suite_of(*tasks: Task, **settings: object) -> Suite:
    settings = {"rubric": {"prompt": "{{ answer }}", "low": 1, "high": 5}, **settings}
    return Suite(SuiteConfig.model_validate({"data": "tasks.jsonl", **settings}), tasks)


ONE = Task("one", "a b", "2", "all", "a b")
TWO = Task("two", "a b c", "3", "all", "a b c")


def test_several_scorers_are_scaled_by_their_ranges_and_weighed() -> None:
    judge = LateGrader()
    suite = suite_of(ONE, TWO, scorer={"judge": 3, "exact": 1})
    future = Evaluation(CountingEngine(), suite, {"judge": judge}).begin(["one", "two"])
    judge.give(0, 5.0, 2.0)
    results = future.result()
    # judge: (5 − 1)/4 and (2 − 1)/4; exact: 1 and 1.
    assert [result.grade for result in results] == [(3 * 1.0 + 1) / 4, (3 * 0.25 + 1) / 4]
    assert results[1].details == (
        ScorerGrade("exact", 1.0),
        ScorerGrade("judge", 2.0, "because"),
    )
    assert suite.scorer_name == "3 judge + 1 exact"


def test_one_scorer_alone_keeps_its_own_range() -> None:
    judge = LateGrader()
    future = Evaluation(CountingEngine(), suite_of(ONE, scorer="judge"), {"judge": judge}).begin(
        ["one"]
    )
    judge.give(0, 4.0)
    assert future.result()[0].grade == 4.0


def test_the_engine_rests_while_a_judge_has_its_gpu() -> None:
    events: list[str] = []

    class RestingEngine(CountingEngine):
        @contextmanager
        def resting(self) -> Iterator[None]:
            events.append("rests")
            yield
            events.append("is back")

    class GraderOnTheGpu(LateGrader):
        needs_gpu = True

        def grade_all(self, items: Sequence[GradeRequest]) -> Future[list[ScorerGrade]]:
            events.append("judge")
            future = super().grade_all(items)
            self.give(len(self.asked) - 1, 4.0)
            return future

    suite = suite_of(ONE, scorer="judge")
    for grader in (GraderOnTheGpu(), LateGrader()):
        Evaluation(RestingEngine(), suite, {"judge": grader}).begin(["one"])
    assert events == ["rests", "judge", "is back"]


def test_answers_are_all_there_before_a_judge_has_graded_them() -> None:
    judge = LateGrader()
    engine = CountingEngine()
    future = Evaluation(engine, suite_of(ONE, TWO, scorer="judge"), {"judge": judge}).begin(
        ["two", "one"], attempt=2
    )
    assert [request.task.id for request in judge.asked[0]] == ["two", "one"]
    assert [request.answer for request in judge.asked[0]] == ["3", "2"]
    assert {request.attempt for request in judge.asked[0]} == {2}
    assert not future.done()
    judge.give(0, 1.0, None)
    assert [result.grade for result in future.result()] == [1.0, None]


def test_without_a_grader_the_future_is_done_at_once() -> None:
    future = Evaluation(CountingEngine(), suite_of(ONE)).begin(["one"])
    assert future.done()
    assert future.result()[0].grade == 1.0


def test_a_judge_that_fails_the_candidate_fails_the_future() -> None:
    judge = LateGrader()
    future = Evaluation(CountingEngine(), suite_of(ONE, scorer="judge"), {"judge": judge}).begin(
        ["one"]
    )
    judge.futures[0].set_exception(CandidateError("3 of 100 answers could not be graded"))
    with pytest.raises(CandidateError, match="3 of 100"):
        future.result()


def test_a_suite_with_a_judge_needs_one() -> None:
    with pytest.raises(ConfigError, match="scorer judge: nobody is there"):
        Evaluation(CountingEngine(), suite_of(ONE, scorer="judge"))


TALK = replace(TWO, id="talk", turns=("and more",), turn_references=("7",))


def test_the_second_turn_is_asked_with_the_first_answer_in_the_same_call_for_all() -> None:
    engine = CountingEngine(chat=True)
    suite = suite_of(ONE, TALK, replace(TALK, id="talk 2"), system="Count.")
    results = Evaluation(engine, suite).begin(["one", "talk", "talk 2"]).result()
    assert [len(prompts) for prompts, _ in engine.calls] == [3, 2]
    second = "own\nsystem:Count.\nuser:a b c\nassistant:6\nuser:and more\nassistant:"
    assert engine.calls[1][0] == [second, second]
    assert results[1].prompt == second
    assert (results[1].earlier, results[1].answer) == (("6",), "9")
    assert results[0].earlier == ()


def test_without_a_chat_template_the_next_turn_begins_a_line() -> None:
    engine = CountingEngine()
    result = Evaluation(engine, suite_of(TALK)).begin(["talk"]).result()[0]
    assert result.prompt == "a b c3\nand more"


def test_each_turn_is_graded_against_its_own_reference_and_the_mean_counts() -> None:
    result = Evaluation(CountingEngine(), suite_of(TALK)).begin(["talk"]).result()[0]
    assert [(each.turn, each.grade) for each in result.details] == [(0, 1.0), (1, 0.0)]
    assert result.grade == 0.5


def test_a_judge_gets_the_first_turn_before_the_second_is_answered() -> None:
    judge = LateGrader()
    suite = suite_of(TALK, ONE, scorer="judge")
    future = Evaluation(CountingEngine(), suite, {"judge": judge}).begin(["talk", "one"])
    first, second = judge.asked
    assert [request.task.reference for request in (*first, *second)] == ["3", "2", "7"]
    assert second[0].earlier == ("3",)
    judge.give(1, 2.0)
    assert not future.done()
    judge.give(0, 4.0, 5.0)
    assert [result.grade for result in future.result()] == [3.0, 5.0]


def test_answers_without_grades_come_with_the_error_and_are_graded_without_the_engine() -> None:
    judge, engine = LateGrader(), CountingEngine()
    suite = suite_of(TALK, ONE, scorer={"judge": 3, "exact": 1}, gates={"empty": 0.0})
    evaluation = Evaluation(engine, suite, {"judge": judge})
    whole = evaluation.begin(["talk", "one"])
    judge.give(0, 4.0, 5.0)
    judge.give(1, 2.0)
    future = evaluation.begin(["talk", "one"])
    judge.give(2, 4.0, 5.0)
    judge.futures[3].set_exception(RunError("the judge is gone"))
    with pytest.raises(AnsweredRunError, match=r"^the judge is gone$") as caught:
        future.result()
    kept = caught.value.answers
    assert [answer.grade for answer in kept] == [None, None]
    assert [grade.grade for grade in kept[0].details if grade.scorer == "judge"] == [4.0, None]
    asked = len(engine.calls)
    future = evaluation.grade(kept)
    judge.give(4, 4.0, 5.0)
    judge.give(5, 2.0)
    seconds = [answer.seconds for answer in kept]
    expected = [replace(one, seconds=s) for one, s in zip(whole.result(), seconds, strict=True)]
    assert future.result() == expected
    assert judge.asked[4:] == judge.asked[:2]
    assert len(engine.calls) == asked


def test_a_scorer_that_stops_the_run_leaves_the_answers() -> None:
    def fails(task: Task, answer: str) -> float:
        raise RuntimeError("no licence")

    own = {"mine.py:fails": FunctionScorer("mine.py:fails", fails)}
    config = SuiteConfig.model_validate(
        {"scorer": "mine.py:fails", "data": "tasks.jsonl"}, context={"trust_code": True}
    )
    with pytest.raises(AnsweredRunError, match="no licence") as caught:
        Evaluation(CountingEngine(), Suite(config, (ONE,), own_scorers=own)).begin(["one"])
    assert [answer.answer for answer in caught.value.answers] == ["2"]
