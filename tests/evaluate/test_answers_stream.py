"""Answers go to the judge as they are finished: a scripted one over real HTTP, a slow engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.engine.base import Completion, Each, GenerationSettings
from evomerge.errors import CandidateError
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.rubric import Rubric
from evomerge.evaluate.suite import Suite
from evomerge.evaluate.task import Task
from tests.evaluate.judge_server import ScriptedJudge, scripted
from tests.evaluate.test_evaluation import CountingEngine, suite_of
from tests.evaluate.test_judge import kept, opening, requests

PATIENCE_SECONDS = 30.0
RUBRIC = Rubric("{{ input }}: {{ answer }}", 1, 5)


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with scripted(ScriptedJudge()) as judge:
        yield judge


class SlowEngine(CountingEngine):
    """Writes one answer after another, the last first; before its last it waits for a grading.

    `graded` is how many answers the judge had replied to by then. `breaks`: it fails there.
    """

    def __init__(self, server: ScriptedJudge, *, breaks: bool = False) -> None:
        super().__init__()
        self.graded = 0
        self._server = server
        self._breaks = breaks

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        assert each is not None
        written: dict[int, Completion] = {}
        for place in reversed(range(len(prompts))):
            if place == 0:
                self._wait_for_a_grading()
            text = f"deserves {1 + place % 5}"
            written[place] = Completion(text, (1,), "stop", 1, "v")
            each(place, written[place])
        return [written[place] for place in range(len(prompts))]

    def _wait_for_a_grading(self) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not self._server.prompts and time.monotonic() < until:
            time.sleep(0.01)
        self.graded = len(self._server.prompts)
        if self._breaks:
            raise CandidateError("its logits are NaN")


def judged(count: int) -> Suite:
    tasks = [Task(str(number), "q", "", "all", f"task {number}") for number in range(count)]
    return suite_of(*tasks, scorer="judge")


def test_the_first_answer_is_graded_before_the_units_last_is_written(
    server: ScriptedJudge, tmp_path: Path
) -> None:
    suite, engine = judged(7), SlowEngine(server)
    ids = [task.id for task in suite.tasks]
    with opening(server, tmp_path, RUBRIC) as judge:
        results = Evaluation(engine, suite, {"judge": judge}).begin(ids).result(60)
    assert engine.graded > 0
    assert [result.grade for result in results] == [1, 2, 3, 4, 5, 1, 2]
    # Tasks 5 and 6 are asked what 0 and 1 are, and answered alike: one call, for which the first
    # of both pays, although the other was finished before.
    assert len(server.prompts) == 5
    paid = [detail.usage is not None for result in results for detail in result.details]
    assert paid == [True, True, True, True, True, False, False]


def test_what_is_known_costs_nothing_when_it_streams(server: ScriptedJudge, tmp_path: Path) -> None:
    suite = judged(4)
    ids = [task.id for task in suite.tasks]
    for _ in range(2):
        with opening(server, tmp_path, RUBRIC) as judge:
            results = Evaluation(SlowEngine(server), suite, {"judge": judge}).begin(ids).result(60)
        assert [result.grade for result in results] == [1, 2, 3, 4]
        assert len(server.prompts) == 4
    assert {detail.usage for result in results for detail in result.details} == {None}


def test_too_many_answers_without_a_grade_fail_the_unit_and_not_single_answers(
    server: ScriptedJudge, tmp_path: Path
) -> None:
    server.reply = lambda prompt: "no idea" if "deserves 2" in prompt else '{"grade": 3}'
    with opening(server, tmp_path) as judge:
        items = requests(5)
        with judge.unit() as unit:
            for place, item in enumerate(items):
                unit.add(place, item)
        assert [one.grade for one in unit.future.result(60)] == [3, None, 3, 3, 3]
        with judge.unit() as unit:
            for place, item in enumerate([*items, replace(items[1], attempt=1)]):
                unit.add(place, item)
        with pytest.raises(CandidateError, match="2 of 6 answers could not be graded"):
            unit.future.result(60)


def test_a_candidate_that_fails_midway_loses_no_reply_that_was_paid(
    server: ScriptedJudge, tmp_path: Path
) -> None:
    suite = judged(4)
    ids = [task.id for task in suite.tasks]
    with opening(server, tmp_path, RUBRIC) as judge:
        with pytest.raises(CandidateError, match="NaN"):
            Evaluation(SlowEngine(server, breaks=True), suite, {"judge": judge}).begin(ids)
        # The judge is there for the next one.
        results = Evaluation(SlowEngine(server), suite, {"judge": judge}).begin(ids).result(60)
    assert [result.grade for result in results] == [1, 2, 3, 4]
    assert len(server.prompts) == len(kept(tmp_path)) == 4
