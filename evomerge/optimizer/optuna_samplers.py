"""Samplers that search the whole box at once: Optuna's GP, TPE and random, and a Sobol sequence.

For small budgets and for comparison. They keep inside the bounds, and like all samplers here they
propose as a pure function of what was told and of (seed, number): the Optuna study is in memory
and follows from the tells, and each draw comes from a sampler made for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from evomerge.errors import ConfigError
from evomerge.optimizer.samplers import Scaling, Told, hashed_seed
from evomerge.space import Genome


class OptunaSampler:
    """Optuna's sampler `kind` with its defaults, asked for one generation after the other.

    Those of a generation that were drawn before are running trials to it, which the GP keeps away
    from (TPE does not, by default); so candidate n stands for drawing those before it, too.
    """

    def __init__(
        self,
        kind: Literal["gp", "tpe", "random"],
        *,
        start: Genome,
        population: int,
        seed: int,
        scaling: Scaling,
        low: Genome,
        high: Genome,
    ) -> None:
        """A search in [low, high] (genes,) whose first candidate is `start`, but for "random".

        Raises ConfigError where "gp" lacks its library.
        """
        if kind == "gp":
            _require_scipy(kind)
        # Else it prints a line of its own for each study that it makes.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._kind = kind
        self._first = None if kind == "random" else start.clip(low, high)
        self._population = population
        self._seed = seed
        self._box = _Box(scaling, low, high)
        self._study = optuna.create_study(direction="maximize")
        # The candidates of one generation as drawn so far, and their trials.
        self._drawn: dict[int, Genome] = {}
        self._running: list[optuna.Trial] = []

    @property
    def mean(self) -> None:
        """There is none."""
        return None

    def propose(self, number: int) -> Genome:
        """The genome of candidate `number`, float64 of shape (genes,)."""
        first = number - number % self._population
        if first not in self._drawn:
            self._forget_drawn()
        for each in range(first, number + 1):
            if each not in self._drawn:
                self._drawn[each] = self._draw(each)
        return self._drawn[number].copy()

    def tell(self, block: Sequence[Told]) -> None:
        """Learns from a whole generation, in the order of its numbers."""
        self._forget_drawn()
        self._study.add_trials(
            [
                optuna.trial.create_trial(
                    value=told.value,
                    params=self._box.params(told.genome),
                    distributions=dict(self._box.distributions),
                )
                for told in block
            ]
        )

    def _draw(self, number: int) -> Genome:
        if number == 0 and self._first is not None:
            self._study.enqueue_trial(self._box.params(self._first))
        self._study.sampler = self._sampler(hashed_seed(self._seed, number))
        trial = self._study.ask(dict(self._box.distributions))
        self._running.append(trial)
        return self._box.genome(trial.params)

    def _sampler(self, seed: int) -> BaseSampler:
        if self._kind == "gp":
            return GPSampler(seed=seed)
        return TPESampler(seed=seed) if self._kind == "tpe" else RandomSampler(seed=seed)

    def _forget_drawn(self) -> None:
        # Failed trials are what Optuna's samplers do not look at.
        for trial in self._running:
            self._study.tell(trial, state=TrialState.FAIL)
        self._running, self._drawn = [], {}


class QuasiRandom:
    """Candidate n is point n of a scrambled Sobol sequence over the box; nothing is learned."""

    def __init__(self, *, seed: int, scaling: Scaling, low: Genome, high: Genome) -> None:
        """Points in [low, high] (genes,). Raises ConfigError where scipy is missing."""
        _require_scipy("quasi-random")
        self._seed = hashed_seed(seed, 0)
        self._box = _Box(scaling, low, high)

    @property
    def mean(self) -> None:
        """There is none."""
        return None

    def propose(self, number: int) -> Genome:
        """The genome of candidate `number`, float64 of shape (genes,)."""
        from scipy.stats.qmc import Sobol  # slow to import, and rarely wanted

        sequence = Sobol(len(self._box.low), scramble=True, rng=self._seed)
        if number:  # scipy cannot skip 0
            sequence.fast_forward(number)
        return self._box.within(sequence.random(1)[0])

    def tell(self, block: Sequence[Told]) -> None:
        """Nothing is learned."""


class _Box:
    """The bounds in the space of equal steps, as Optuna's distributions; "0", "1", … by gene."""

    def __init__(self, scaling: Scaling, low: Genome, high: Genome) -> None:
        self._scaling = scaling
        self.low, self._high = scaling.place(low), scaling.place(high)
        self._genome_low, self._genome_high = low, high
        self.distributions: Mapping[str, BaseDistribution] = {
            str(gene): FloatDistribution(float(at_least), float(at_most))
            for gene, (at_least, at_most) in enumerate(zip(self.low, self._high, strict=True))
        }

    def params(self, genome: Sequence[float] | Genome) -> dict[str, float]:
        """Where a genome lies."""
        place = self._scaling.place(genome).clip(self.low, self._high)
        return {str(gene): float(value) for gene, value in enumerate(place)}

    def genome(self, params: Mapping[str, float]) -> Genome:
        """The genome that lies there."""
        place = np.array([params[gene] for gene in self.distributions])
        # Rounding can end an ulp outside.
        return self._scaling.genome(place).clip(self._genome_low, self._genome_high)

    def within(self, shares: Genome) -> Genome:
        """The genome at these shares, each in [0, 1], of the way from low to high."""
        place = self.low + shares * (self._high - self.low)
        return self._scaling.genome(place).clip(self._genome_low, self._genome_high)


def _require_scipy(name: str) -> None:
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"sampler.name {name} needs scipy, which is not installed: "
            "pip install 'evomerge[samplers]'"
        ) from None
