"""What samplers are, who propose genomes by ask and tell, and what they share.

A proposal is a pure function of the blocks told so far and of (seed, number): who asks when, how
often or in which order changes nothing. So a resumed search needs the log's tells and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evomerge.space import Genome


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


def hashed_seed(seed: int, number: int) -> int:
    """A seed in [0, 2³²) that is a function of (seed, number) alone."""
    return int.from_bytes(seed_digest(seed, number)[:4], "little")


def seed_digest(seed: int, number: int) -> bytes:
    """32 bytes that are a function of (seed, number) alone."""
    return hashlib.sha256(f"evomerge candidate {seed} {number}".encode()).digest()
