"""A search whose engine is a formula: real studies, real files, no model that answers."""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import CandidateError, EngineDiedError, EvomergeError
from evomerge.evaluate.evaluation import when_all_done
from evomerge.evaluate.suite import TaskResult
from evomerge.recipe import Recipe
from evomerge.search.evaluator import TimeSplit
from evomerge.search.loop import OpenEvaluator, run_search
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.story import Started, Story
from evomerge.search.study import read_study


def weights_of(recipe: Recipe) -> list[float]:
    """The merge weights of a recipe in its order; a plain model counts as all 0."""
    weights: list[float] = []
    for part in recipe.slices or ():
        for source in part.sources:
            setting = source.parameters.get("weight")
            if isinstance(setting, float):
                weights.append(setting)
    return weights or [0.0]


def formula_grade(recipe: Recipe, task_id: str) -> float:
    """A smooth grade whose best weights differ from task to task and lie near 0.9."""
    target = 0.9 + 0.05 * (int(task_id) % 5 - 2)
    weights = weights_of(recipe)
    return math.exp(-math.fsum((weight - target) ** 2 for weight in weights) / len(weights))


@dataclass
class FormulaEvaluator:
    """Grades recipes by `grade(recipe, task)`, after `seconds` for each task.

    `fails(recipe)` says why a candidate fails; None if it does not.
    """

    seconds: float = 0.0
    split: TimeSplit | None = None
    grade: Callable[[Recipe, str], float | None] = formula_grade
    fails: Callable[[Recipe], Exception | None] = lambda recipe: None

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        error = self.fails(recipe)
        if error is not None:
            raise error
        started = time.perf_counter()
        results = []
        for task_id in task_ids:
            time.sleep(self.seconds)
            results.append(
                TaskResult(
                    task_id=task_id,
                    prompt=f"task {task_id}",
                    answer="a \0 and half a surrogate \ud800",
                    finish_reason="length" if task_id == "3" else "stop",
                    grade=self.grade(recipe, task_id),
                    seconds=self.seconds,
                    version="formula",
                )
            )
        if self.split is not None:
            self.split.generation += time.perf_counter() - started
        return when_all_done([], lambda: results)

    @property
    def stop_grading(self) -> Callable[[], None]:
        """All is graded as soon as it is answered."""
        return lambda: None


def opener(
    seconds: float = 0.0,
    grade: Callable[[Recipe, str], float | None] = formula_grade,
    fails: Callable[[Recipe], Exception | None] = lambda recipe: None,
) -> OpenEvaluator:
    """An `open_evaluator` of FormulaEvaluators."""

    @contextmanager
    def open_evaluator(study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
        yield FormulaEvaluator(seconds, split, grade, fails)

    return open_evaluator


def broken_above(limit: float) -> Callable[[Recipe], Exception | None]:
    """Candidates whose first weight is above `limit` fail, each for a reason of its own words."""

    def fails(recipe: Recipe) -> Exception | None:
        first = weights_of(recipe)[0]
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
        reason = f"{words[int(first * 1e6) % len(words)]} overflows"
        return CandidateError(reason) if first > limit else None

    return fails


class DiesAt:
    """An engine that dies when it is asked for the n-th time (from 1), for each n given."""

    def __init__(self, *calls: int) -> None:
        self.calls = calls
        self.asked = 0

    def __call__(self, recipe: Recipe) -> Exception | None:
        del recipe
        self.asked += 1
        return EngineDiedError("no heartbeat") if self.asked in self.calls else None


def sleeping_child() -> int:
    """A child that inherits all this process has open, as an engine's workers may; its number."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    return child


def run(
    study: Path,
    storage: Path,
    story: Path,
    *,
    seconds: float,
    limit: float = math.inf,
    child: Path | None = None,
    largest_file: int | None = None,
) -> None:
    """Runs a study as the command line would, in a process to be killed; its lines go to `story`.

    Candidates whose first weight is above `limit` fail. `child`: a forked child's number is
    written there. `largest_file`: writing fails where a file would get more bytes.
    """
    warnings.simplefilter("error")
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def report(told: Story) -> None:
        print(told.line, file=lines, flush=True)
        if child is not None and isinstance(told, Started):
            child.write_text(str(sleeping_child()))

    with story.open("w") as lines:
        try:
            run_search(
                read_study(str(study)),
                storage=storage,
                open_evaluator=opener(seconds, fails=broken_above(limit)),
                report=report,
            )
        except EvomergeError as error:
            print(f"error: {error}", file=lines)
            sys.exit(error.exit_status)
