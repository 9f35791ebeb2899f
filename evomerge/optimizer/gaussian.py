"""A Gaussian process over candidates: what the values of some say about the others.

Values compare within a group only (a generation has tasks of its own), so each group has a free
offset. What the process assumes is weighed by the data (Bayesian averaging over a grid): how far
neighbours speak for each other, how much of the differences they explain, and how much is a
candidate's own or noise. Source: Rasmussen and Williams 2006, chapters 2 and 5.
"""

# Shape letters: n = candidates, d = genes, m = contrasts (n less the groups), h = hypotheses.

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

Array = npt.NDArray[np.float64]

# Squared length scales, in units of the mean squared distance of two candidates of a group: from
# "only the nearest" to "all but a plane".
_LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
# The variance of all signal within a group, in units of the noise's, and the share of it that
# neighbours have in common; the rest is each candidate's own.
_SIGNALS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_COMMON = (0.0, 0.25, 0.5, 0.75, 1.0)
_HYPOTHESES_h2 = np.array([(s * c, s * (1 - c)) for s, c in product(_SIGNALS, _COMMON)])
_IS_SHARED_h = _HYPOTHESES_h2[:, 0] > 0


@dataclass(frozen=True)
class Posterior:
    """What is known once the values are.

    `smoothed` (n,) are the values as far as they are signal; the mean of a group stays. `pays` is
    the logarithm of the odds that neighbours share something, against that they do not.
    """

    smoothed: Array
    pays: float
    places: Array
    pulls: tuple[tuple[float, Array], ...]

    def slope(self, place: Array) -> tuple[float, Array]:
        """What neighbours share at a place (up to a constant), and its gradient there."""
        away_nd = self.places - place
        squares_n = (away_nd**2).sum(axis=1)
        value, gradient_d = 0.0, np.zeros_like(place)
        for length, pull_n in self.pulls:
            shares_n = pull_n * np.exp(-squares_n / (2 * length))
            value += float(shares_n.sum())
            gradient_d += shares_n @ away_nd / length
        return value, gradient_d


def posterior(
    places: Array, values: Array, groups: npt.NDArray[np.int64], noise: float
) -> Posterior | None:
    """What values (n,) with errors of variance `noise` at places (n, d) say, in these groups (n,).

    None where there is nothing to compare: fewer than four contrasts, no noise, or all in a place.
    Computed on one thread, so that the number of cores changes no bit of what a search is told.
    """
    with one_thread():
        return _posterior(places, values, groups, noise)


def one_thread() -> AbstractContextManager[object]:
    """Linear algebra on one thread in the block.

    Matrices of some hundred rows gain nothing from more, and on a busy machine threads that wait
    for each other were seen to take a hundred times as long.
    """
    limits: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limits


@cache
def _controller() -> ThreadpoolController:
    """Finding the libraries of a process takes milliseconds: once."""
    return ThreadpoolController()


def _posterior(
    places: Array, values: Array, groups: npt.NDArray[np.int64], noise: float
) -> Posterior | None:
    belongs_gn = (groups[None, :] == np.unique(groups)[:, None]).astype(np.float64)
    shares_gn = belongs_gn / belongs_gn.sum(axis=1, keepdims=True)
    means_n = (shares_gn @ values) @ belongs_gn
    contrasts = len(values) - len(belongs_gn)
    squares_nn = _squared_distances(places)
    scale = float((squares_nn * (belongs_gn.T @ belongs_gn)).sum())
    if contrasts < 4 or noise <= 0 or scale <= 0:
        return None
    scale /= float((belongs_gn.sum(axis=1) * (belongs_gn.sum(axis=1) - 1)).sum())
    evidence, signals, pulls = [], [], []
    for length in _LENGTHS:
        kernel_nn = _centred(np.exp(-squares_nn / (2 * length * scale)), shares_gn, belongs_gn)
        found = _weighed(kernel_nn, values - means_n, contrasts, noise)
        evidence.append(found[0])
        signals.append(found[1])
        pulls.append(found[2])
    evidence_lh = np.array(evidence)
    odds = _log_mean(evidence_lh[:, _IS_SHARED_h]) - _log_mean(evidence_lh[:, ~_IS_SHARED_h])
    weights_lh = np.exp(evidence_lh - evidence_lh.max())
    weights_lh /= weights_lh.sum()
    smoothed_n = means_n.copy()
    weighted: list[tuple[float, Array]] = []
    for index, length in enumerate(_LENGTHS):
        smoothed_n += signals[index] @ weights_lh[index]
        weighted.append((length * scale, pulls[index] @ weights_lh[index]))
    return Posterior(smoothed_n, odds, places, tuple(weighted))


def _weighed(
    kernel_nn: Array, centred_n: Array, contrasts: int, noise: float
) -> tuple[Array, Array, Array]:
    """Of each hypothesis: its log evidence (h,), the signal (n, h), the pull of neighbours (n, h).

    All hypotheses are diagonal in the eigenvectors of the kernel.
    """
    roots, vectors = np.linalg.eigh(kernel_nn)
    roots_m, vectors_nm = roots[-contrasts:].clip(0.0), vectors[:, -contrasts:]
    roots_m = roots_m / roots_m.mean()
    found_m = vectors_nm.T @ centred_n
    shared_h, own_h = noise * _HYPOTHESES_h2.T
    signal_mh = roots_m[:, None] * shared_h + own_h
    variance_mh = signal_mh + noise
    evidence_h = -0.5 * (np.log(variance_mh) + (found_m**2)[:, None] / variance_mh).sum(axis=0)
    trust_mh = found_m[:, None] / variance_mh
    pull_nh = vectors_nm @ (shared_h * trust_mh)
    return evidence_h, vectors_nm @ (signal_mh * trust_mh), pull_nh


def _log_mean(evidence: Array) -> float:
    """log of the mean of e^evidence, which itself may be beyond any float."""
    highest = float(evidence.max())
    return highest + math.log(float(np.exp(evidence - highest).mean()))


def _squared_distances(places: Array) -> Array:
    squares_n = (places**2).sum(axis=1)
    products_nn = places @ places.T
    return np.asarray((squares_n[:, None] + squares_n[None, :] - 2 * products_nn).clip(0.0))


def _centred(matrix_nn: Array, shares_gn: Array, belongs_gn: Array) -> Array:
    """The matrix with its groups' means taken out of its rows and its columns."""
    rows_nn = matrix_nn - belongs_gn.T @ (shares_gn @ matrix_nn)
    return np.asarray(rows_nn - (rows_nn @ shares_gn.T) @ belongs_gn)
