"""A candidate's way through the engine: its recipe loaded, its tasks answered and graded."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from evomerge.engine import open_engine
from evomerge.engine.base import Engine, EngineConfig
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.suite import Suite, TaskResult, check_prompt_lengths
from evomerge.evaluate.task import Grader
from evomerge.recipe import Recipe
from evomerge.search.resolve import ResolvedStudy, engine_name
from evomerge.search.storage import SCRATCH

NO_VLLM = "vLLM is not installed here: the transformers engine serves instead"


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

    `graders` are those of the suite's scorers that work elsewhere, by name. `say` is told once
    where a candidate cannot be loaded live; `by_disk_is_news` False: not even then, because it was
    asked for.
    """

    engine: Engine
    suite: Suite
    graders: Mapping[str, Grader] = field(default_factory=dict)
    split: TimeSplit = field(default_factory=TimeSplit)
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
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
        evaluation = Evaluation(self.engine, self.suite, self.graders)
        results = evaluation.begin(task_ids, attempt)
        end = time.perf_counter()
        self.split.switching += loaded - start
        self.split.generation += evaluation.generation_seconds
        self.split.scoring += end - loaded - evaluation.generation_seconds
        return results


@contextmanager
def open_evaluator(study: ResolvedStudy, split: TimeSplit) -> Iterator[EngineEvaluator]:
    """The engine that a study asks for, started, with all its tasks found to fit its context."""
    start = time.perf_counter()
    asked = study.config.engine.name
    name = engine_name(asked)
    if name != asked and name == "transformers":
        print(NO_VLLM, file=sys.stderr, flush=True)
    with open_engine(name, engine_config(study)) as engine:
        check_prompt_lengths(engine, study.suite, study.suite.tasks)
        split.engine_start += time.perf_counter() - start
        by_disk_is_news = study.config.engine.load == "live"
        yield EngineEvaluator(engine, study.suite, split=split, by_disk_is_news=by_disk_is_news)


def engine_config(study: ResolvedStudy) -> EngineConfig:
    """What the engine of a study is started with."""
    settings = study.config.engine
    return EngineConfig(
        model=str(study.base),
        sources=tuple(dict.fromkeys(str(folder) for folder in (study.base, *study.models))),
        dtype=settings.dtype,
        repeatable=settings.repeatable,
        load=settings.load,
        threads=settings.threads,
        url=settings.url,
        scratch=str(study.directory / SCRATCH),
        options=settings.options,
    )
