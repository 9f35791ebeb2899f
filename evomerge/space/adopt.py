"""Recipes from elsewhere as genomes: other cuts of the layers, other places of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.errors import ConfigError
from evomerge.merge_rules import Parameter
from evomerge.recipe import Recipe, Source
from evomerge.settings import Settings, resolve
from evomerge.space.genes import Gene, Genome
from evomerge.space.numbers import Numbers, short_names
from evomerge.space.space import SearchSpace

# What the space says of all its recipes, whatever a recipe from elsewhere says of it.
_OF_THE_SPACE = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")


def adopted(space: SearchSpace, recipe: Recipe) -> tuple[Genome, Recipe]:
    """A genome with the numbers of `recipe`, and the recipe that it should be the merge of.

    The latter is `recipe` with the space's dtype and tokenizer and its order of models. Its slices
    may be coarser than the space's, its tensor groups fewer, its numbers in other places. Raises
    ConfigError where the space has no such genome. Two recipes that say the same in other words
    cannot be told apart here: whoever has the models compares their plans.
    """
    fitting = _fitting(space, recipe)
    try:
        return space.encode(fitting), fitting
    except ConfigError:
        return _translated(space, fitting), fitting


def _fitting(space: SearchSpace, recipe: Recipe) -> Recipe:
    """The recipe as the space would say it, but for its numbers. ConfigError on other models."""
    if recipe.merge_method != space.config.merge_method:
        raise ConfigError(
            f"its merge_method is {recipe.merge_method}, the search's {space.config.merge_method}"
        )
    wanted = {space.base_model, *space.models}
    strangers = [name for name in recipe.model_names() if name not in wanted]
    missing = [name for name in space.models if name not in recipe.model_names()]
    if strangers or missing:
        raise ConfigError(
            f"it merges {', '.join(recipe.model_names())}; the search is over "
            f"{', '.join(dict.fromkeys((space.base_model, *space.models)))}"
        )
    mapping: dict[str, Any] = recipe.to_mapping()
    kept = {key: value for key, value in mapping.items() if key not in _OF_THE_SPACE}
    order = {name: place for place, name in enumerate((*space.models, space.base_model))}
    for level, key in (*((part, "sources") for part in kept.get("slices", ())), (kept, "models")):
        if key in level:
            level[key].sort(key=lambda source: order[source["model"]])
    whole = {key: value for key, value in space.whole.items() if key != "base_model"}
    return Recipe.model_validate({**kept, **whole})


def _translated(space: SearchSpace, recipe: Recipe) -> Genome:
    """The genome read from what the recipe says for each layer, model and group of tensors."""
    config = space.config
    if not isinstance(space.form, Numbers) or config.smooth:
        kind = "smooth numbers" if isinstance(space.form, Numbers) else "this kind"
        raise ConfigError(f"a search space of {kind} takes recipes of its very own shape only")
    reading = _Reading.of(recipe, space.num_layers)
    names = dict(zip(short_names(space.models), space.models, strict=True))
    mistakes: list[str] = []
    genome = np.full(space.dimension, np.nan)
    for index, gene in enumerate(space.form.genes):
        try:
            genome[index] = _value(gene, reading, names, space.num_layers)
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    return genome


def _value(gene: Gene, reading: _Reading, names: Mapping[str, str], num_layers: int) -> float:
    """What the recipe says of a gene. Raises ConfigError where that is not one number in bounds."""
    place = dict(gene.place)
    parameter = reading.recipe.rules.parameter(place["number"])
    assert parameter is not None
    first, end = map(int, place["layers"].split("-")) if "layers" in place else (0, num_layers)
    model = names[place["model"]] if "model" in place else None
    group = place.get("group", "rest")
    found = {
        reading.number(parameter, layer, model, "" if group == "rest" else group)
        for layer in range(first, end)
    }
    if len(found) > 1:
        raise ConfigError(f"{gene.name}: has {len(found)} different values in these layers")
    value = found.pop()
    if value is None:
        raise ConfigError(f"{gene.name}: the recipe does not say it")
    if not gene.low <= value <= gene.high:
        raise ConfigError(f"{gene.name}: {value:g} lies outside of [{gene.low:g}, {gene.high:g}]")
    return value


@dataclass(frozen=True)
class _Piece:
    """Layers [first, end) of the output: what each model says there, and what all share."""

    first: int
    end: int
    own: Mapping[str, Settings]
    shared: Sequence[Settings]


@dataclass(frozen=True)
class _Reading:
    """A recipe by layers."""

    recipe: Recipe
    pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, recipe: Recipe, num_layers: int) -> _Reading:
        """Raises ConfigError unless every layer of the output is made of that layer of models."""
        if recipe.modules is not None:
            raise ConfigError("it has modules, of which a search knows none")
        if recipe.models is not None:
            own = {one.model: one.parameters for one in recipe.models}
            return cls(recipe, (_Piece(0, num_layers, own, [recipe.parameters]),))
        pieces = []
        place = 0
        for part in recipe.slices or ():
            ranges = {source.layer_range for source in part.sources}
            first, end = part.sources[0].layer_range
            if ranges != {(place, end)}:
                raise ConfigError(f"its layers are stacked otherwise from layer {place} on")
            pieces.append(
                _Piece(first, end, _own(part.sources), [part.parameters, recipe.parameters])
            )
            place = end
        if place != num_layers:
            raise ConfigError(f"it has {place} layers, the models have {num_layers}")
        return cls(recipe, tuple(pieces))

    def number(
        self, parameter: Parameter, layer: int, model: str | None, tensor: str
    ) -> float | None:
        """The number for a layer, of a model or of all, in the tensors named so; None: unsaid."""
        piece = next(one for one in self.pieces if one.first <= layer < one.end)
        own = [] if model is None else [piece.own.get(model, {})]
        layers = piece.end - piece.first
        depth = (layer - piece.first) / (layers - 1) if layers > 1 else 1.0
        value = resolve([*own, *piece.shared], parameter, tensor, depth)
        value = parameter.default if value is None else value
        return None if value is None else float(value)


def _own(sources: Sequence[Source]) -> dict[str, Settings]:
    return {source.model: source.parameters for source in sources}
