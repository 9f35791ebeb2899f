from __future__ import annotations

from collections import Counter

import numpy as np

from evomerge.optimizer.tasks import draw_tasks

CATEGORIES = {f"t{n}": "abcdd"[n % 5] for n in range(40)}  # 8 of a, b, c, and 16 of d


def test_a_draw_is_a_function_of_seed_and_block_and_keeps_the_order() -> None:
    drawn = draw_tasks(CATEGORIES, 10, seed=3, block=7)
    assert drawn == draw_tasks(CATEGORIES, 10, seed=3, block=7)
    assert drawn != draw_tasks(CATEGORIES, 10, seed=3, block=8)
    assert drawn != draw_tasks(CATEGORIES, 10, seed=4, block=7)
    assert list(drawn) == sorted(drawn, key=list(CATEGORIES).index)
    assert len(set(drawn)) == 10


def test_each_category_has_its_share_and_each_task_its_chance() -> None:
    chances: Counter[str] = Counter()
    for block in range(2000):
        drawn = draw_tasks(CATEGORIES, 10, seed=0, block=block)
        chances.update(drawn)
        assert Counter(CATEGORIES[task] for task in drawn) == {"a": 2, "b": 2, "c": 2, "d": 4}
    # Each of 40 tasks is drawn with probability 1/4: 500 times, give or take 20.
    assert set(chances) == set(CATEGORIES)
    assert 400 < min(chances.values()) <= max(chances.values()) < 600


def test_shares_that_are_no_whole_numbers_are_rounded_up_or_down_fairly() -> None:
    categories = {n: "rare" if n < 3 else "common" for n in range(30)}
    rare = [
        sum(task < 3 for task in draw_tasks(categories, 15, seed=1, block=block))
        for block in range(1000)
    ]
    assert set(rare) == {1, 2}
    assert 1.42 < np.mean(rare) < 1.58


def test_more_tasks_than_there_are_means_all() -> None:
    assert draw_tasks(CATEGORIES, 41, seed=0, block=0) == tuple(CATEGORIES)
    assert draw_tasks(CATEGORIES, 40, seed=0, block=0) == tuple(CATEGORIES)
