"""Samplers that move a normal distribution: CMA-ES and XNES."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import XNES

from evomerge.optimizer.samplers import Scaling, Told, hashed_seed, seed_digest
from evomerge.space import Genome

with warnings.catch_warnings():
    # cma says at import that it has no matplotlib, which its plots alone would need.
    warnings.simplefilter("ignore", UserWarning)
    import cma


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
        """Learns from a whole generation, in the order of its numbers.

        Nothing, where the distribution has become so narrow or so wide that floats end: after some
        hundred generations, the sooner the fewer genes there are.
        """
        # Minus: cmaes minimises.
        told = [(self._drawn(each), -each.value) for each in block]
        assert len(told) == self._strategy.population_size
        before = copy.deepcopy(self._strategy)
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                self._strategy.tell(told)
        # It asserts that places are below 1e32 and inverts its matrix.
        except (AssertionError, ArithmeticError, np.linalg.LinAlgError):
            self._strategy = before

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


class _ReseededRandom:
    """Normal numbers from a generator that is set anew before each draw.

    RandomState, not Generator: numpy promises that its stream stays the same for good (NEP 19).
    """

    def __init__(self) -> None:
        self._state = np.random.RandomState(0)

    def reseed(self, seed: int, number: int) -> None:
        """From here on the numbers are a function of (seed, number)."""
        self._state = np.random.RandomState(np.frombuffer(seed_digest(seed, number), dtype="<u4"))

    def randn(self, *shape: int) -> Any:
        """Standard normal numbers of `shape`, as numpy.random.randn gives them."""
        return self._state.randn(*shape)


def _padded(start: Genome) -> Genome:
    """`start` with a second, idle gene where there is only one: CMA-ES is not made for one."""
    return np.asarray(start if len(start) > 1 else [*start, 0.0], dtype=np.float64)
