"""A suite asked of the model that an engine now is: its tasks answered, then graded."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from evomerge.engine.base import Completion, Engine, GenerationSettings
from evomerge.errors import CandidateError, ConfigError, RunError
from evomerge.evaluate.gates import GATES, Gate, gates_of
from evomerge.evaluate.likelihood import LikelihoodScorer, likelihoods
from evomerge.evaluate.prompts import ask, uses_chat
from evomerge.evaluate.scorers import Scorer
from evomerge.evaluate.suite import Suite, continuations_of
from evomerge.evaluate.task import (
    AnsweredCandidateError,
    AnsweredError,
    AnsweredRunError,
    Grader,
    GradeRequest,
    GradingUnit,
    ScorerGrade,
    Task,
    TaskResult,
    UngradedError,
)

Result = TypeVar("Result")


@dataclass
class _Conversation:
    """A task with what was asked and answered so far, turn by turn; `gates` where known before."""

    task: Task
    prompts: list[str] = field(default_factory=list)
    answers: list[Completion] = field(default_factory=list)
    seconds: float = 0.0
    details: list[ScorerGrade] = field(default_factory=list)
    gates: tuple[Gate, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(answer.text for answer in self.answers)


@dataclass(frozen=True)
class _Waiting:
    """The last answers of some conversations, on their way to a grader's grades."""

    grader: str
    asked: Sequence[_Conversation]
    turn: int
    grades: Future[list[ScorerGrade]]


