"""Search spaces over the numbers of a merge method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TypeAlias

import numpy as np

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe
from evomerge.space.config import ROOM, Per, Searched, SpaceConfig, is_della
from evomerge.space.genes import Gene, Genome, Slot, filled, found, within_bounds

Layers: TypeAlias = tuple[int, int]

# The published recipes of these methods say so, and searches that began before go on with them.
_ALWAYS_WRITTEN: Mapping[str, Mapping[str, object]] = {
    "task_arithmetic": {"int8_mask": 1.0, "normalize": 0.0},
    "linear": {"normalize": 1.0},
}


@dataclass(frozen=True)
class Cast:
    """Who takes part in each slice: `models` with numbers of their own, then `base` without.

    `named_base` is the recipe's base_model.
    """

    models: tuple[str, ...]
    base: str | None
    named_base: str | None


@dataclass(frozen=True)
class Numbers:
    """Genomes whose genes stand in a recipe as they are.

    `absolute` are the genes whose sign says nothing; `pairs` those of (density, epsilon) that one
    tensor may see together: a number is a fixed value.
    """

    genes: tuple[Gene, ...]
    template: Mapping[str, object]
    absolute: tuple[int, ...] = ()
    pairs: tuple[tuple[Slot | float, Slot | float], ...] = ()

    def clip(self, genome: Genome) -> Genome:
        """Within the bounds; an epsilon too large for its density is made smaller."""
        clipped = genome.copy()
        clipped[list(self.absolute)] = np.abs(clipped[list(self.absolute)])
        clipped = within_bounds(self.genes, clipped)
        for density, epsilon in self.pairs:
            self._lower(clipped, density, epsilon)
        for density, epsilon in self.pairs:
            self._centre(clipped, density, epsilon)
        return clipped

    def _lower(self, genome: Genome, density: Slot | float, epsilon: Slot | float) -> None:
        if isinstance(epsilon, Slot):
            value = _value(genome, density)
            room = ROOM * min(value, 1 - value)
            genome[epsilon.gene] = max(
                self.genes[epsilon.gene].low, min(room, genome[epsilon.gene])
            )

    @staticmethod
    def _centre(genome: Genome, density: Slot | float, epsilon: Slot | float) -> None:
        if isinstance(density, Slot):
            margin = _value(genome, epsilon) / ROOM
            genome[density.gene] = min(max(genome[density.gene], margin), 1 - margin)

    def decode(self, genome: Genome) -> Recipe:
        """The recipe with the genes in their places."""
        return Recipe.model_validate(filled(self.template, genome.tolist()))

    def encode(self, recipe: Recipe) -> Genome | None:
        """The numbers in the places of the genes; None where one is missing."""
        genome = np.full(len(self.genes), np.nan)
        for gene, value in found(self.template, recipe.to_mapping()):
            genome[gene] = value
        return None if np.isnan(genome).any() else genome


@dataclass(frozen=True)
class Scene:
    """What a space is of: models by their folders, slices of layers, what all recipes say."""

    base_model: str
    models: tuple[str, ...]
    layers: tuple[Layers, ...]
    dtype: str
    tokenizer_source: str | None

    def to_plain(self) -> dict[str, object]:
        """The part of every recipe that does not depend on its method."""
        said = {"dtype": self.dtype, "tokenizer_source": self.tokenizer_source}
        return {key: value for key, value in said.items() if value is not None}


def numbers(config: SpaceConfig, scene: Scene) -> Numbers:
    """The space of `config`: its genes in the order slices, models, groups, parameters.

    In each slice the numbers that models have of their own come first, then, group by group, those
    that all share; after the last slice those that do not change from slice to slice, model by
    model, then the global ones.
    """
    grid = Grid(config.searched, scene.models, config.filters, scene.layers)
    cast = _cast(config, scene.base_model, scene.models)
    parameters = {**_ALWAYS_WRITTEN.get(config.merge_method, {}), **config.fixed}
    top = {"merge_method": config.merge_method, **scene.to_plain()}
    template = recipe_template(grid, cast, top, parameters, smooth=config.smooth)
    pairs = _pairs(config, grid) if is_della(config.rules) else ()
    return Numbers(grid.genes(), template, pairs=pairs)


def _cast(config: SpaceConfig, base_model: str, models: tuple[str, ...]) -> Cast:
    """Raises ConfigError where the method cannot take these models."""
    rules = config.rules
    fewest, most = rules.inputs
    if not fewest <= len(models) <= (most or len(models)):
        count = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        beside = " beside the base" if rules.base == "required" else ""
        noun = "model" if fewest == 1 else "models"
        raise ConfigError(f"models: {rules.name} merges {count} {noun}{beside}, not {len(models)}")
    among = base_model in models
    if rules.base == "required":
        if among:
            raise ConfigError(
                f"models: {base_model} is the base_model too; {rules.name} adds differences to the "
                "base, so name only the models that differ from it"
            )
        return Cast(models, base_model, base_model)
    if rules.base == "optional":
        # Naming a base turns these methods to differences from it.
        return Cast(models, None, None) if among else Cast(models, base_model, base_model)
    # Under models: a base that is not among them would be one more input, without a weight.
    return Cast(models, None, None if config.smooth and not among else base_model)


@dataclass(frozen=True)
class Grid:
    """Which searched number has which gene. Shape letters: S slices, M models, F groups."""

    searched: tuple[Searched, ...]
    models: tuple[str, ...]
    filters: tuple[str, ...]
    layers: tuple[Layers, ...]

    def places(self) -> Iterator[tuple[Searched, int | None, int | None, int | None]]:
        """(number, slice, model, group) gene by gene; None where all of them share the gene."""
        groups = range(len(self.filters) + 1)
        own, shared = self._of("slice", own=True), self._of("slice", own=False)
        for part in range(len(self.layers)):
            for model in range(len(self.models)):
                yield from ((one, part, model, group) for group in groups for one in own)
            yield from ((one, part, None, group) for group in groups for one in shared)
        for model in range(len(self.models)):
            yield from ((one, None, model, None) for one in self._of("model", own=True))
        everywhere = [one for one in self.searched if one.per == "global"]
        yield from ((one, None, None, None) for one in everywhere)

    def _of(self, per: Per, *, own: bool) -> list[Searched]:
        return [one for one in self.searched if one.per == per and one.parameter.own == own]

    @cached_property
    def _slots(self) -> dict[tuple[object, ...], Slot]:
        return {(one.name, *place): Slot(gene) for gene, (one, *place) in enumerate(self.places())}

    def slot(self, one: Searched, part: int, model: int | None, group: int) -> Slot:
        """Where the number stands for this slice, model and group."""
        if one.per == "slice":
            return self._slots[one.name, part, model if one.parameter.own else None, group]
        return self._slots[one.name, None, model if one.per == "model" else None, None]

    def genes(self) -> tuple[Gene, ...]:
        """The genes with their names: "layers 0-2 | expert | self_attn" (0 and 1, as in
        layer_range), and what they are unless all are weights.
        """
        only_weights = [one.name for one in self.searched] == ["weight"]
        return tuple(
            Gene(
                name=self._title(one.name, place, only_weights=only_weights),
                low=one.low,
                high=one.high,
                start=self._start(one),
                log=one.log,
                is_weight=one.name == "weight",
                place=(*self._words(place).items(), ("number", one.name)),
            )
            for one, *place in self.places()
        )

    def _title(self, name: str, place: list[int | None], *, only_weights: bool) -> str:
        words = self._words(place)
        titles = [f"layers {word}" if key == "layers" else word for key, word in words.items()]
        return " | ".join(titles if only_weights and titles else [*titles, name])

    def _words(self, place: list[int | None]) -> dict[str, str]:
        part, model, group = place
        words = {}
        if part is not None:
            words["layers"] = "{}-{}".format(*self.layers[part])
        if model is not None:
            words["model"] = short_names(self.models)[model]
        if group is not None and self.filters:
            words["group"] = (*self.filters, "rest")[group]
        return words

    def _start(self, one: Searched) -> float:
        if one.name == "weight" and one.asked_start is None:
            return min(max(1 / len(self.models), one.low), one.high)
        return one.start


def recipe_template(
    grid: Grid,
    cast: Cast,
    top: Mapping[str, object],
    parameters: Mapping[str, object],
    *,
    smooth: bool,
) -> dict[str, object]:
    """The recipe with slots, as slices with a number each, or models with gradients over them."""
    settings = _Settings(grid, smooth=smooth)
    everywhere = {**parameters, **settings.everywhere()}
    recipe = dict(top)
    if cast.named_base is not None:
        recipe["base_model"] = cast.named_base
    if smooth:
        return recipe | {
            "models": _inputs(cast, settings, 0, {}),
            "parameters": {**everywhere, **settings.shared(0)},
        }
    slices = [
        _with_parameters(
            {"sources": _inputs(cast, settings, part, {"layer_range": list(layers)})},
            settings.shared(part),
        )
        for part, layers in enumerate(grid.layers)
    ]
    return recipe | {"slices": slices, "parameters": everywhere}


def _inputs(
    cast: Cast, settings: _Settings, part: int, more: Mapping[str, object]
) -> list[dict[str, object]]:
    inputs = [
        _with_parameters({"model": name, **more}, settings.own(part, model))
        for model, name in enumerate(cast.models)
    ]
    return inputs if cast.base is None else [*inputs, {"model": cast.base, **more}]


def _with_parameters(
    level: Mapping[str, object], parameters: Mapping[str, object]
) -> dict[str, object]:
    return {**level, "parameters": dict(parameters)} if parameters else dict(level)


@dataclass(frozen=True)
class _Settings:
    """The searched numbers as a recipe says them, with slots for values."""

    grid: Grid
    smooth: bool

    def own(self, part: int, model: int) -> dict[str, object]:
        """What stands with a model."""
        own = [one for one in self.grid.searched if one.parameter.own and one.per != "global"]
        return {one.name: self._setting(one, part, model) for one in own}

    def shared(self, part: int) -> dict[str, object]:
        """What stands with a slice."""
        searched = self.grid.searched
        shared = [one for one in searched if one.per == "slice" and not one.parameter.own]
        return {one.name: self._setting(one, part, None) for one in shared}

    def everywhere(self) -> dict[str, object]:
        """What stands on top."""
        searched = [one for one in self.grid.searched if one.per == "global"]
        return {one.name: self.grid.slot(one, 0, None, 0) for one in searched}

    def _setting(self, one: Searched, part: int, model: int | None) -> object:
        if one.per == "model":
            return self.grid.slot(one, part, model, 0)
        *filtered, rest = (
            self._value(one, part, model, group) for group in range(len(self.grid.filters) + 1)
        )
        if not filtered:
            return rest
        conditions: list[object] = [
            {"filter": name, "value": value}
            for name, value in zip(self.grid.filters, filtered, strict=True)
        ]
        return [*conditions, {"value": rest}]

    def _value(self, one: Searched, part: int, model: int | None, group: int) -> object:
        parts = range(len(self.grid.layers)) if self.smooth else [part]
        values = [self.grid.slot(one, at, model, group) for at in parts]
        return values if len(values) > 1 else values[0]


def _pairs(config: SpaceConfig, grid: Grid) -> tuple[tuple[Slot | float, Slot | float], ...]:
    """Each (density, epsilon) that meet in a tensor, once."""
    searched = {one.name: one for one in grid.searched}
    meetings = [
        (part, model, group)
        for part in range(len(grid.layers))
        for model in range(len(grid.models))
        for group in range(len(grid.filters) + 1)
    ]

    def places(name: str) -> list[Slot | float]:
        if name in searched:
            return [grid.slot(searched[name], *meeting) for meeting in meetings]
        parameter = config.rules.parameter(name)
        assert parameter is not None
        assert parameter.default is not None
        return [float(config.fixed.get(name, parameter.default))] * len(meetings)

    return tuple(dict.fromkeys(zip(places("density"), places("epsilon"), strict=True)))


def _value(genome: Genome, place: Slot | float) -> float:
    return float(genome[place.gene]) if isinstance(place, Slot) else place


def short_names(models: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, where they tell the models apart."""
    short = tuple(PurePath(model).name for model in models)
    return short if len(set(short)) == len(short) else tuple(models)
