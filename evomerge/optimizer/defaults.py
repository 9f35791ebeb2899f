"""What a search does where its file says nothing, as functions of its size.

The numbers are those that `scripts/bench_search.py` was ahead with (docs/benchmarks.md).
"""

from __future__ import annotations

import math

# In weight units, from where the sweep found the best uniform merge. On nine kinds of landscapes
# better than 0.25 by 0 to 0.1 grades, and no worse than 0.45 on any.
SIGMA0 = 0.35
# How many of the last generations smooth a score.
SMOOTHING_WINDOW = 8
# Fewer are no search: the distribution has to move and to shrink.
_GENERATIONS = 8
# Fresh attempts at all search tasks that the winner's score is the mean of.
SELECTION_REPETITIONS = 3


def population(dimension: int, engines: int = 1) -> int:
    """Twice the textbook size 4 + ⌊3 ln d⌋, up to a multiple of the engines: none of them idles."""
    twice = 2 * (4 + math.floor(3 * math.log(dimension)))
    return math.ceil(twice / engines) * engines


def tasks_per_candidate(
    tasks: int, population: int | None = None, evaluations: int | None = None
) -> int:
    """How many of the search tasks a generation is graded on: a quarter, at least 8, at most all.

    Where `evaluations` are left for generations of this population, as many as make eight of them,
    from an eighth (at least 8) to a half: few tasks win early, more of them late.
    """
    share = tasks / 4
    if population is not None and evaluations is not None:
        share = min(max(evaluations / (population * _GENERATIONS), tasks / 8), tasks / 2)
    return min(tasks, max(8, int(share)))


def sweep_scales(models: int) -> tuple[float, ...]:
    """The weights that uniform merges of so many models are tried with; 1/M is the plain mean."""
    return tuple(sorted({round(1 / models, 6), 0.5, 0.75, 1.0, 1.25}))


def sweep_tasks(tasks: int) -> int:
    """How many tasks, the same for all, the merges of the sweep are graded on: half of them."""
    return min(tasks, max(8, math.ceil(tasks / 2)))
