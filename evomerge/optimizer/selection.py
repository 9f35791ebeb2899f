"""Who wins a search, and what may be said about it: on fresh grades, never those it was found by.

The best of many noisy scores is no measurement: it is the luckiest one. So candidates for the
victory are graded afresh, and one that no luck of its own put there (the peak of a Gaussian process
over all candidates, or the middle of the search's distribution) keeps its place unless another one
is better beyond chance: so seldom that the grades that chose may be reported, too.
"""

# Shape letters: a = attempts (repeated answers), t = tasks, n = candidates, d = genes.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from evomerge.optimizer.gaussian import Array, Posterior, one_thread, posterior
from evomerge.optimizer.smoothing import PAYS_FROM, Block, scores_of

# (a, t), NaN where an answer could not be graded; the tasks stand in the same order everywhere.
Grades: TypeAlias = npt.NDArray[np.float64]

Z = 1.64
# By replay of real grades of 126 sibling models (docs/benchmarks.md).
RACE_START = 10
RACE_STEP = 10
RACE_Z = 1.85
_RESAMPLES = 4_000
_RECENT = 600


@dataclass(frozen=True)
class Choice:
    """The winner's `label` (None: the incumbent stays), and the paired tests that decided.

    `differences` and `z` are, for each challenger, its lead over the incumbent, and that in
    standard errors.
    """

    label: str | None
    differences: Mapping[str, float]
    z: Mapping[str, float]


def choose(incumbent: Grades, challengers: Mapping[str, Grades]) -> Choice:
    """The incumbent, unless a challenger leads it by more than 1.64 standard errors: the surest.

    The errors are those of the paired differences between tasks, each task's attempts averaged.
    """
    tests = {label: paired_test(grades, incumbent) for label, grades in challengers.items()}
    differences = {label: difference for label, (difference, _) in tests.items()}
    z = {label: _ratio(*test) for label, test in tests.items()}
    surest = max(z, key=lambda label: z[label], default=None)
    label = surest if surest is not None and z[surest] > Z else None
    return Choice(label, differences, z)


def paired_test(one: Grades, other: Grades) -> tuple[float, float]:
    """The mean difference on the tasks that both have grades of, and its standard error (ddof 1).

    The error is infinite on fewer than two tasks; nan for a difference on none.
    """
    differences = _paired(one, other)
    if len(differences) < 2:
        return float(differences.mean()) if len(differences) else math.nan, math.inf
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def repetition_interval(grades: Grades, level: float = 0.95) -> tuple[float, float]:
    """Where the score on these very tasks lies, were they answered and graded without end.

    From the spread of a task's attempts alone: how hard tasks are has no part in it. It may reach
    beyond the range of grades (`within`). The degrees of
    freedom after Satterthwaite 1946, doi:10.2307/3002019. Raises ValueError where no task has two
    grades.
    """
    counts = np.isfinite(grades).sum(axis=0)
    if not (counts > 1).any():
        raise ValueError("a repetition interval needs two attempts at a task, at least")
    seen = grades[:, counts > 0]
    counts = counts[counts > 0]
    means = np.nanmean(seen, axis=0)
    squares = np.nansum((seen - means) ** 2, axis=0)
    repeated = counts > 1
    variances = np.where(repeated, squares / np.maximum(counts - 1, 1), np.nan)
    # A task with a single grade tells nothing of its spread; it is taken for an average one.
    variances = np.where(repeated, variances, np.nanmean(variances))
    parts = variances / counts / len(counts) ** 2
    score = float(means.mean())
    total = float(parts.sum())
    if total == 0:
        return score, score
    # + 1, not − 1: the square of an estimated variance is (f + 2) / f too large, f = counts − 1.
    freedom = total**2 / float((parts[repeated] ** 2 / (counts[repeated] + 1)).sum())
    half = _t_quantile(0.5 + level / 2, freedom) * math.sqrt(total)
    return score - half, score + half


