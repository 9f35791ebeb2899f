"""What may vary in a search: genomes and the recipes they stand for.

A gene is one merge weight, in its own units; decoding copies the genes into a recipe, clipped to
their bounds, and computes nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe, Slice, Source
from evomerge.settings import Settings

# Shape letters: S = slices, M = models, F = filters and the rest; a genome has S·M·F genes.
Genome: TypeAlias = npt.NDArray[np.float64]
Bounds: TypeAlias = tuple[float, float]

DEFAULT_BOUNDS: dict[str, Bounds] = {"task_arithmetic": (-0.5, 2.0), "linear": (0.0, 1.0)}
_PARAMETERS: dict[str, dict[str, object]] = {
    "task_arithmetic": {"int8_mask": 1.0, "normalize": 0.0},
    "linear": {"normalize": 1.0},
}


class SpaceConfig(BaseModel):
    """The `search_space:` of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge_method: Literal["task_arithmetic", "linear"] = "task_arithmetic"
    layer_granularity: Annotated[int, Field(ge=0)] = 0
    filters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    weight: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> SpaceConfig:
        low, high = self.bounds
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"weight: [{low}, {high}] should be [low, high] with low < high")
        if len(set(self.filters)) < len(self.filters):
            raise ValueError(f"filters: {list(self.filters)} names one twice")
        return self

    @property
    def bounds(self) -> Bounds:
        """The lowest and the highest weight."""
        return self.weight or DEFAULT_BOUNDS[self.merge_method]


@dataclass(frozen=True)
class SearchSpace:
    """All recipes of one shape: a weight per slice of layers, model and tensor group."""

    config: SpaceConfig
    base_model: str
    models: tuple[str, ...]
    slices: tuple[tuple[int, int], ...]
    dtype: str

    @classmethod
    def build(
        cls,
        config: SpaceConfig,
        *,
        base_model: str,
        models: Sequence[str],
        num_layers: int,
        dtype: str,
    ) -> SearchSpace:
        """The space over `models`, whose `num_layers` layers are cut as `config` says.

        Raises ConfigError where the granularity does not divide the layers, a model is listed
        twice, or the base of task_arithmetic is among the models (its weight would do nothing).
        """
        _check_models(config.merge_method, base_model, models)
        step = config.layer_granularity or num_layers
        if num_layers % step:
            fitting = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ConfigError(
                f"search_space.layer_granularity: {step} does not divide the {num_layers} layers "
                f"of {base_model}; {', '.join(fitting)} would"
            )
        slices = tuple((first, first + step) for first in range(0, num_layers, step))
        return cls(config, base_model, tuple(models), slices, dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, M, F): slices, models, filters and the rest."""
        return len(self.slices), len(self.models), len(self.config.filters) + 1

    @property
    def dimension(self) -> int:
        """The number of genes."""
        return int(np.prod(self.shape))

    @property
    def low(self) -> Genome:
        """Each gene's lowest value."""
        return np.full(self.dimension, self.config.bounds[0])

    @property
    def high(self) -> Genome:
        """Each gene's highest value."""
        return np.full(self.dimension, self.config.bounds[1])

    @property
    def genes(self) -> tuple[str, ...]:
        """What each gene weighs: "layers 0-2 | expert | self_attn" (0 and 1, as in layer_range)."""
        groups = [f" | {name}" for name in (*self.config.filters, "rest")]
        if not self.config.filters:
            groups = [""]
        return tuple(
            f"layers {first}-{end} | {model}{group}"
            for first, end in self.slices
            for model in _short_names(self.models)
            for group in groups
        )

    def uniform(self, scale: float) -> Genome:
        """The genome whose weights are all `scale` (not clipped)."""
        return np.full(self.dimension, float(scale))

    def decode(self, genome: npt.ArrayLike) -> Recipe:
        """The recipe that a genome stands for, its weights clipped to the bounds."""
        genes = np.asarray(genome, dtype=np.float64)
        if genes.shape != (self.dimension,):
            raise ConfigError(
                f"a genome of this search space has {self.dimension} genes, not "
                f"{genes.size} in shape {genes.shape}"
            )
        weights_SMF = genes.clip(self.low, self.high).reshape(self.shape)
        return Recipe(
            base_model=self.base_model,
            dtype=self.dtype,
            merge_method=self.config.merge_method,
            parameters=dict(_PARAMETERS[self.config.merge_method]),
            slices=tuple(
                self._slice(layers, weights_MF)
                for layers, weights_MF in zip(self.slices, weights_SMF.tolist(), strict=True)
            ),
        )

    def encode(self, recipe: Recipe) -> Genome:
        """The genome that decodes to exactly `recipe`; ConfigError where there is none."""
        genes = [
            weight
            for part in recipe.slices or ()
            for source in part.sources
            for weight in _weights(source.parameters)
        ]
        if len(genes) != self.dimension or self.decode(genes) != recipe:
            raise ConfigError(
                f"the recipe is not one of this search space ({self.config.merge_method} over "
                f"{base_and_models(self)}, {len(self.slices)} slices, weights in "
                f"{list(self.config.bounds)})"
            )
        return np.array(genes, dtype=np.float64)

    def _slice(self, layers: tuple[int, int], weights_MF: list[list[float]]) -> Slice:
        sources = [
            Source(model=model, layer_range=layers, parameters={"weight": self._setting(weights_F)})
            for model, weights_F in zip(self.models, weights_MF, strict=True)
        ]
        if self.config.merge_method == "task_arithmetic":
            sources.append(Source(model=self.base_model, layer_range=layers))
        return Slice(sources=tuple(sources))

    def _setting(self, weights_F: list[float]) -> object:
        *filtered, rest = weights_F
        if not filtered:
            return rest
        conditions: list[dict[str, object]] = [
            {"filter": name, "value": weight}
            for name, weight in zip(self.config.filters, filtered, strict=True)
        ]
        return [*conditions, {"value": rest}]


def base_and_models(space: SearchSpace) -> str:
    """The models of a space, for messages."""
    return ", ".join((space.base_model, *space.models))


def _check_models(method: str, base_model: str, models: Sequence[str]) -> None:
    if not models:
        raise ConfigError("models: is empty; name at least one model to merge")
    repeated = [name for name, count in Counter(models).items() if count > 1]
    if repeated:
        raise ConfigError(f"models: {repeated[0]} is listed twice")
    if method == "task_arithmetic" and base_model in models:
        raise ConfigError(
            f"models: {base_model} is the base_model too; task_arithmetic adds differences to the "
            "base, so name only the models that differ from it"
        )


def _short_names(models: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, where they tell the models apart."""
    short = tuple(PurePath(model).name for model in models)
    return short if len(set(short)) == len(short) else tuple(models)


def _weights(parameters: Settings) -> list[float]:
    setting = parameters.get("weight", [])
    if isinstance(setting, list):
        values = [item.get("value") if isinstance(item, dict) else item for item in setting]
    else:
        values = [setting]
    return [float(value) for value in values if isinstance(value, float | int)]
