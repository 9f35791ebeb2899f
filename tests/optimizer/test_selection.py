from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from evomerge.optimizer.selection import (
    _t_quantile,
    choose,
    gp_argmax,
    optimism,
    paired_interval,
    race,
    repetition_interval,
    still_racing,
)
from evomerge.optimizer.smoothing import Block

Array = npt.NDArray[np.float64]


def fresh(random: np.random.RandomState, truth: Array, attempts: int = 3) -> Array:
    return np.asarray(truth + 0.8 * random.randn(attempts, len(truth)))


def test_the_incumbent_stays_unless_a_challenger_is_better_beyond_chance() -> None:
    random = np.random.RandomState(0)
    truth = 3 + random.randn(100)
    kept = [
        choose(fresh(random, truth), {"a": fresh(random, truth), "b": fresh(random, truth)}).label
        is None
        for _ in range(300)
    ]
    assert 0.85 < np.mean(kept) < 0.97  # two tests at 5 %
    choice = choose(
        fresh(random, truth), {"a": fresh(random, truth), "b": fresh(random, truth + 1)}
    )
    assert choice.label == "b"
    assert 0.7 < choice.differences["b"] < 1.3
    assert choice.z["b"] > 1.64


def test_a_challenger_that_has_nothing_in_common_or_a_certain_lead_is_judged_by_it() -> None:
    incumbent = np.array([[1.0, 2.0, np.nan]])
    assert choose(incumbent, {"a": np.array([[np.nan, np.nan, 5.0]])}).label is None
    assert choose(incumbent, {"a": incumbent + 1.0}).label == "a"
    assert choose(incumbent, {"a": incumbent}).label is None
    assert choose(incumbent, {}).label is None


@pytest.mark.parametrize("attempts", [2, 3, 5])
def test_the_repetition_interval_holds_the_true_score_as_often_as_it_says(attempts: int) -> None:
    random = np.random.RandomState(attempts)
    truth = 3 + random.randn(60)
    spread = random.rand(60) * 1.5  # tasks differ in how much answers to them vary
    hits = 0
    for _ in range(1000):
        grades = truth + spread * random.randn(attempts, 60)
        low, high = repetition_interval(grades)
        hits += low <= truth.mean() <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_the_repetition_interval_passes_over_missing_grades() -> None:
    grades = np.array([[1.0, 4.0, np.nan, 2.0], [3.0, 4.0, np.nan, np.nan]])
    low, high = repetition_interval(grades)
    assert (low + high) / 2 == pytest.approx((2 + 4 + 2) / 3)
    assert low < high
    assert repetition_interval(np.full((2, 5), 3.0)) == (3.0, 3.0)
    with pytest.raises(ValueError, match="two attempts"):
        repetition_interval(np.array([[1.0, 2.0]]))


@pytest.mark.parametrize(("tasks", "least"), [(10, 0.89), (100, 0.93)])
def test_the_paired_interval_holds_the_true_difference(tasks: int, least: float) -> None:
    random = np.random.RandomState(tasks)
    hits = 0
    for seed in range(300):
        difficulty = 2 * random.randn(tasks)  # common to both, so that it cancels
        one = difficulty + 0.3 + random.randn(2, tasks)
        difference, low, high = paired_interval(one, difficulty + random.randn(2, tasks), seed)
        assert low <= difference <= high
        hits += low <= 0.3 <= high
    assert least <= hits / 300 <= 0.98


def test_the_paired_interval_is_a_function_of_its_seed_and_needs_shared_tasks() -> None:
    random = np.random.RandomState(0)
    one, other = random.randn(1, 30), random.randn(1, 30)
    assert paired_interval(one, other, seed=1) == paired_interval(one, other, seed=1)
    assert paired_interval(one, other, seed=1) != paired_interval(one, other, seed=2)
    with pytest.raises(ValueError, match="no task"):
        paired_interval(np.array([[1.0, np.nan]]), np.array([[np.nan, 1.0]]), seed=0)
    assert paired_interval(np.array([[2.0]]), np.array([[1.0]]), 0) == (1.0, -math.inf, math.inf)


def test_optimism_is_what_the_best_observed_value_loses_when_measured_again() -> None:
    assert optimism(4.0, np.array([[3.0, 4.0], [3.0, np.nan]])) == pytest.approx(0.5)


@pytest.mark.parametrize("freedom", [5, 20, 200])
def test_quantiles_of_student_are_those_of_scipy(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert _t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_a_race_finds_the_best_on_a_part_of_the_grades() -> None:
    random = np.random.RandomState(0)
    regrets, shares = [], []
    for _ in range(30):
        quality = 0.3 * random.randn(16)
        table = quality[:, None] + random.randn(100) + 0.7 * random.randn(16, 100)
        ended = race(
            lambda rows, columns, table=table: table[np.ix_(rows, columns)], 16, range(100)
        )
        means = table.mean(axis=1)
        regrets.append(means.max() - means[ended.winner])
        shares.append(ended.spent / table.size)
        assert ended.spent == np.isfinite(ended.grades).sum()
    assert np.mean(regrets) < 0.03
    assert np.mean(shares) < 0.5


def test_a_race_keeps_equals_and_drops_who_has_no_grades() -> None:
    grades = np.array([[3.0, 3.0, 3.0], [3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [np.nan] * 3])
    assert still_racing(grades, planned=10).tolist() == [True, True, False, False]
    lone = race(lambda rows, columns: np.ones((len(rows), len(columns))), 1, range(50))
    assert (lone.winner, lone.spent) == (0, 10)


def test_the_top_of_the_process_lies_near_the_top_of_the_hill() -> None:
    random = np.random.RandomState(0)
    top = np.linspace(-0.3, 0.3, 6)
    blocks = []
    for _ in range(6):
        places = 0.4 * random.randn(24, 6)
        values = -4 * ((places - top) ** 2).sum(axis=1)
        grades = values[:, None] + random.randn(25) + random.randn(24, 25)
        blocks.append(Block(places, grades, tuple(range(25))))
    found = gp_argmax(blocks)
    assert found is not None
    best = max(
        np.concatenate([b.places for b in blocks]), key=lambda x: -float(((x - top) ** 2).sum())
    )
    assert np.linalg.norm(found - top) < 0.25 < np.linalg.norm(best - top)


def test_there_is_no_top_where_neighbours_share_nothing() -> None:
    random = np.random.RandomState(1)
    tops = [
        gp_argmax(
            [Block(random.randn(24, 6), random.randn(24, 25), tuple(range(25))) for _ in range(3)]
        )
        for _ in range(10)
    ]
    assert sum(top is None for top in tops) >= 6