def paired_interval(
    one: Grades, other: Grades, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean difference one − other, and its bootstrap interval over tasks: (mean, low, high).

    Of tasks that both have grades of, each task's attempts averaged. Percentiles of 4,000
    resamples, drawn from `seed`, stretched by √(n / (n − 1)) to the unbiased standard error.
    Raises ValueError where no task is shared.
    """
    differences = _paired(one, other)
    if len(differences) == 0:
        raise ValueError("no task has a grade of both")
    mean = float(differences.mean())
    number = len(differences)
    if number == 1:
        return mean, -math.inf, math.inf
    drawn = np.random.RandomState(seed).randint(number, size=(_RESAMPLES, number))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(differences[drawn].mean(axis=1) - mean, tails)
    stretch = math.sqrt(number / (number - 1))
    return mean, mean + stretch * float(low), mean + stretch * float(high)


def mean_interval(
    grades: Grades, ends: tuple[float, float], seed: int
) -> tuple[float, float] | None:
    """The 95 % interval of the mean grade, over tasks, as far as it lies between the `ends`.

    By `paired_interval`, against nothing; None for fewer than two graded tasks.
    """
    if np.isfinite(grades).any(axis=0).sum() < 2:
        return None
    _, low, high = paired_interval(grades, np.zeros_like(grades), seed)
    return within((low, high), ends)


def within(interval: tuple[float, float], grades: tuple[float, float]) -> tuple[float, float]:
    """The part of a score's interval that lies in the range of grades: no mean lies elsewhere."""
    lowest, highest = grades
    return max(interval[0], lowest), min(interval[1], highest)


def optimism(best_observed: float, fresh: Grades) -> float:
    """By how much the best value that a search saw exceeds the same candidate's fresh score."""
    return best_observed - float(np.nanmean(np.nanmean(fresh, axis=0)))


def gp_argmax(blocks: Sequence[Block]) -> Array | None:
    """(d,) the place where a Gaussian process over all candidates is highest.

    A local maximum, climbed to from the candidates that it likes best. None where the grades do not
    show that neighbours share anything.
    """
    found = _process(blocks)
    if found is None or found.pays <= PAYS_FROM:
        return None
    with one_thread():
        heights = np.array([found.slope(place)[0] for place in found.places])
        starts = found.places[np.argsort(-heights)[:5]]
        tops = [_climb(found, start) for start in starts]
        return max(tops, key=lambda place: found.slope(place)[0])


def _process(blocks: Sequence[Block]) -> Posterior | None:
    """The posterior of the last 600 candidates at most (its cost is cubic)."""
    kept: list[Block] = []
    for block in reversed(blocks):
        if kept and sum(len(each.places) for each in kept) + len(block.places) > _RECENT:
            break
        kept.insert(0, block)
    return posterior(*scores_of(kept)) if kept else None


def _climb(found: Posterior, place: Array) -> Array:
    """The top of the hill that `place` stands on, by gradient ascent with halved steps."""
    height, gradient = found.slope(place)
    step = math.sqrt(min(length for length, _ in found.pulls))
    for _ in range(200):
        norm = float(np.linalg.norm(gradient))
        if norm == 0 or step < 1e-4:
            break
        ahead = place + step / norm * gradient
        value, slope = found.slope(ahead)
        if value > height:
            place, height, gradient, step = ahead, value, slope, step * 1.5
        else:
            step /= 2
    return place


@dataclass(frozen=True)
class Raced:
    """How a race ended: the `winner`, the number of grades `spent`, and all `grades` (n, t)."""

    winner: int
    spent: int
    grades: Array


def race(
    grade: Callable[[Sequence[int], Sequence[int]], Array],
    candidates: int,
    tasks: Sequence[int],
    *,
    start: int = RACE_START,
    step: int = RACE_STEP,
    z: float = RACE_Z,
) -> Raced:
    """The best of the candidates, found on as few of the `tasks` (in this order) as it takes.

    `grade(candidates, tasks)` gives their grades, one row for each candidate. All are graded on the
    first `start` tasks; who is credibly behind the leader (`still_racing`) drops out, the others go
    on with `step` more. The best is that of the grades there are, were all of them known: whether
    it would be the best again is what fresh grades say.
    """
    grades = np.full((candidates, len(tasks)), np.nan)
    running = np.arange(candidates)
    done = 0
    while done < len(tasks) and (len(running) > 1 or done == 0):
        end = min(start if done == 0 else done + step, len(tasks))
        grades[running, done:end] = grade(running.tolist(), list(tasks[done:end]))
        done = end
        running = running[still_racing(grades[running, :done], len(tasks), z)]
    means = np.nanmean(grades[running, :done], axis=1)
    winner = int(running[np.nanargmax(means)])
    return Raced(winner, int(np.isfinite(grades).sum()), grades)


def still_racing(grades: Array, planned: int, z: float = RACE_Z) -> npt.NDArray[np.bool_]:
    """(n,) who of (n, t) is not behind the leader by more than z standard errors (paired).

    The error is that of what the difference will be once all `planned` tasks are done: the grades
    at hand are part of it. The leader is who has the best mean. A row without grades is out.
    """
    there = np.isfinite(grades)
    counts = there.sum(axis=1)
    means = np.where(counts > 0, np.nansum(grades, axis=1) / np.maximum(counts, 1), -np.inf)
    leader = int(np.argmax(means))
    shared = there & there[leader]
    number = shared.sum(axis=1)
    away = np.where(shared, grades - grades[leader], 0.0)
    lead = away.sum(axis=1) / np.maximum(number, 1)
    squares = (np.where(shared, away - lead[:, None], 0.0) ** 2).sum(axis=1)
    variance = squares / np.maximum(number - 1, 1)
    others = (number > 1) & (np.arange(len(grades)) != leader)
    # Half of it that of all pairs: a dozen whole grades may happen to differ by the same.
    common = float(variance[others].mean()) if others.any() else 0.0
    rest = np.maximum(1 - number / planned, 0) / np.maximum(number, 1)
    behind = (number > 1) & (lead + z * np.sqrt((variance + common) / 2 * rest) < 0)
    return np.asarray((counts > 0) & ~behind)


def _paired(one: Grades, other: Grades) -> Array:
    """The differences of the tasks' mean grades, on tasks that both have grades of."""
    differences = _task_means(one) - _task_means(other)
    return np.asarray(differences[np.isfinite(differences)])


def _task_means(grades: Grades) -> Array:
    counts = np.isfinite(grades).sum(axis=0)
    return np.where(counts > 0, np.nansum(grades, axis=0) / np.maximum(counts, 1), np.nan)


def _ratio(difference: float, error: float) -> float:
    if math.isnan(difference):
        return -math.inf
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def _t_quantile(probability: float, freedom: float) -> float:
    """Student's t, by the expansion of Abramowitz and Stegun 26.7.5; 0.3 % off from 5 degrees."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
