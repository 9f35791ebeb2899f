"""Graded problems of known truth for `bench_search.py`: merges of a synthetic pair of models.

A genome is a vector of merge weights. How well it does a task falls with its squared distance from
the best weights (which differ a little between tasks) in a rotated, ill-conditioned metric; an item
response curve turns that into a grade from 1 to 5, and noise of answering and judging is added.
Levels and noise are those of real models with real judges: all weights 0.5 at 3.1, all
models added up at 3.6, the optimum at 3.9; standard deviations of 1.1 to 1.3 within a
model and of 1.0 to 1.1 between paired grades of relatives.
"""

# Shape letters: n = genomes, d = genes, t = tasks.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LOW, HIGH = -0.5, 2.0
CATEGORIES = 8


@dataclass(frozen=True)
class Kind:
    """What makes a landscape.

    `exponent` of the distance; `own` is how far tasks' best weights lie from the common ones, per
    gene; `ruggedness` is the height of hills, and one comes where every gene has moved by
    `wavelength`; `optima` is where the best weights are drawn from, but for the share `at_border`
    of genes, which are best just outside of the bounds; `condition` is that of the metric.
    """

    exponent: float = 2.0
    own: float = 0.2
    ruggedness: float = 0.0
    wavelength: float = 1.0
    optima: tuple[float, float] = (0.3, 1.5)
    at_border: float = 0.0
    condition: float = 20.0
    noise: float = 0.85


KINDS = {
    "hill": Kind(),
    "sharper": Kind(exponent=1.6),
    "own optima": Kind(exponent=1.8, own=0.45),
    "rugged": Kind(ruggedness=0.35),
    "lottery": Kind(ruggedness=0.35, wavelength=0.1),
    "border": Kind(at_border=0.2),
    "low weights": Kind(optima=(-0.2, 0.8)),
    "ill-conditioned": Kind(condition=300.0),
    "noisy": Kind(noise=1.3),
}


class Landscape:
    """One problem: `dimension` weights, `tasks` tasks, all drawn from `seed`."""

    def __init__(self, kind: Kind, dimension: int, tasks: int, seed: int) -> None:
        random = np.random.RandomState([seed, dimension, tasks])
        self.dimension, self.tasks, self.kind = dimension, tasks, kind
        rotation = np.linalg.qr(random.randn(dimension, dimension))[0]
        curvature = kind.condition ** np.linspace(0, 1, dimension)
        self._metric = (rotation * np.sqrt(curvature / curvature.mean() / dimension)).T
        best = random.uniform(*kind.optima, size=dimension)
        outside = random.rand(dimension) < kind.at_border
        best[outside] = np.where(random.rand(dimension) < 0.7, HIGH + 0.1, LOW - 0.1)[outside]
        self.best = best
        self._optima = best + kind.own * random.randn(tasks, dimension)
        self._difficulty = 1.6 * random.randn(tasks)
        self._slope = np.exp(0.25 * random.randn(tasks))
        # Random Fourier features: a stationary field of hills, of which each task has its share.
        self._waves = random.randn(64, dimension) * (2 * math.pi / kind.wavelength / dimension)
        self._phases = random.uniform(0, 2 * math.pi, 64)
        self._order = random.randint(CATEGORIES, size=tasks)
        self.categories = {task: int(self._order[task]) for task in range(tasks)}

    def latent(self, genomes: Array, tasks: Sequence[int]) -> Array:
        """(n, t) the grade that answers are around, before noise and rounding."""
        genomes = np.clip(np.atleast_2d(genomes), LOW, HIGH)
        tasks = list(tasks)
        places, optima = genomes @ self._metric.T, self._optima[tasks] @ self._metric.T
        squares = (places**2).sum(axis=1)[:, None] + (optima**2).sum(axis=1) - 2 * places @ optima.T
        ability = 2.9 - 5.0 * squares.clip(0.0) ** (self.kind.exponent / 2)
        if self.kind.ruggedness:
            field = np.cos(genomes @ self._waves.T + self._phases).sum(axis=1) * math.sqrt(2 / 64)
            ability = ability + self.kind.ruggedness * field[:, None]
        return np.asarray(
            1 + 4 / (1 + np.exp(-self._slope[tasks] * (ability - 1.0 - self._difficulty[tasks])))
        )

    def grades(self, genomes: Array, tasks: Sequence[int], random: np.random.RandomState) -> Array:
        """(n, t) whole grades from 1 to 5 of fresh answers."""
        latent = self.latent(genomes, tasks)
        noisy = latent + self.kind.noise * random.standard_normal(latent.shape)
        return np.asarray(np.clip(np.round(noisy), 1, 5))

    def truth(self, genomes: Array) -> Array:
        """(n,) the expected mean grade on all tasks."""
        latent = self.latent(genomes, range(self.tasks))
        steps = latent[..., None] - (np.arange(2, 6) - 0.5)
        return np.asarray(1 + _normal(steps / self.kind.noise).sum(axis=-1).mean(axis=1))


def _normal(values: Array) -> Array:
    """The standard normal distribution function, by a table fine enough for three digits."""
    return np.asarray(np.interp(values, _TABLE_AT, _TABLE))


_TABLE_AT = np.linspace(-6, 6, 4801)
_TABLE = np.array([NormalDist().cdf(float(at)) for at in _TABLE_AT])
