"""Samplers: who proposes genomes, by ask and tell.

A proposal is a pure function of the blocks told so far and of (seed, number): who asks when, how
often or in which order changes nothing. So a resumed search needs the log's tells and nothing else.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cmaes import XNES

from evomerge.search.names import SamplerName
from evomerge.space import Genome

with warnings.catch_warnings():
    # cma says at import that it has no matplotlib, which its plots alone would need.
    warnings.simplefilter("ignore", UserWarning)
    import cma


@dataclass(frozen=True)
class Told:
    """One scored candidate as a sampler learns of it; a higher `value` is better, and finite."""

    number: int
    genome: Sequence[float]
    value: float


class Sampler(Protocol):
    """What the search asks and tells."""

    @property
    def mean(self) -> Genome | None:
        """The middle of the distribution that candidates are drawn from now, in the genes' units.

        None where the sampler has no such thing.
        """

    def propose(self, number: int) -> Genome:
        """The genome of candidate `number`, float64 of shape (genes,)."""

    def tell(self, block: Sequence[Told]) -> None:
        """Learns from a whole generation, in the order of its numbers."""


def make_sampler(
    name: SamplerName,
    *,
    start: Genome,
    sigma0: float,
    population: int,
    seed: int,
    scaling: Scaling | None,
    low: Genome,
    high: Genome,
) -> Sampler:
    """The sampler of this name, told nothing yet.

    `start` (genes,) is where it begins and `low`, `high` (genes,) are the bounds, in the genes' own
    units; `sigma0` is the first step after `scaling` (None: all steps are 1); whole blocks of
    `population` candidates are told. cma-es and xnes draw beyond the bounds, who decodes clips; the
    others stay inside, do not look at `sigma0`, and propose `start` first (random ones do not).
    """
    scaling = scaling or Scaling.none(len(start))
    strategies: dict[str, type[CmaEs | Xnes]] = {"auto": Xnes, "xnes": Xnes, "cma-es": CmaEs}
    if name in strategies:
        strategy = strategies[name]
        return strategy(
            start=start, sigma0=sigma0, population=population, seed=seed, scaling=scaling
        )
    # Only here: Optuna is slow to import, and its mirror is the only other reader of it.
    from evomerge.search.optuna_samplers import OptunaSampler, QuasiRandom

    if name == "quasi-random":
        return QuasiRandom(seed=seed, scaling=scaling, low=low, high=high)
    assert name in ("gp", "tpe", "random")
    return OptunaSampler(
        name,
        start=start,
        population=population,
        seed=seed,
        scaling=scaling,
        low=low,
        high=high,
    )


# e^±200 is beyond any number of a merge, and far from where float64 ends.
_LARGEST_LOGARITHM = 200.0


@dataclass(frozen=True)
class Scaling:
    """How genes, in their own units, lie in the space where all have steps of one size.

    A gene is its place there times its step; where `logarithmic`, that is its natural logarithm.
    Where all steps are 1 and no gene is logarithmic, both are the same to the last bit.
    """

    steps: Genome
    logarithmic: npt.NDArray[np.bool_]

    @classmethod
    def none(cls, dimension: int) -> Scaling:
        """The scaling that changes nothing."""
        return cls(np.ones(dimension), np.zeros(dimension, dtype=np.bool_))

    def place(self, genome: npt.ArrayLike) -> Genome:
        """Where a genome lies."""
        genes = np.array(genome, dtype=np.float64)
        genes[self.logarithmic] = np.log(genes[self.logarithmic])
        return genes / self.steps

    def genome(self, place: Genome) -> Genome:
        """The genome that lies there."""
        genes = place * self.steps
        exponents = genes[self.logarithmic].clip(-_LARGEST_LOGARITHM, _LARGEST_LOGARITHM)
        genes[self.logarithmic] = np.exp(exponents)
        return genes


class CmaEs:
    """CMA-ES by the package cma: textbook settings, no bounds, its own source of randomness.

    Genomes come out as drawn: who decodes them clips. cma's side doors stay shut: the file
    `cma_signals.in` of the working directory, strings that it evaluates, numpy's global generator.
    """

    def __init__(
        self,
        *,
        start: Genome,
        sigma0: float,
        population: int,
        seed: int,
        scaling: Scaling | None = None,
    ) -> None:
        """A search from `start` (in the genes' units) with step `sigma0` (after `scaling`, which
        weights do not need), told in blocks of `population`.
        """
        self._dimension = len(start)
        self._scaling = scaling or Scaling.none(len(start))
        self._seed = seed
        self._random = _ReseededRandom()
        self._strategy = cma.CMAEvolutionStrategy(
            _padded(self._scaling.place(start)),
            sigma0,
            {
                "popsize": population,
                "randn": self._random.randn,
                "seed": math.nan,
                "signals_filename": "",
                # Rescaling coordinates would make what is told differ from what was drawn.
                "conditioncov_alleviate": False,
                # On for populations under 6: it injects mirrored candidates into the next ask,
                # which is not where ours come from, and the next tell then refuses.
                "CMA_mirrors": 0,
                "verbose": -9,
            },
        )

    @property
    def mean(self) -> Genome:
        """The middle of the distribution, in the genes' units, shape (genes,)."""
        middle = np.array(self._strategy.mean[: self._dimension], dtype=np.float64)
        return self._scaling.genome(middle)

    def propose(self, number: int) -> Genome:
        """The genome of candidate `number`, float64 of shape (genes,)."""
        return self._scaling.genome(self._draw(number)[: self._dimension])

    def tell(self, block: Sequence[Told]) -> None:
        """Learns from a whole generation, in the order of its numbers."""
        if self._dimension > 1:
            solutions = [self._scaling.place(told.genome) for told in block]
        else:
            solutions = [self._with_its_padding(told) for told in block]
        # cma wants to have been asked before it is told; the draw itself is thrown away.
        self._draw(block[0].number)
        # Minus: cma minimises. check_points: what it does not remember to have drawn (all, after a
        # resume) would be shortened to a plausible length.
        self._strategy.tell(solutions, [-told.value for told in block], check_points=False)

    def _draw(self, number: int) -> Genome:
        self._random.reseed(self._seed, number)
        drawn = np.asarray(self._strategy.ask(1)[0], dtype=np.float64)
        assert np.isfinite(drawn).all(), f"cma drew {drawn} for candidate {number}"
        return drawn

    def _with_its_padding(self, told: Told) -> Genome:
        drawn = self._draw(told.number)
        drawn[: self._dimension] = self._scaling.place(told.genome)
        return drawn


