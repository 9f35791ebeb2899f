"""The `genome:` of a mergekit-evolve file as a search space, with that program's recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.merge_rules import METHODS
from evomerge.recipe import Recipe
from evomerge.space.config import Bounds, Searched, searched_number
from evomerge.space.genes import Gene, Genome, within_bounds
from evomerge.space.numbers import Cast, Grid, Layers, Numbers, Scene, recipe_template, short_names

# mergekit-evolve has no bounds. A number as large as this is none that a search comes to.
_ANY = 1000.0
_NORMALIZES = ("linear", "ties", "dare_ties")
_WITH_DENSITY = ("ties", "dare_ties")
_WITH_BASE = ("task_arithmetic", "ties", "dare_ties")


class GenomeConfig(BaseModel):
    """The `genome:` of a mergekit-evolve file: its keys, defaults and meaning.

    `normalize` None: as the method does there. Without `allow_negative_weights` the size of a
    number counts and its sign does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Annotated[str, Field(min_length=1)] | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    smooth: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> GenomeConfig:
        method, base = self.merge_method, self.base_model
        if method in _WITH_BASE and base is None:
            raise ValueError(f"{method} needs a base_model")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: one is listed twice")
        if len(set(self.filters or ())) < len(self.filters or ()):
            raise ValueError(f"filters: {list(self.filters or ())} names one twice")
        if method not in _WITH_BASE and base is not None and base not in self.models:
            # mergekit-evolve takes such a file, and mergekit then refuses each of its recipes.
            raise ValueError(
                f"base_model: {base} would be one more input of {method}, without a weight; leave "
                "it out, or list it under models"
            )
        known = ("base", "union", base, *self.models)
        if self.tokenizer_source is not None and self.tokenizer_source not in known:
            raise ValueError("tokenizer_source: is base, union, or one of the genome's models")
        if method == "slerp":
            self._check_slerp()
        return self

    def _check_slerp(self) -> None:
        if self.smooth or self.filters:
            raise ValueError("slerp takes neither smooth nor filters; leave them out")
        if len(self.models) < 2:
            raise ValueError("models: slerp needs at least two to choose from")

    @property
    def served(self) -> str:
        """The model that an engine starts with: the base, else the first."""
        return self.base_model or self.models[0]

    @property
    def normalizes(self) -> bool:
        """What the recipes say of `normalize`."""
        return self.merge_method in _NORMALIZES if self.normalize is None else self.normalize


@dataclass(frozen=True)
class LargestTwo:
    """mergekit-evolve's slerp: in each slice the two models with the largest genes, the larger one
    as the base.
    """

    genes: tuple[Gene, ...]
    config: GenomeConfig
    scene: Scene
    base: str | None

    def clip(self, genome: Genome) -> Genome:
        """Within the bounds."""
        return within_bounds(self.genes, genome)

    def decode(self, genome: Genome) -> Recipe:
        """t = softmax(the two genes) of the smaller; of equal genes the first one's model leads."""
        layers, models = self.scene.layers, self.scene.models
        genes_SM = genome.reshape(len(layers), len(models))  # S slices, M models
        recipe: dict[str, object] = {
            "merge_method": "slerp",
            "slices": [
                self._slice(part, genes_M) for part, genes_M in zip(layers, genes_SM, strict=True)
            ],
            "parameters": {"normalize": self.config.normalizes, "int8_mask": True},
            **self.scene.to_plain(),
        }
        return Recipe.model_validate(recipe | ({"base_model": self.base} if self.base else {}))

    def encode(self, recipe: Recipe) -> Genome | None:
        """None: what the other models' genes were is not in a recipe."""
        del recipe
        return None

    def _slice(self, layers: Layers, genes_M: Genome) -> dict[str, object]:
        larger, smaller = np.argsort(-genes_M, kind="stable")[:2].tolist()
        models = self.scene.models
        t = float(1 / (1 + np.exp(genes_M[larger] - genes_M[smaller])))
        sources: list[dict[str, object]] = [
            {"model": models[index], "layer_range": list(layers)} for index in (larger, smaller)
        ]
        if self.scene.tokenizer_source is not None:
            sources[0]["parameters"], sources[1]["parameters"] = {"weight": 1 - t}, {"weight": t}
        return {
            "sources": sources,
            "base_model": models[larger],
            "parameters": {"t": t},
        }


def evolve_shape(config: GenomeConfig, scene: Scene) -> Numbers | LargestTwo:
    """The space of `config`, whose base, or first model where it has none, is the scene's base."""
    base = scene.base_model if config.base_model is not None else None
    models, layers = scene.models, scene.layers
    if config.merge_method == "slerp":
        genes = tuple(
            Gene(
                f"layers {first}-{end} | {model}",
                -_ANY,
                _ANY,
                1 / len(models),
                is_weight=True,
                place=(("layers", f"{first}-{end}"), ("model", model)),
            )
            for first, end in layers
            for model in short_names(models)
        )
        return LargestTwo(genes, config, scene, base)
    grid = Grid(_searched(config, len(models)), models, config.filters or (), layers)
    template = recipe_template(
        grid,
        Cast(models, None if base in models else base, base),
        {"merge_method": config.merge_method, **scene.to_plain()},
        {"normalize": config.normalizes, "int8_mask": True},
        smooth=config.smooth,
    )
    absolute = tuple(
        gene
        for gene, (one, *_) in enumerate(grid.places())
        if one.name == "density" or not config.allow_negative_weights
    )
    return Numbers(grid.genes(), template, absolute=absolute)


def _searched(config: GenomeConfig, models: int) -> tuple[Searched, ...]:
    least = -_ANY if config.allow_negative_weights else 0.0
    bounds = {"weight": Bounds(low=least, high=_ANY, start=1 / models)}
    if config.merge_method in _WITH_DENSITY:
        bounds["density"] = Bounds(low=0.0, high=1.0, start=1.0)
    rules = METHODS[config.merge_method]
    return tuple(
        searched_number(one, bounds[one.name]) for one in rules.parameters if one.name in bounds
    )
