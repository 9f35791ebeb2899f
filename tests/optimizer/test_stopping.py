from __future__ import annotations

import numpy as np

from evomerge.optimizer.stopping import earliest_stop, futility


def grades(random: np.random.RandomState, level: float, tasks: int) -> dict[int, float]:
    drawn = np.clip(np.round(level + 1.2 * random.randn(tasks)), 1, 5)
    return dict(enumerate(drawn.tolist()))


def test_the_earliest_stop_is_a_quarter_of_the_tasks_and_eight_at_least() -> None:
    assert [earliest_stop(planned) for planned in (8, 20, 32, 50, 100)] == [8, 8, 8, 13, 25]


def test_a_broken_merge_is_stopped_as_early_as_may_be_and_says_why() -> None:
    random = np.random.RandomState(0)
    others = [grades(random, 3.5, 40) for _ in range(6)]
    broken = dict.fromkeys(range(10), 1.0)
    assert futility(dict.fromkeys(range(9), 1.0), others, planned=40) is None
    stop = futility(broken, others, planned=40)
    assert stop is not None
    assert (stop.tasks, stop.planned, stop.behind, stop.compared) == (10, 40, 6, 6)
    assert stop.reason.startswith(
        "stopped after 10 of 40 tasks: on shared tasks 6 of 6 others of its generation are better"
    )


def test_one_that_is_as_good_as_the_others_is_hardly_ever_stopped() -> None:
    random = np.random.RandomState(1)
    stops = 0
    for _ in range(500):
        others = [grades(random, 3.5, 40) for _ in range(8)]
        own = grades(random, 3.5, 40)
        looks = [dict(list(own.items())[:count]) for count in (10, 20, 30)]
        stops += any(futility(look, others, planned=40) is not None for look in looks)
    assert stops < 500 * 0.08


def test_nobody_is_stopped_by_fewer_than_three_or_on_tasks_that_are_not_shared() -> None:
    own = dict.fromkeys(range(20), 1.0)
    good = dict.fromkeys(range(40), 5.0)
    elsewhere = dict.fromkeys(range(100, 140), 5.0)
    assert futility(own, [good, good], planned=40) is None
    assert futility(own, [elsewhere] * 5, planned=40) is None
    assert futility(own, [good] * 3, planned=40) is not None
    assert futility(dict.fromkeys(range(40), 1.0), [good] * 3, planned=40) is None
