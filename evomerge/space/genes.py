"""Genomes, the genes that they consist of, and recipes with places left open for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from evomerge.recipe import Recipe

Genome: TypeAlias = npt.NDArray[np.float64]

# A weight's default bounds are this wide, and the sampler's step is meant for weights.
_WEIGHT_WIDTH = 2.5


@dataclass(frozen=True)
class Gene:
    """One searched number, in its own units, within [low, high].

    `log`: its ratios count, not its differences (so low > 0). `is_weight`: the uniform
    merge has 1 / number of models here; else it has `start`, where the search begins. `place` says
    of `name` what is what: ("layers", "0-2"), ("model", "expert"), ("group", "self_attn").
    """

    name: str
    low: float
    high: float
    start: float
    log: bool = False
    is_weight: bool = False
    place: tuple[tuple[str, str], ...] = ()

    @property
    def step(self) -> float:
        """What one unit of the sampler's step is here, for `log` in the natural logarithm.

        1 for a weight; any other number moves by the share of its range that a weight moves of the
        default range of weights, 2.5.
        """
        if self.log:
            return math.log(self.high / self.low) / _WEIGHT_WIDTH
        return 1.0 if self.is_weight else (self.high - self.low) / _WEIGHT_WIDTH


class Shape(Protocol):
    """What genomes of a search space look like and stand for."""

    @property
    def genes(self) -> tuple[Gene, ...]:
        """What each place of a genome means."""

    def clip(self, genome: Genome) -> Genome:
        """The nearest genome that has a meaning: within the bounds, and whatever else must hold."""

    def decode(self, genome: Genome) -> Recipe:
        """The recipe of a clipped genome. Raises CandidateError where there is none."""

    def encode(self, recipe: Recipe) -> Genome | None:
        """A genome that decodes to `recipe`, as far as can be seen; None where there is none."""


@dataclass(frozen=True)
class Slot:
    """The place of gene number `gene` in a recipe."""

    gene: int


def within_bounds(genes: Sequence[Gene], genome: Genome) -> Genome:
    """Each gene at its nearest allowed value."""
    low, high = [gene.low for gene in genes], [gene.high for gene in genes]
    return np.asarray(genome, dtype=np.float64).clip(low, high)


def filled(template: object, genes: Sequence[float]) -> object:
    """Plain values, from plain values with slots."""
    if isinstance(template, Slot):
        return genes[template.gene]
    if isinstance(template, Mapping):
        return {key: filled(value, genes) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(item, genes) for item in template]
    return template


def found(template: object, plain: object) -> Iterator[tuple[int, float]]:
    """(gene, value) for each slot of `template` that has a number in `plain`."""
    if isinstance(template, Slot):
        if isinstance(plain, float | int):
            yield template.gene, float(plain)
    elif isinstance(template, Mapping) and isinstance(plain, Mapping):
        for key, part in template.items():
            yield from found(part, plain.get(key))
    elif isinstance(template, list) and isinstance(plain, list):
        for part, item in zip(template, plain, strict=False):
            yield from found(part, item)
