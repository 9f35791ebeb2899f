from __future__ import annotations

import pytest

from evomerge.search import defaults


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
