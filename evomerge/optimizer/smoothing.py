"""What a candidate's neighbours know of it: scores smoothed over the last generations.

A pure function of what was logged. Where the grades do not show that neighbours have anything in
common, scores stay as they are.
"""

# Shape letters: n = candidates of a generation, t = its tasks, d = genes.

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evomerge.optimizer.gaussian import Array, posterior

# Twice as likely as not is within what a few dozen noisy scores do by chance.
PAYS_FROM = 1.0


@dataclass(frozen=True)
class Block:
    """A scored generation: `places` (n, d) in coordinates where all steps are of one size,
    `grades` (n, t) with NaN for what is missing, a column for each of `task_ids`.
    """

    places: Array
    grades: Array
    task_ids: tuple[Hashable, ...]


def smoothed(blocks: Sequence[Block]) -> tuple[float, ...]:
    """What to tell the sampler of each candidate of the last block (n,), in grades' own units.

    The scores, adjusted for missing grades (`adjusted_scores`), and brought closer to what all
    `blocks` say about their neighbours where that pays. NaN for a candidate without a grade.
    """
    last = adjusted_scores(blocks[-1].grades)
    graded = np.isfinite(last)
    found = posterior(*scores_of(blocks))
    if found is not None and found.pays > PAYS_FROM:
        last[graded] = found.smoothed[len(found.smoothed) - int(graded.sum()) :]
    return tuple(last.tolist())


def scores_of(blocks: Sequence[Block]) -> tuple[Array, Array, npt.NDArray[np.int64], float]:
    """Places (n, d), scores (n,) and generations (n,) of all that has grades, and the noise.

    The noise is the variance of a score's error (`_noise`).
    """
    scores = [adjusted_scores(block.grades) for block in blocks]
    graded = [np.isfinite(each) for each in scores]
    return (
        np.concatenate([block.places[mask] for block, mask in zip(blocks, graded, strict=True)]),
        np.concatenate([score[mask] for score, mask in zip(scores, graded, strict=True)]),
        np.repeat(np.arange(len(blocks)), [int(mask.sum()) for mask in graded]),
        _noise(blocks),
    )


def adjusted_scores(grades: Array) -> Array:
    """(n,) the mean grade of each row of (n, t), as if no grade were missing (NaN).

    Grades are taken for a candidate's part plus a task's, by least squares: who was given the
    easier tasks gains nothing by it. NaN for a row without grades.
    """
    there = np.isfinite(grades)
    if there.all():
        return np.asarray(grades.mean(axis=1))
    rows, columns = _effects(grades)
    seen = there.any(axis=0)
    return np.asarray(rows + columns[seen].mean()) if seen.any() else rows


def _effects(grades: Array) -> tuple[Array, Array]:
    """The parts of candidates (n,) and tasks (t,) in grades; NaN for those that have none."""
    there = np.isfinite(grades)
    known = np.where(there, grades, 0.0)
    per_row, per_column = there.sum(axis=1), there.sum(axis=0)
    rows, columns = np.zeros(len(per_row)), np.zeros(len(per_column))
    # Alternating means converge to the least squares; exactly at once where nothing is missing.
    for _ in range(50):
        rows = (known - columns * there).sum(axis=1) / np.maximum(per_row, 1)
        columns = (known - rows[:, None] * there).sum(axis=0) / np.maximum(per_column, 1)
    return np.where(per_row > 0, rows, np.nan), np.where(per_column > 0, columns, np.nan)


def _noise(blocks: Sequence[Block]) -> float:
    """The variance of a score: that of what is left of the grades, over how many there are.

    What is left: a grade less its candidate's and its task's part. 0 where nothing can be said.
    """
    squares, freedom, per_score = 0.0, 0, []
    for block in blocks:
        there = np.isfinite(block.grades)
        if not there.any():
            continue
        rows, columns = _effects(block.grades)
        left = np.where(there, block.grades - rows[:, None] - columns, 0.0)
        squares += float((left**2).sum())
        known_rows, known_columns = there.any(axis=1).sum(), there.any(axis=0).sum()
        freedom += int(there.sum() - known_rows - known_columns + 1)
        counts = there.sum(axis=1)
        per_score.extend((1.0 / counts[counts > 0]).tolist())
    if freedom < 1 or not per_score:
        return 0.0
    return squares / freedom * float(np.mean(per_score))
