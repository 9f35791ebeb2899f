"""A search whose engine is a formula: real studies, real files, no model that answers.

`python -m tests.search.formula STUDY.yaml STORAGE` runs one in a process of its own, to be killed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import CandidateError, EngineDiedError
from evomerge.evaluate.suite import TaskResult
from evomerge.recipe import Recipe
from evomerge.search.evaluator import TimeSplit
from evomerge.search.loop import run_search
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.story import Story
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

    def evaluate(self, recipe: Recipe, task_ids: Sequence[str]) -> list[TaskResult]:
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
        return results


def opener(
    seconds: float = 0.0,
    grade: Callable[[Recipe, str], float | None] = formula_grade,
    fails: Callable[[Recipe], Exception | None] = lambda recipe: None,
):
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study")
    parser.add_argument("storage", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--broken-above", type=float, default=math.inf)
    options = parser.parse_args()

    def report(story: Story) -> None:
        print(story.line, file=sys.stderr, flush=True)

    outcome = run_search(
        read_study(options.study),
        storage=options.storage,
        open_evaluator=opener(options.seconds, fails=broken_above(options.broken_above)),
        report=report,
    )
    json.dump(outcome.status, sys.stdout)


if __name__ == "__main__":
    main()
