"""A candidate's way through the engine: its recipe loaded, its tasks answered and graded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

from evomerge.database import open_database
from evomerge.engine import open_engine
from evomerge.engine.base import Engine, EngineConfig
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import Grading, evaluation_of
from evomerge.evaluate.graders import open_graders, shares_gpu
from evomerge.evaluate.self_test import self_test, shown_prompt
from evomerge.evaluate.suite import Suite, TaskResult, check_prompt_lengths
from evomerge.evaluate.task import Grader
from evomerge.recipe import Recipe
from evomerge.search.held_out import HeldOutSuite, under_names
from evomerge.search.resolve import ResolvedStudy, engine_name
from evomerge.search.storage import SCRATCH, database_url

NO_VLLM = "vLLM is not installed here: the transformers engine serves instead"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class TimeSplit:
    """Seconds that an evaluator has spent, by what they went to."""

    engine_start: float = 0.0
    switching: float = 0.0
    generation: float = 0.0
    scoring: float = 0.0


@dataclass
class EngineEvaluator:
    """Evaluates recipes on the tasks of a suite, one candidate at a time, in one engine.

    `graders` are those of the suite's scorers that work elsewhere, by name; tasks may be those of a
    second suite, `held_out`, too, but not of both at once. `say` is told once
    where a candidate cannot be loaded live; `by_disk_is_news` False: not even then, because it was
    asked for.
    """

    engine: Engine
    suite: Suite
    graders: Mapping[str, Grader] = field(default_factory=dict)
    held_out: HeldOutSuite | None = None
    held_out_graders: Mapping[str, Grader] = field(default_factory=dict)
    split: TimeSplit = field(default_factory=TimeSplit)
    say: Callable[[str], None] = _to_stderr
    by_disk_is_news: bool = True

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        """What the model of `recipe` makes of the tasks, in their order (`Evaluator.begin`).

        Raises CandidateError where the recipe has no model, EngineDiedError where the engine is
        gone.
        """
        start = time.perf_counter()
        candidate = self.engine.load(recipe)
        loaded = time.perf_counter()
        if candidate.how == "disk" and self.by_disk_is_news:
            self.by_disk_is_news = False
            why = self.engine.supports(recipe) or "the engine does not say why"
            self.say(f"candidates go by disk, which takes longer than a live switch: {why}")
        suite, graders, own_ids = self._asked(task_ids)
        evaluation = evaluation_of(self.engine, suite, graders)
        results = under_names(task_ids, lambda: evaluation.begin(own_ids, attempt))
        end = time.perf_counter()
        self.split.switching += loaded - start
        self.split.generation += evaluation.generation_seconds
        self.split.scoring += end - loaded - evaluation.generation_seconds
        return results

    def grade(self, answers: Sequence[TaskResult], attempt: int) -> Future[list[TaskResult]]:
        """The grades of tasks that are answered (`Evaluator.grade`); the engine rests or waits."""
        start = time.perf_counter()
        task_ids = [answer.task_id for answer in answers]
        suite, graders, own_ids = self._asked(task_ids)
        own = [replace(one, task_id=name) for one, name in zip(answers, own_ids, strict=True)]
        grading = Grading(suite, graders, self.engine.resting)
        results = under_names(task_ids, lambda: grading.grade(own, attempt))
        self.split.scoring += time.perf_counter() - start
        return results

    @property
    def stop_grading(self) -> Callable[[], None]:
        """See `Evaluator.stop_grading`."""
        graders = (*self.graders.values(), *self.held_out_graders.values())

        def stop() -> None:
            for grader in graders:
                grader.stop()

        return stop

    def _asked(self, task_ids: Sequence[str]) -> tuple[Suite, Mapping[str, Grader], Sequence[str]]:
        """The suite that has the tasks of these names, its graders, and what it calls the tasks."""
        second = self.held_out
        if second is not None and second.has(task_ids):
            return second.suite, self.held_out_graders, second.own_ids(task_ids)
        return self.suite, self.graders, task_ids


class Evaluators:
    """Opens the engine of a study as often as it is needed, and before the first one its judge.

    The judge stays until the end of the block: engines that die take no grade with them.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._graders: Sequence[Mapping[str, Grader]] | None = None
        self._has_shown_a_prompt = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def open(self, study: ResolvedStudy, split: TimeSplit) -> Iterator[EngineEvaluator]:
        """The engine that the study asks for, started; its tasks are found to fit its context."""
        if self._graders is None:
            try:
                self._graders = self._stack.enter_context(study_graders(study))
            except ConfigError as error:
                raise ConfigError(f"{study.config.where}: {error}") from error
        with _open_engine(study, split) as engine:
            prompts = [self_test(engine, suite) for suite in study.suites]
            if not self._has_shown_a_prompt:
                _to_stderr(f"the model reads the first task as\n{shown_prompt(prompts[0])}")
                self._has_shown_a_prompt = True
            for suite in study.suites:
                check_prompt_lengths(engine, suite, suite.tasks)
            yield EngineEvaluator(
                engine,
                study.suite,
                self._graders[0],
                study.held_out,
                self._graders[-1],
                split=split,
                by_disk_is_news=study.config.engine.load == "live",
            )


@contextmanager
def open_evaluator(study: ResolvedStudy, split: TimeSplit) -> Iterator[EngineEvaluator]:
    """The engine that a study asks for and its judge, for the block; see `Evaluators`."""
    with Evaluators() as evaluators, evaluators.open(study, split) as evaluator:
        yield evaluator


def study_graders(
    study: ResolvedStudy, say: Callable[[str], None] = _to_stderr
) -> AbstractContextManager[Sequence[Mapping[str, Grader]]]:
    """Who grades the answers of each of the study's suites elsewhere, by scorer; it pays for it."""
    config = study.config
    return open_graders(
        study.suites,
        config.judge,
        open_database=lambda: open_database(
            study.storage, database_url(config.storage.database_env, os.environ)
        ),
        payer=study.name,
        folder=config.folder,
        environment=os.environ,
        say=say,
        trust_code=config.trust_code,
    )


@contextmanager
def _open_engine(study: ResolvedStudy, split: TimeSplit) -> Iterator[Engine]:
    start = time.perf_counter()
    asked = study.config.engine.name
    name = engine_name(asked)
    if name != asked and name == "transformers":
        _to_stderr(NO_VLLM)
    with open_engine(name, engine_config(study)) as engine:
        split.engine_start += time.perf_counter() - start
        yield engine


def engine_config(study: ResolvedStudy) -> EngineConfig:
    """What the engine of a study is started with."""
    settings = study.config.engine
    turns = any(shares_gpu(suite, study.config.judge) for suite in study.suites)
    return EngineConfig(
        model=str(study.base),
        sources=tuple(dict.fromkeys(str(folder) for folder in (study.base, *study.models))),
        dtype=settings.dtype,
        repeatable=settings.repeatable,
        load=settings.load,
        threads=settings.threads,
        url=settings.url,
        scratch=str(study.directory / SCRATCH),
        options=settings.options | ({"enable_sleep_mode": True} if turns else {}),
    )
