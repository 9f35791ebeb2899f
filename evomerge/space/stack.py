"""Search spaces over stacks of layers: which layers of which models follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge_rules import Parameter
from evomerge.recipe import Recipe
from evomerge.space.config import Bounds, StackConfig, searched_number
from evomerge.space.genes import Gene, Genome, within_bounds
from evomerge.space.numbers import short_names

# Where the search begins: a few blocks in a hundred come and go with the default step.
_THERE, _ABSENT = 0.5, -0.5


@dataclass(frozen=True)
class Block:
    """Layers [first, end) of a model, at one place of the layout."""

    model: str
    first: int
    end: int


@dataclass(frozen=True)
class Piece:
    """Layers [first, end) of a model in the merged one, with one scale."""

    model: str
    first: int
    end: int
    scale: float

    @property
    def layers(self) -> int:
        """How many."""
        return self.end - self.first


@dataclass(frozen=True)
class Stack:
    """Genomes that choose, of all blocks laid out in a row, those that make up the model.

    Gene i, of as many as there are blocks, is above 0 where block i is there; where there are
    scales, the next as many are theirs.
    """

    blocks: tuple[Block, ...]
    genes: tuple[Gene, ...]
    config: StackConfig
    max_layers: int
    base_model: str
    dtype: str
    tokenizer_source: str | None

    def clip(self, genome: Genome) -> Genome:
        """Within the bounds."""
        return within_bounds(self.genes, genome)

    def decode(self, genome: Genome) -> Recipe:
        """The passthrough recipe of the chosen blocks; neighbours of one scale are one slice.

        Raises CandidateError where these are too few or too many.
        """
        pieces = list(_joined(self._chosen(genome)))
        total = sum(piece.layers for piece in pieces)
        if not self.config.min_layers <= total <= self.max_layers:
            raise CandidateError(
                f"its stack has {total} layers, and stack allows {self.config.min_layers} "
                f"(min_layers) to {self.max_layers} (max_layers)"
            )
        return Recipe.model_validate(
            {
                "merge_method": "passthrough",
                "base_model": self.base_model,
                "dtype": self.dtype,
                "tokenizer_source": self.tokenizer_source,
                "slices": [{"sources": [self._source(piece)]} for piece in pieces],
            }
        )

    def encode(self, recipe: Recipe) -> Genome | None:
        """A genome of `recipe`: each layer is found at the first place it can have."""
        genome = np.array([gene.low if gene.low < 0 else gene.start for gene in self.genes])
        genome[: len(self.blocks)] = _ABSENT
        place = 0
        for block, scale in self._blocks_of(recipe):
            places = [at for at in range(place, len(self.blocks)) if self.blocks[at] == block]
            if not places:
                return None
            genome[places[0]] = _THERE
            if self.config.scale is not None:
                genome[len(self.blocks) + places[0]] = scale
            place = places[0] + 1
        return genome

    def _chosen(self, genome: Genome) -> Iterator[Piece]:
        count = len(self.blocks)
        scales = genome[count:].tolist() if self.config.scale is not None else [1.0] * count
        for block, there, scale in zip(self.blocks, genome[:count] > 0, scales, strict=True):
            if there:
                yield Piece(block.model, block.first, block.end, scale)

    def _source(self, piece: Piece) -> dict[str, object]:
        source: dict[str, object] = {
            "model": piece.model,
            "layer_range": [piece.first, piece.end],
        }
        if self.config.scale is None:
            return source
        conditions: list[object] = [
            {"filter": name, "value": piece.scale} for name in self.config.scale_filters
        ]
        return {**source, "parameters": {"scale": [*conditions, {"value": 1.0}]}}

    def _blocks_of(self, recipe: Recipe) -> Iterator[tuple[Block, float]]:
        step = self.config.block
        for part in recipe.slices or ():
            source = part.sources[0]
            first, end = source.layer_range
            scale = _scale_of(source.parameters.get("scale"))
            for at in range(first, end, step):
                yield Block(source.model, at, at + step), scale


def stack(
    config: StackConfig,
    *,
    base_model: str,
    models: Sequence[str],
    num_layers: int,
    dtype: str,
    tokenizer_source: str | None = None,
) -> Stack:
    """The space over the layers of `models`, which begins at the first of them as it is.

    Raises ConfigError where the blocks do not divide the layers, or no stack is allowed.
    """
    if num_layers % config.block:
        raise ConfigError(
            f"search_space.stack.block: {config.block} does not divide the {num_layers} layers of "
            f"{base_model}"
        )
    blocks = tuple(
        Block(model, first, first + config.block)
        for _ in range(config.repeats)
        for model in models
        for first in range(0, num_layers, config.block)
    )
    limit = config.max_layers or 2 * num_layers
    total = config.repeats * len(models) * num_layers
    if config.min_layers > min(limit, total) or limit < config.block:
        raise ConfigError(
            f"search_space.stack: no stack has {config.min_layers} (min_layers) to {limit} "
            f"(max_layers) layers: all models have {total} together, in blocks of {config.block}"
        )
    genes = _genes(config, blocks, models, num_layers // config.block)
    return Stack(blocks, genes, config, limit, base_model, dtype, tokenizer_source)


def _genes(
    config: StackConfig, blocks: Sequence[Block], models: Sequence[str], per_model: int
) -> tuple[Gene, ...]:
    names = dict(zip(models, short_names(models), strict=True))
    in_a_round = per_model * len(models)
    titles = [
        f"round {place // in_a_round + 1} | {names[block.model]} | layers {block.first}-{block.end}"
        for place, block in enumerate(blocks)
    ]
    places = [
        (
            ("round", str(place // in_a_round + 1)),
            ("model", names[block.model]),
            ("layers", f"{block.first}-{block.end}"),
        )
        for place, block in enumerate(blocks)
    ]
    starts = [_THERE if place < per_model else _ABSENT for place in range(len(blocks))]
    there = [
        Gene(f"{title} | there", -1.0, 1.0, start, place=(*place, ("number", "there")))
        for title, start, place in zip(titles, starts, places, strict=True)
    ]
    if not isinstance(config.scale, Bounds):
        return tuple(there)
    scale = searched_number(Parameter("scale", default=1.0), config.scale)
    scales = [
        Gene(
            f"{title} | scale",
            scale.low,
            scale.high,
            scale.start,
            scale.log,
            place=(*place, ("number", "scale")),
        )
        for title, place in zip(titles, places, strict=True)
    ]
    return (*there, *scales)


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces, those that continue each other with one scale made one."""
    last: Piece | None = None
    for piece in pieces:
        if last and (last.model, last.end, last.scale) == (piece.model, piece.first, piece.scale):
            last = Piece(piece.model, last.first, piece.end, piece.scale)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _scale_of(setting: object) -> float:
    first = setting[0] if isinstance(setting, list) and setting else None
    value = first.get("value") if isinstance(first, dict) else None
    return float(value) if isinstance(value, float | int) else 1.0
