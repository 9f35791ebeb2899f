"""The search without models, and the course that it shares with studies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from evomerge.errors import CandidateError, ConfigError, RunError
from evomerge.optimizer.history import History
from evomerge.optimizer.names import SamplerName
from evomerge.search import maximize
from evomerge.search.maximizing import Grade, Maximum
from evomerge.space import Genome

DIMENSION, TASKS, BUDGET = 5, 40, 2600
BEST = np.array([0.9, 0.4, 1.3, 0.7, 1.1])


class Noisy:
    """Grades with noise of their own for each (weights, task, attempt): the same when asked again.

    Tasks differ in difficulty and each wants slightly other weights. `calls` counts the grades.
    """

    def __init__(self, noise: float = 0.4) -> None:
        random_state = np.random.RandomState(0)
        self._noise = noise
        self._difficulty = random_state.normal(0, 0.8, TASKS)
        self._shift = random_state.normal(0, 0.1, (TASKS, DIMENSION))
        self.calls: list[tuple[bytes, int, int]] = []

    def __call__(self, weights: Genome, tasks: Sequence[int], attempt: int) -> list[float | None]:
        self.calls += [(weights.tobytes(), task, attempt) for task in tasks]
        return [self.true(weights, task) + self._of(weights, task, attempt) for task in tasks]

    def true(self, weights: Genome, task: int) -> float:
        away = float(((weights - BEST - self._shift[task]) ** 2).mean())
        return 4 - 2 * away + float(self._difficulty[task])

    def score(self, weights: Genome) -> float:
        """What endless repetitions on all tasks would give."""
        return float(np.mean([self.true(weights, task) for task in range(TASKS)]))

    def _of(self, weights: Genome, task: int, attempt: int) -> float:
        seed = hash((weights.tobytes(), task, attempt)) % 2**32
        return float(self._noise * np.random.RandomState(seed).normal())


def run(grade: Grade, **changes: Any) -> Maximum:
    asked: dict[str, Any] = {
        "dimension": DIMENSION,
        "bounds": (-0.5, 2.0),
        "tasks": TASKS,
        "budget": BUDGET,
        "seed": 1,
    }
    return maximize(grade, **{**asked, **changes})


def what_counts(history: History) -> tuple[object, ...]:
    """All that must be the same in a search that was killed."""
    return (
        history.genomes,
        history.named,
        history.tasks,
        history.told,
        history.grades,
        history.futile,
        history.pools,
        history.choices,
        history.failures,
    )


def test_it_finds_better_weights_than_any_uniform_ones_and_measures_them_afresh() -> None:
    grade = Noisy()
    found = run(grade)
    best_uniform = max(grade.score(np.full(DIMENSION, scale)) for scale in np.linspace(0, 2, 41))
    assert grade.score(found.weights) > best_uniform + 0.05
    assert grade.score(found.weights) > grade.score(BEST) - 0.1
    low, high = found.interval
    assert low < found.score < high
    assert high - low < 4 * 2 * 0.4 / np.sqrt(3 * TASKS)
    assert abs(found.score - grade.score(found.weights)) < 4 * 0.4 / np.sqrt(3 * TASKS)


def test_the_budget_counts_every_task_and_is_not_exceeded() -> None:
    grade = Noisy()
    found = run(grade)
    assert found.spent == len(grade.calls) <= BUDGET
    assert found.spent > BUDGET - 2 * 16 * 18  # less than another generation is left
    assert len(set(grade.calls)) == len(grade.calls)  # nothing is asked twice


def test_a_generation_shares_fresh_tasks_and_the_winner_is_measured_on_all_of_them() -> None:
    history = run(Noisy()).history
    drawn = [tuple(tasks or ()) for tasks in history.tasks.values()]
    assert {len(tasks) for tasks in drawn} == {18}  # eight generations of 16 in the budget
    assert len(set(drawn)) == len(drawn)
    (pool,), (choice,) = history.pools.values(), history.choices.values()
    for attempt in (1, 2, 3):
        assert len(history.grades[choice["candidate"], attempt]) == TASKS
        assert len(history.grades[pool["incumbent"], attempt]) == TASKS


def test_the_search_starts_from_the_best_of_the_sweep() -> None:
    history = run(Noisy()).history
    assert history.start is not None
    scores = {label: history.score(label) for label in history.named if "uniform" in label}
    assert len(scores) == 5
    assert history.start["candidate"] == max(scores, key=lambda label: scores[label] or 0)


def test_bounds_of_any_width_are_searched_alike() -> None:
    grade = Noisy(noise=0.0)

    def stretched(weights: Genome, tasks: Sequence[int], attempt: int) -> list[float | None]:
        return grade((weights - 100) / 40 - 0.5, tasks, attempt)

    wide, narrow = run(stretched, bounds=(100, 200)), run(grade)
    np.testing.assert_allclose((wide.weights - 100) / 40 - 0.5, narrow.weights, atol=1e-6)


class Killed(BaseException):
    """What a kill is to a process."""


def dies_after(grade: Grade, calls: int) -> Grade:
    """Grades until it is asked for the given time."""
    left = calls

    def mortal(weights: Genome, tasks: Sequence[int], attempt: int) -> Sequence[float | None]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return grade(weights, tasks, attempt)

    return mortal


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_a_search_killed_at_random_moments_ends_as_an_unbroken_one(
    tmp_path: Path, sampler: SamplerName
) -> None:
    kills = 20
    # A GP takes its time for each proposal.
    budget = 400 if sampler == "gp" else 700
    asked: dict[str, Any] = {
        "sampler": sampler,
        "budget": budget,
        "settings": {"population": 4, "tasks_per_candidate": 16},
    }
    whole = Noisy()
    unbroken = run(whole, **asked)
    seed = random.SystemRandom().randrange(10**6)
    print(f"random seed of the moments: {seed}")
    moments = random.Random(seed)
    broken = Noisy()
    for _ in range(kills):
        calls = moments.randrange(len(unbroken.history.scores) // kills + 1)
        with pytest.raises(Killed):
            run(dies_after(broken, calls), storage=tmp_path, **asked)
    found = run(broken, storage=tmp_path, **asked)
    assert what_counts(found.history) == what_counts(unbroken.history)
    assert found.weights.tobytes() == unbroken.weights.tobytes()
    assert sorted(broken.calls) == sorted(whole.calls)  # nothing is lost, nothing done again


def test_a_finished_search_is_only_read_and_a_raised_budget_goes_on(tmp_path: Path) -> None:
    first = run(Noisy(), storage=tmp_path, budget=1400)
    again = Noisy()
    assert run(again, storage=tmp_path, budget=1400).weights.tobytes() == first.weights.tobytes()
    assert again.calls == []
    more = run(again, storage=tmp_path, budget=2600)
    assert more.trials > first.trials
    assert more.spent <= 2600


def test_a_search_of_other_settings_is_refused_and_what_differs_is_listed(tmp_path: Path) -> None:
    run(Noisy(), storage=tmp_path, budget=1400)
    with pytest.raises(ConfigError, match="began with other settings:\n  seed: was 1, is 2"):
        run(Noisy(), storage=tmp_path, budget=1400, seed=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 300}, r"budget\.task_evaluations: 300 is less than one generation: at least"),
        ({"bounds": (1.0, 1.0)}, "should be finite, with low < high"),
        ({"bounds": (0.0, float("inf"))}, "should be finite, with low < high"),
        ({"bounds": ([0.0, 0.0], [1.0, 1.0])}, "numbers or 5 of each"),
        ({"dimension": 0}, "should be 1 at least"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_graded(
    changes: dict[str, Any], message: str
) -> None:
    grade = Noisy()
    with pytest.raises(ConfigError, match=message):
        run(grade, **changes)
    assert grade.calls == []


def test_grades_that_are_all_equal_end_in_the_start_and_an_interval_without_width() -> None:
    found = run(lambda weights, tasks, attempt: [3.0] * len(tasks))
    assert found.score == 3.0
    assert found.interval == (3.0, 3.0)


def test_weights_that_fail_are_told_as_the_worst_and_never_win() -> None:
    grade = Noisy()

    def fails(weights: Genome, tasks: Sequence[int], attempt: int) -> list[float | None]:
        if weights[0] > 1.0:
            raise CandidateError("it overflows")
        return grade(weights, tasks, attempt)

    found = run(fails)
    assert found.weights[0] <= 1.0
    failed = {label for label, part in found.history.failures if part == "search"}
    assert failed
    for block in found.history.told.values():
        worst = min(value for _, value in block)
        assert all(value == worst for number, value in block if f"trial {number}" in failed)


def test_a_search_in_which_all_fail_says_so() -> None:
    def fails(weights: Genome, tasks: Sequence[int], attempt: int) -> list[float | None]:
        raise CandidateError("no memory")

    with pytest.raises(
        RunError, match="no candidate of a whole generation could be scored: no mem"
    ):
        run(fails)


def bad_above(limit: float, grade: Grade) -> Callable[..., Sequence[float | None]]:
    """Hopeless where the first weight is above the limit."""

    def graded(weights: Genome, tasks: Sequence[int], attempt: int) -> Sequence[float | None]:
        grades = grade(weights, tasks, attempt)
        return [1.0] * len(tasks) if weights[0] > limit else grades

    return graded


def test_hopeless_candidates_are_stopped_early_with_a_reason_unless_that_is_off() -> None:
    found = run(bad_above(1.1, Noisy(noise=0.1)), tasks=TASKS, settings={"tasks_per_candidate": 40})
    assert found.history.futile
    for label, stop in found.history.futile.items():
        assert stop["reason"].startswith("stopped after 10 of 40 tasks: on shared tasks ")
        assert len(found.history.grades[label, 0]) == 10
        number = int(label.removeprefix("trial "))
        told = dict(pair for block in found.history.told.values() for pair in block)
        generation = [other for other in told if other // 16 == number // 16]
        whole = [told[n] for n in generation if f"trial {n}" not in found.history.futile]
        assert told[number] <= min(whole)
    off = run(
        bad_above(1.1, Noisy(noise=0.1)),
        settings={"tasks_per_candidate": 40, "futility_stop": False},
    )
    assert off.history.futile == {}