class Grading:
    """Answers to the tasks of `suite`, graded by its scorers and by `graders`.

    `graders` are those of the suite's scorers that work elsewhere (a judge), by the name that the
    suite gives them; those that need the engine's GPU work in a `resting` block. Raises ConfigError
    where a grader is missing.
    """

    def __init__(
        self,
        suite: Suite,
        graders: Mapping[str, Grader] | None = None,
        resting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._suite = suite
        self._resting = resting
        self._graders = {
            name: _grader(name, graders or {})
            for name in suite.weights
            if name not in suite.scorers and name not in suite.likelihood_scorers
        }

    def grade(self, answers: Sequence[TaskResult], attempt: int = 0) -> Future[list[TaskResult]]:
        """As `Evaluation.begin`, of tasks that are answered already (`AnsweredError`)."""
        tasks = self._suite.select([one.task_id for one in answers])
        asked = [
            _Conversation(
                task,
                seconds=one.seconds,
                details=[
                    each for each in one.details if each.scorer in self._suite.likelihood_scorers
                ],
                gates=tuple(gate for gate in GATES if gate in one.gates),
            )
            for task, one in zip(tasks, answers, strict=True)
        ]
        waiting: list[_Waiting] = []
        for turn in range(_turns(asked)):
            now = []
            for one, known in zip(asked, answers, strict=True):
                if turn > len(one.task.turns):
                    continue
                text = (*known.earlier, known.answer)[turn]
                one.prompts.append(known.prompt)
                one.answers.append(Completion(text, (), known.finish_reason, 0, known.version))
                now.append(one)
            self._score(now)
            waiting += [self._grade_now(name, now, turn, attempt) for name in self._graders]
        pending = [one.grades for one in waiting]
        return when_all_done(pending, lambda: self._results(asked, waiting, attempt))

    def _grade_now(
        self, name: str, asked: Sequence[_Conversation], turn: int, attempt: int
    ) -> _Waiting:
        """The last answers of all, handed to a grader at once."""
        grader = self._graders[name]
        requests = [_request(one, attempt) for one in asked]
        with self._resting() if grader.needs_gpu else nullcontext():
            return _Waiting(name, asked, turn, grader.grade_all(requests))

    def _score(self, asked: Sequence[_Conversation]) -> None:
        for one in asked:
            turn = len(one.answers) - 1
            task = one.task.at_turn(turn)
            for name, scorer in self._suite.scorers.items():
                grade = scorer.grade(task, one.answers[-1].text)
                one.details.append(ScorerGrade(name, grade, turn=turn))

    def _results(
        self, asked: Sequence[_Conversation], waiting: Sequence[_Waiting], attempt: int
    ) -> list[TaskResult]:
        """The results, once all graders are done. Raises what `Evaluation.begin` says."""
        errors: list[CandidateError | RunError] = []
        for some in waiting:
            none = ScorerGrade(some.grader, None, turn=some.turn)
            grades: Sequence[ScorerGrade] = [none] * len(some.asked)
            try:
                grades = some.grades.result()
            except UngradedError as error:
                grades = error.grades
                errors.append(error)
            except (CandidateError, RunError) as error:
                errors.append(error)
            for one, grade in zip(some.asked, grades, strict=True):
                one.details.append(grade)
        if errors:
            raise self._answered(errors, asked, attempt)
        return [self._result(one, attempt) for one in asked]

    def _answered(
        self,
        errors: Sequence[CandidateError | RunError],
        asked: Sequence[_Conversation],
        attempt: int,
    ) -> AnsweredError:
        """What to raise of several errors: what stops the run goes first."""
        answers = self._ungraded(asked, attempt)
        for error in errors:
            if isinstance(error, RunError):
                return AnsweredRunError(str(error), answers)
        return AnsweredCandidateError(str(errors[0]), answers)

    def _ungraded(self, asked: Sequence[_Conversation], attempt: int) -> list[TaskResult]:
        return [self._result(one, attempt, graded=False) for one in asked]

    def _result(self, one: _Conversation, attempt: int, *, graded: bool = True) -> TaskResult:
        last = one.answers[-1]
        gates = self._gates(one) if one.gates is None else one.gates
        return TaskResult(
            task_id=one.task.id,
            prompt=one.prompts[-1],
            answer=last.text,
            finish_reason=last.finish_reason,
            grade=self._gated(self._grade(one.details), gates) if graded else None,
            seconds=one.seconds,
            version=last.version,
            attempt=attempt,
            details=tuple(one.details),
            gates=gates,
            earlier=one.texts[:-1],
            settings=self._settings(one.task, attempt),
        )

    def _settings(self, task: Task, attempt: int) -> dict[str, object]:
        suite = self._suite
        return asdict(suite.generation(task, attempt)) if suite.generates else {}

    def _gates(self, one: _Conversation) -> tuple[Gate, ...]:
        """The gates that close for any of the answers that were written."""
        closed = {
            gate
            for answer in one.answers
            if answer.finish_reason != "none"
            for gate in gates_of(one.task, answer.text, cut=answer.finish_reason == "length")
        }
        return tuple(gate for gate in GATES if gate in closed)

    def _gated(self, grade: float | None, gates: Sequence[Gate]) -> float | None:
        """The grade, or what the suite leaves of it where gates close."""
        highest = self._suite.config.gates
        caps = [highest[gate] for gate in gates if gate in highest]
        return grade if grade is None else min([grade, *caps])

    def _grade(self, details: Sequence[ScorerGrade]) -> float | None:
        """The mean over the turns of the weighted mean of the scorers; None where one is missing.

        One scorer alone keeps its own range; several are scaled to [0, 1] by theirs.
        """
        weights = self._suite.weights
        grades = [(detail.scorer, detail.grade) for detail in details]
        if any(grade is None for _, grade in grades):
            return None
        if len(weights) == 1:
            return _mean([grade for _, grade in grades if grade is not None])
        turns = len(grades) // len(weights)
        parts = [
            weights[name] * self._scaled(name, grade) for name, grade in grades if grade is not None
        ]
        return math.fsum(parts) / (turns * math.fsum(weights.values()))

    def _scaled(self, name: str, grade: float) -> float:
        suite = self._suite
        known: Mapping[str, Scorer | LikelihoodScorer | Grader] = {
            **suite.scorers,
            **suite.likelihood_scorers,
            **self._graders,
        }
        scorer = known[name]
        return (grade - scorer.low) / (scorer.high - scorer.low)


class Evaluation(Grading):
    """The tasks of `suite`, asked in `engine`, and graded.

    `generation_seconds` counts what the engine took for all answers so far.
    """

    def __init__(
        self, engine: Engine, suite: Suite, graders: Mapping[str, Grader] | None = None
    ) -> None:
        super().__init__(suite, graders, engine.resting)
        self._engine = engine
        self.generation_seconds = 0.0

    def begin(self, task_ids: Sequence[str], attempt: int = 0) -> Future[list[TaskResult]]:
        """The results of these tasks, in their order; on return all answers are generated.

        So the engine is free for the next candidate, while graders still work: the future is done
        when they are. `attempt` 0 is answered as the suite says, each one above is another sample
        (`Suite.generation`). Raises CandidateError where the model writes nothing that can be
        read, EngineDiedError where the engine is gone. Where graders (in the future) or scorers
        do not give what they should, AnsweredCandidateError or AnsweredRunError.
        """
        asked = [_Conversation(task) for task in self._suite.select(task_ids)]
        waiting: list[_Waiting] = []
        if self._suite.likelihood_scorers:
            self._weigh(asked)
        if not self._suite.generates:
            return when_all_done([], lambda: self._results(asked, waiting, attempt))
        for turn in range(_turns(asked)):
            now = [one for one in asked if turn <= len(one.task.turns)]
            try:
                # At once: the first turn is graded while the second is generated.
                waiting += self._answer_and_grade(now, turn, attempt)
            except RunError as error:
                if any(len(one.answers) <= len(one.task.turns) for one in asked):
                    raise
                raise AnsweredRunError(str(error), self._ungraded(asked, attempt)) from error
        pending = [one.grades for one in waiting]
        return when_all_done(pending, lambda: self._results(asked, waiting, attempt))

    def _weigh(self, asked: Sequence[_Conversation]) -> None:
        """The grades of scorers that need no answer: one call for the likelihoods of all texts."""
        suite, engine = self._suite, self._engine
        prompts = [ask(engine, suite.chat, one.task) for one in asked]
        texts = [continuations_of(suite, one.task) for one in asked]
        started = time.perf_counter()
        found = likelihoods(
            engine,
            prompts,
            texts,
            delimiter=suite.config.delimiter,
            add_special_tokens=not uses_chat(engine, suite.chat),
        )
        taken = time.perf_counter() - started
        self.generation_seconds += taken
        for one, prompt, some in zip(asked, prompts, found, strict=True):
            by_text = {each.text: each for each in some}
            one.seconds += taken / len(asked)
            for name, scorer in suite.likelihood_scorers.items():
                wanted = [by_text[text] for text in scorer.continuations(one.task)]
                grade, answer = scorer.judge(one.task, wanted)
                one.details.append(ScorerGrade(name, grade))
            if not suite.generates:
                one.prompts.append(prompt)
                one.answers.append(Completion(answer, (), "none", 0, engine.version))

    def _answer_and_grade(
        self, asked: Sequence[_Conversation], turn: int, attempt: int
    ) -> list[_Waiting]:
        """The next turn of each, and what each grader will make of it.

        Graders get every answer as it is finished; those on the engine's GPU all of them after.
        """
        with ExitStack() as open_units:
            units = {
                name: open_units.enter_context(grader.unit())
                for name, grader in self._graders.items()
                if not grader.needs_gpu
            }
            self._answer(asked, attempt, list(units.values()))
            self._score(asked)
        return [
            _Waiting(name, asked, turn, units[name].future)
            if name in units
            else self._grade_now(name, asked, turn, attempt)
            for name in self._graders
        ]

    def _answer(
        self, asked: Sequence[_Conversation], attempt: int, units: Sequence[GradingUnit]
    ) -> None:
        """One generate call for the next turn of each; `units` get the answers as they come."""
        suite, engine = self._suite, self._engine
        prompts = [ask(engine, suite.chat, one.task, one.texts) for one in asked]
        settings = [suite.generation(one.task, attempt) for one in asked]

        def hand_on(place: int, completion: Completion) -> None:
            request = _request(asked[place], attempt, completion.text)
            for unit in units:
                unit.add(place, request)

        started = time.perf_counter()
        completions = engine.generate(
            prompts,
            _one_if_alike(settings),
            add_special_tokens=not uses_chat(engine, suite.chat),
            each=hand_on if units else None,
        )
        taken = time.perf_counter() - started
        self.generation_seconds += taken
        for one, prompt, completion in zip(asked, prompts, completions, strict=True):
            one.prompts.append(prompt)
            one.answers.append(completion)
            one.seconds += taken / len(asked)


class CanBegin(Protocol):
    """What answers and grades the tasks of a suite: `Evaluation`, or its like for the harness."""

    generation_seconds: float

    def begin(self, task_ids: Sequence[str], attempt: int = 0) -> Future[list[TaskResult]]:
        """See `Evaluation.begin`."""


def evaluation_of(
    engine: Engine, suite: Suite, graders: Mapping[str, Grader] | None = None
) -> CanBegin:
    """`suite` asked in `engine`, whatever kind of suite it is."""
    if suite.harness is None:
        return Evaluation(engine, suite, graders)
    from evomerge.evaluate.harness import HarnessEvaluation, Sampling

    def sampling(attempt: int) -> Sampling:
        settings = suite.generation(suite.tasks[0], attempt)
        return Sampling(settings.temperature, settings.seed)

    return HarnessEvaluation(engine, suite.harness, suite.config.system, sampling)


def when_all_done(pending: Sequence[Future[Any]], outcome: Callable[[], Result]) -> Future[Result]:
    """A future of what `outcome` returns (or raises), called once when all `pending` are done."""
    joined: Future[Result] = Future()
    joined.set_running_or_notify_cancel()
    left = len(pending)
    lock = threading.Lock()

    def settle() -> None:
        try:
            result = outcome()
        except BaseException as error:  # whatever it is belongs to who waits for the future
            joined.set_exception(error)
        else:
            joined.set_result(result)

    def one_done(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            settle()

    for future in pending:
        future.add_done_callback(one_done)
    if not pending:
        settle()
    return joined


def _turns(asked: Sequence[_Conversation]) -> int:
    return 1 + max((len(one.task.turns) for one in asked), default=0)


def _grader(name: str, graders: Mapping[str, Grader]) -> Grader:
    if name not in graders:
        raise ConfigError(
            f"suite: scorer {name}: nobody is there to grade; say who is with "
            f"`{name}: {{model: …, base_url: …}}` in the study"
        )
    return graders[name]


def _request(one: _Conversation, attempt: int, answer: str | None = None) -> GradeRequest:
    """The request to grade the last answer, or `answer`, which is the next one."""
    texts = one.texts if answer is None else (*one.texts, answer)
    earlier = texts[:-1]
    return GradeRequest(one.task.at_turn(len(earlier)), texts[-1], attempt, earlier)


def _one_if_alike(
    settings: Sequence[GenerationSettings],
) -> GenerationSettings | list[GenerationSettings]:
    return settings[0] if len(set(settings)) == 1 else list(settings)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
