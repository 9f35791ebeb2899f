"""Which tasks a generation is graded on: a fresh, stratified part of them, the same for all of it.

A part, because many candidates on few tasks teach a sampler more than few on all; fresh, because a
search overfits to a fixed part; the same for all, because only then do grades compare in pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

TaskId = TypeVar("TaskId", bound=Hashable)


def draw_tasks(
    categories: Mapping[TaskId, Hashable], number: int, seed: int, block: int
) -> tuple[TaskId, ...]:
    """`number` of the tasks (all, where there are no more), in the order of `categories`.

    A function of its arguments alone. `categories` maps each task to its category. Every task is
    as likely as any other, and of each category its share comes, rounded up or down.
    """
    ids = list(categories)
    if number >= len(ids):
        return tuple(ids)
    random = _random(seed, block)
    places: dict[Hashable, list[int]] = {}
    for place, task in enumerate(ids):
        places.setdefault(categories[task], []).append(place)
    strata = list(places.values())
    shuffled = [
        strata[index][member]
        for index in random.permutation(len(strata))
        for member in random.permutation(len(strata[index]))
    ]
    # Systematic sampling: equal steps from a random start through the tasks, category by category.
    steps = (random.random_sample() + np.arange(number)) * (len(ids) / number)
    return tuple(ids[place] for place in sorted(shuffled[int(step)] for step in steps))


def _random(seed: int, block: int) -> np.random.RandomState:
    """Random numbers for this block of this search; RandomState's stream never changes (NEP 19)."""
    digest = hashlib.sha256(f"evomerge tasks {seed} {block}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
