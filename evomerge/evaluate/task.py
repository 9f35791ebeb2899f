"""What is asked, what was answered, and how it was graded: the words of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from evomerge.errors import CandidateError, EvomergeError, RunError


@dataclass(frozen=True)
class Task:
    """One prompt and its right answer; `user` is the suite's template filled with the input.

    `fields` are the further columns that the suite maps (`eval_aspect`), by the suite's names.
    `turns` are further user turns, each asked after the answer to the one before, and
    `turn_references` their right answers ("" where there is none), one each. `choices` are the
    answers to choose from, where the suite has such. `system` and `settings` are what a router
    puts in place of the suite's system message and settings of generation.
    """

    id: str
    input: str
    reference: str
    category: str
    user: str
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    turns: tuple[str, ...] = ()
    turn_references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    system: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)

    def at_turn(self, turn: int) -> Task:
        """The task as a scorer of the answer to `turn` (from 0) sees it: with its reference."""
        if turn == 0 or not self.turn_references:
            return self
        return replace(self, reference=self.turn_references[turn - 1])


@dataclass(frozen=True)
class Usage:
    """What one grade cost a judge, in tokens; `cost` in the currency of its prices, if known."""

    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None


@dataclass(frozen=True)
class ScorerGrade:
    """What one scorer gave one answer, in its own range; None where it could not grade it.

    `reply` is a judge's raw text, in brackets why there is none; `turn` the turn of the
    conversation that was graded, from 0.
    """

    scorer: str
    grade: float | None
    reply: str | None = None
    usage: Usage | None = None
    turn: int = 0


@dataclass(frozen=True)
class TaskResult:
    """What one candidate made of one task.

    `prompt` is the text that the model read, chat template included; `finish_reason` "stop",
    "length", or "none" where nothing was to be written; `grade` None where the answer could not be
    scored; `seconds` this task's share of the call that generated its unit; `version` the candidate
    that wrote the answer. In a conversation prompt and answer are those of its last turn, and
    `earlier` the answers before. `attempt` counts wanted repetitions from 0; `details` has a grade
    per scorer and turn; `gates` names what is wrong with the answer on its face ("language",
    "repetition", "length", "empty"). `settings` are those that it was generated with.
    """

    task_id: str
    prompt: str
    answer: str
    finish_reason: str
    grade: float | None
    seconds: float
    version: str
    attempt: int = 0
    details: tuple[ScorerGrade, ...] = ()
    gates: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class GradeRequest:
    """One answer to be graded: the one to turn `len(earlier)` of `task`, after `earlier` ones."""

    task: Task
    answer: str
    attempt: int
    earlier: tuple[str, ...] = ()


class UngradedError(CandidateError):
    """Too many answers of a unit have no grade; `grades` are those of all, in their order."""

    def __init__(self, words: str, grades: Sequence[ScorerGrade]) -> None:
        super().__init__(words)
        self.grades = tuple(grades)


class AnsweredError(EvomergeError):
    """A unit has no score; its `answers` are there all the same, in the order of its tasks."""

    def __init__(self, words: str, answers: Sequence[TaskResult]) -> None:
        super().__init__(words)
        self.answers = tuple(answers)


class AnsweredCandidateError(AnsweredError, CandidateError):
    """It is the candidate's own fault."""


class AnsweredRunError(AnsweredError, RunError):
    """The run must stop; when it goes on the answers need grades alone."""


class GradingUnit(Protocol):
    """Answers that are graded as they come; `future` is as that of `Grader.grade_all`."""

    future: Future[list[ScorerGrade]]

    def add(self, place: int, item: GradeRequest) -> None:
        """Begins to grade the answer whose grade is to be at `place`; it returns at once."""


class Grader(Protocol):
    """Grades answers elsewhere, while the engine goes on: a judge behind a network.

    Grades lie in [low, high]; higher is better. `needs_gpu`: it works on the engine's own GPU, for
    as long as `grade_all` takes: then the engine rests, and the future is done at once.
    """

    name: str
    needs_gpu: bool
    low: float
    high: float

    def grade_all(self, items: Sequence[GradeRequest]) -> Future[list[ScorerGrade]]:
        """A grade per item, in their order: at once a future, later its result.

        What cannot be graded has the grade None. The future raises UngradedError where too much
        of a candidate cannot, RunError where the run must stop.
        """

    def unit(self) -> AbstractContextManager[GradingUnit]:
        """A unit that takes answers for the block, from graders that do not need the GPU.

        At the block's end it has all; where the block raises it is given up, and what was begun is
        kept for whoever asks next.
        """

    def stop(self) -> None:
        """Nothing is graded from here on: futures that are not done raise RunError soon."""