class Xnes:
    """Exponential natural evolution strategy by the package cmaes: no bounds, no step-size path.

    Source: Glasmachers et al. 2010, doi:10.1145/1830483.1830557. Genomes come out as drawn: who
    decodes them clips.
    """

    def __init__(
        self,
        *,
        start: Genome,
        sigma0: float,
        population: int,
        seed: int,
        scaling: Scaling | None = None,
    ) -> None:
        """As `CmaEs`."""
        self._dimension = len(start)
        self._scaling = scaling or Scaling.none(len(start))
        self._seed = seed
        self._strategy = XNES(
            mean=_padded(self._scaling.place(start)),
            sigma=sigma0,
            population_size=population,
            seed=0,
        )

    @property
    def mean(self) -> Genome:
        """The middle of the distribution, in the genes' units, shape (genes,)."""
        # The package keeps it under this name alone; a test holds that it is the mean.
        return self._scaling.genome(self._strategy._mean[: self._dimension].copy())

    def propose(self, number: int) -> Genome:
        """The genome of candidate `number`, float64 of shape (genes,)."""
        return self._scaling.genome(self._draw(number)[: self._dimension])

    def tell(self, block: Sequence[Told]) -> None:
        """Learns from a whole generation, in the order of its numbers."""
        # Minus: cmaes minimises.
        self._strategy.tell([(self._drawn(told), -told.value) for told in block])

    def _draw(self, number: int) -> Genome:
        self._strategy.reseed_rng(hashed_seed(self._seed, number))
        drawn = np.asarray(self._strategy.ask(), dtype=np.float64)
        assert np.isfinite(drawn).all(), f"XNES drew {drawn} for candidate {number}"
        return drawn

    def _drawn(self, told: Told) -> Genome:
        place = self._scaling.place(told.genome)
        if self._dimension > 1:
            return place
        return np.append(place, self._draw(told.number)[1])


def hashed_seed(seed: int, number: int) -> int:
    """A seed in [0, 2³²) that is a function of (seed, number) alone."""
    return int.from_bytes(_digest(seed, number)[:4], "little")


def _digest(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"evomerge candidate {seed} {number}".encode()).digest()


class _ReseededRandom:
    """Normal numbers from a generator that is set anew before each draw.

    RandomState, not Generator: numpy promises that its stream stays the same for good (NEP 19).
    """

    def __init__(self) -> None:
        self._state = np.random.RandomState(0)

    def reseed(self, seed: int, number: int) -> None:
        """From here on the numbers are a function of (seed, number)."""
        self._state = np.random.RandomState(np.frombuffer(_digest(seed, number), dtype="<u4"))

    def randn(self, *shape: int) -> Any:
        """Standard normal numbers of `shape`, as numpy.random.randn gives them."""
        return self._state.randn(*shape)


def _padded(start: Genome) -> Genome:
    """`start` with a second, idle gene where there is only one: CMA-ES is not made for one."""
    return np.asarray(start if len(start) > 1 else [*start, 0.0], dtype=np.float64)
