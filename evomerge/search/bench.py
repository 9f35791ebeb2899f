"""Who measures candidates: an evaluator, opened again where its engine dies."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol, Self, TypeAlias

from evomerge.errors import CandidateError, EngineDiedError, EvomergeError, RunError
from evomerge.evaluate.task import TaskResult
from evomerge.recipe import Recipe
from evomerge.search.evaluator import TimeSplit
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.story import Report, Said
from evomerge.search.timing import Stopwatch


class EngineKilledError(CandidateError):
    """The engine died of a candidate, and the next engine did, too."""


class Evaluator(Protocol):
    """Who measures candidates."""

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        """What the model of `recipe` makes of the tasks, in their order, in one unit.

        On return all answers are written and the engine is free; the future holds the results once
        they are graded. `attempt` counts from 0; wanted repetitions (1, 2, …) are sampled.
        Raises CandidateError for a failure of the candidate's own (or the future does),
        EngineDiedError where the engine must be opened again, RunError where the run must stop (or
        the future does: a judge that cannot be reached).
        """

    def grade(self, answers: Sequence[TaskResult], attempt: int) -> Future[list[TaskResult]]:
        """As `begin`, of a unit that is answered already and has no grades."""

    @property
    def stop_grading(self) -> Callable[[], None]:
        """Has no answer graded from here on: units on their way end soon, with their answers.

        It does not hold the engine, and works when that is closed, too.
        """


# Opens the engine of a study; the evaluator adds what it spends to the TimeSplit.
OpenEvaluator: TypeAlias = Callable[[ResolvedStudy, TimeSplit], AbstractContextManager[Evaluator]]


class Bench:
    """The evaluator, opened, and opened again once where it dies under a candidate."""

    def __init__(self, open_evaluator: OpenEvaluator, study: ResolvedStudy, report: Report) -> None:
        self._open_evaluator = open_evaluator
        self._study = study
        self._report = report
        self._split = TimeSplit()
        self._watch = Stopwatch()
        self._open: ExitStack | None = None
        self._evaluator: Evaluator | None = None
        self._stop_grading: Callable[[], None] = lambda: None

    @classmethod
    @contextmanager
    def opened(
        cls, open_evaluator: OpenEvaluator, study: ResolvedStudy, report: Report
    ) -> Iterator[Self]:
        """The bench with its evaluator open; closed at the end, whatever happens."""
        bench = cls(open_evaluator, study, report)
        bench._start()
        try:
            yield bench
        finally:
            bench._stop()

    @property
    def engine_start(self) -> float:
        """Seconds that starting the engine took, all starts together."""
        return self._split.engine_start

    def watched_by(self, watch: Stopwatch) -> None:
        """From here on `watch` is told where the time of evaluations goes."""
        self._watch = watch

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        """`Evaluator.begin`, once more on a new engine where the first one dies.

        Raises RunError where the engine cannot be opened again.
        """
        before = replace(self._split)
        try:
            return self._attempt(recipe, task_ids, attempt)
        finally:
            self._watch.add("engine", self._split.engine_start - before.engine_start)
            self._watch.add("switch", self._split.switching - before.switching)
            self._watch.add("generate", self._split.generation - before.generation)
            self._watch.add("score", self._split.scoring - before.scoring)

    def grade(self, answers: Sequence[TaskResult], attempt: int) -> Future[list[TaskResult]]:
        """`Evaluator.grade`."""
        assert self._evaluator is not None
        before = self._split.scoring
        results = self._evaluator.grade(answers, attempt)
        self._watch.add("score", self._split.scoring - before)
        return results

    def stop_grading(self) -> None:
        """`Evaluator.stop_grading`."""
        if self._evaluator is not None:
            self._stop_grading = self._evaluator.stop_grading
        self._stop_grading()

    def _attempt(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        # Only the words of an engine's death outlive their handler: its traceback holds the dead
        # engine, and with it memory of a GPU that the next engine needs.
        try:
            return self._begin(recipe, task_ids, attempt)
        except EngineDiedError as error:
            died_of = str(error)
        self._restart(died_of)
        try:
            return self._begin(recipe, task_ids, attempt)
        except EngineDiedError as error:
            died_of = str(error)
        self._restart(died_of)
        raise EngineKilledError(f"the engine died twice of it: {died_of}")

    def _begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        assert self._evaluator is not None
        return self._evaluator.begin(recipe, task_ids, attempt)

    def _restart(self, died_of: str) -> None:
        assert self._evaluator is not None
        self._report(Said(f"the engine died ({died_of}); starting it again"))
        self._stop_grading = self._evaluator.stop_grading  # grades may be on their way meanwhile
        self._stop()
        gc.collect()  # what is left of the dead engine in cycles
        try:
            self._start()
        except EvomergeError as error:
            raise RunError(
                f"the engine died ({died_of}) and did not start again: {error}"
            ) from None

    def _start(self) -> None:
        stack = ExitStack()
        self._evaluator = stack.enter_context(self._open_evaluator(self._study, self._split))
        self._open = stack

    def _stop(self) -> None:
        stack, self._open, self._evaluator = self._open, None, None
        if stack is not None:
            stack.close()
