from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from evomerge.optimizer.smoothing import Block, adjusted_scores, smoothed

Array = npt.NDArray[np.float64]


def hill(places: Array) -> Array:
    return np.asarray(-0.5 * (places**2).sum(axis=1))


def blocks_of(
    seed: int, truth: Array | None, noise: float = 1.0, window: int = 5, dimension: int = 10
) -> tuple[list[Block], Array]:
    """Generations of 24 on 25 tasks, and the last one's truth; None: nothing but chance decides."""
    random = np.random.RandomState(seed)
    blocks = []
    for _ in range(window):
        places = 0.7 + 0.25 * random.randn(24, dimension)
        values = hill(places) if truth is None else truth[random.permutation(24)]
        difficulty = random.randn(25)
        grades = values[:, None] + difficulty + noise * random.randn(24, 25)
        blocks.append(Block(places, grades, tuple(range(25))))
    return blocks, values


def correlation(one: object, other: object) -> float:
    return float(np.corrcoef(np.asarray(one), np.asarray(other))[0, 1])


def test_neighbours_make_scores_truer_on_a_smooth_hill() -> None:
    plain, better = [], []
    for seed in range(20):
        blocks, truth = blocks_of(seed, None, noise=3.0)
        plain.append(correlation(blocks[-1].grades.mean(axis=1), truth))
        better.append(correlation(smoothed(blocks), truth))
    assert np.mean(better) > np.mean(plain) + 0.1


def test_scores_stay_where_neighbours_have_nothing_in_common() -> None:
    unchanged = 0
    for seed in range(20):
        truth = np.random.RandomState(100 + seed).randn(24)
        blocks, _ = blocks_of(seed, truth)
        told = smoothed(blocks)
        assert correlation(told, blocks[-1].grades.mean(axis=1)) > 0.97
        unchanged += told == tuple(blocks[-1].grades.mean(axis=1))
    assert unchanged >= 16


def test_smoothing_is_a_function_of_the_blocks_and_of_nothing_else() -> None:
    blocks, _ = blocks_of(1, None)
    first = smoothed(blocks)
    np.random.seed(5)
    np.random.rand(3)
    assert smoothed(blocks) == first


def test_a_generation_on_easier_tasks_moves_no_score_of_another() -> None:
    blocks, _ = blocks_of(2, None)
    easier = [Block(b.places, b.grades + 5.0, b.task_ids) for b in blocks[:-1]] + [blocks[-1]]
    assert smoothed(easier) == pytest.approx(smoothed(blocks), abs=1e-9)


def test_a_candidate_without_a_grade_has_no_score_and_changes_nothing_else() -> None:
    blocks, _ = blocks_of(3, None)
    last = blocks[-1]
    places = np.vstack([last.places, np.zeros(10)])
    grades = np.vstack([last.grades, np.full(25, np.nan)])
    told = smoothed([*blocks[:-1], Block(places, grades, last.task_ids)])
    assert np.isnan(told[-1])
    assert told[:-1] == pytest.approx(smoothed(blocks), abs=1e-9)


def test_grades_that_say_nothing_are_handed_on() -> None:
    flat = Block(np.random.RandomState(0).randn(6, 3), np.full((6, 4), 3.0), (1, 2, 3, 4))
    assert smoothed([flat]) == (3.0,) * 6
    alone = Block(np.zeros((1, 3)), np.array([[1.0, 5.0]]), (1, 2))
    assert smoothed([alone]) == (3.0,)
    same_place = Block(np.zeros((6, 3)), np.arange(24.0).reshape(6, 4) % 5, (1, 2, 3, 4))
    assert smoothed([same_place]) == tuple(same_place.grades.mean(axis=1))


def test_who_was_stopped_before_the_hard_tasks_gains_nothing_by_it() -> None:
    candidate, task = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, -3.0, -3.0])
    grades = candidate[:, None] + task
    stopped = grades.copy()
    stopped[0, 2:] = np.nan
    assert adjusted_scores(stopped) == pytest.approx(grades.mean(axis=1), abs=1e-6)
    assert np.nanmean(stopped, axis=1)[0] > grades.mean(axis=1)[1]  # the plain mean would


def test_generations_of_which_nothing_could_be_graded_say_nothing() -> None:
    blocks, _ = blocks_of(4, None)
    failed = Block(blocks[0].places, np.full((24, 25), np.nan), blocks[0].task_ids)
    assert smoothed([failed, *blocks[1:]]) == pytest.approx(smoothed(blocks[1:]), abs=1e-9)
    assert np.isnan(smoothed([*blocks, failed])).all()
    assert np.isnan(smoothed([failed])).all()
