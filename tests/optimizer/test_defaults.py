from __future__ import annotations

import pytest

from evomerge.optimizer import defaults


def test_a_population_is_twice_the_textbook_size_and_leaves_no_engine_idle() -> None:
    assert [defaults.population(d) for d in (1, 20, 40, 64)] == [8, 24, 30, 32]
    assert [defaults.population(20, engines) for engines in (5, 8, 16, 64)] == [25, 24, 32, 64]


@pytest.mark.parametrize("tasks", [1, 5, 8, 20, 100, 1000])
def test_no_more_tasks_are_asked_for_than_there_are(tasks: int) -> None:
    assert 1 <= defaults.tasks_per_candidate(tasks) <= tasks
    assert 1 <= defaults.sweep_tasks(tasks) <= tasks


def test_the_plain_mean_of_the_models_is_among_the_scales() -> None:
    assert defaults.sweep_scales(1) == (0.5, 0.75, 1.0, 1.25)
    assert 0.333333 in defaults.sweep_scales(3)


def test_a_small_budget_has_fewer_tasks_for_each_candidate_and_a_large_one_more() -> None:
    assert defaults.tasks_per_candidate(100) == 25
    found = [defaults.tasks_per_candidate(100, 24, spent) for spent in (0, 1500, 4800, 10**6)]
    assert found == [12, 12, 25, 50]
    assert defaults.tasks_per_candidate(40, 24, 500) == 8
    assert defaults.tasks_per_candidate(5, 24, 10**6) == 5
