"""The search space of a study: genomes and the recipes that they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evomerge.errors import CandidateError, ConfigError
from evomerge.recipe import Recipe
from evomerge.space.config import SpaceConfig
from evomerge.space.evolve import GenomeConfig, evolve_shape
from evomerge.space.genes import Genome, Shape
from evomerge.space.numbers import Layers, Scene, numbers
from evomerge.space.stack import stack


@dataclass(frozen=True)
class SearchSpace:
    """All recipes of one shape. `num_layers` are those of each model, `base_model` among them."""

    config: SpaceConfig | GenomeConfig
    base_model: str
    models: tuple[str, ...]
    num_layers: int
    dtype: str
    form: Shape

    @classmethod
    def build(
        cls,
        config: SpaceConfig | GenomeConfig,
        *,
        base_model: str,
        models: Sequence[str],
        num_layers: int,
        dtype: str,
    ) -> SearchSpace:
        """The space over `models`, whose `num_layers` layers are cut as `config` says.

        Raises ConfigError where the granularity does not divide the layers, a model is listed
        twice, there are more or fewer than the method takes, or the base of a method that adds
        differences to it is among the models (its own numbers would do nothing).
        """
        _check_models(models)
        form = _form(config, base_model, models, num_layers, dtype)
        return cls(config, base_model, tuple(models), num_layers, dtype, form)

    @property
    def whole(self) -> dict[str, object]:
        """What every recipe of the search says, the baselines' too."""
        said: dict[str, object] = {"dtype": self.dtype}
        source = _tokenizer_source(self.config, self.base_model, self.models)
        if source is not None:
            said |= {"tokenizer_source": source, "base_model": self.base_model}
        return said

    @property
    def dimension(self) -> int:
        """The number of genes."""
        return len(self.form.genes)

    @property
    def low(self) -> Genome:
        """Each gene's lowest value."""
        return np.array([gene.low for gene in self.form.genes])

    @property
    def high(self) -> Genome:
        """Each gene's highest value."""
        return np.array([gene.high for gene in self.form.genes])

    @property
    def start(self) -> Genome:
        """Where a search begins, within the bounds."""
        return np.array([gene.start for gene in self.form.genes])

    @property
    def steps(self) -> Genome:
        """What one unit of the sampler's step is for each gene (`Gene.step`)."""
        return np.array([gene.step for gene in self.form.genes])

    @property
    def logarithmic(self) -> npt.NDArray[np.bool_]:
        """Which genes a sampler moves in their logarithm."""
        return np.array([gene.log for gene in self.form.genes], dtype=np.bool_)

    @property
    def genes(self) -> tuple[str, ...]:
        """What each gene is: "layers 0-2 | expert | self_attn" (0 and 1, as in layer_range)."""
        return tuple(gene.name for gene in self.form.genes)

    def uniform(self, weight: float) -> Genome:
        """The genome whose weights are all `weight`, not clipped, and all else as at the start."""
        genes = self.form.genes
        return np.array([float(weight) if gene.is_weight else gene.start for gene in genes])

    def uniform_recipe(self) -> Recipe:
        """The merge whose weights are all 1 / number of models, also where the bounds exclude that.

        What is no weight is as the search starts: a stack is the first model as it is.
        """
        genome = self.clip(self.start)
        weights = np.array([gene.is_weight for gene in self.form.genes], dtype=np.bool_)
        genome[weights] = 1 / len(self.models)
        return self.form.decode(genome)

    def clip(self, genome: npt.ArrayLike) -> Genome:
        """The genome that counts: each gene at its nearest allowed value.

        Raises ConfigError where it has another number of genes.
        """
        genes = np.asarray(genome, dtype=np.float64)
        if genes.shape != (self.dimension,):
            raise ConfigError(
                f"a genome of this search space has {self.dimension} genes, not "
                f"{genes.size} in shape {genes.shape}"
            )
        return self.form.clip(genes)

    def decode(self, genome: npt.ArrayLike) -> Recipe:
        """The recipe that a genome stands for, clipped. Raises CandidateError where it has none."""
        return self.form.decode(self.clip(genome))

    def encode(self, recipe: Recipe) -> Genome:
        """A genome that decodes to exactly `recipe`; ConfigError where there is none."""
        genome = self.form.encode(recipe)
        if genome is None or not self._is_of(genome, recipe):
            raise ConfigError(
                f"the recipe is not one of this search space ({self.config.merge_method} over "
                f"{base_and_models(self)}, {self.dimension} genes within their bounds)"
            )
        return genome

    def _is_of(self, genome: Genome, recipe: Recipe) -> bool:
        try:
            return self.decode(genome).to_mapping() == recipe.to_mapping()
        except CandidateError:
            return False


def base_and_models(space: SearchSpace) -> str:
    """The models of a space, for messages."""
    return ", ".join((space.base_model, *space.models))


def _form(
    config: SpaceConfig | GenomeConfig,
    base_model: str,
    models: Sequence[str],
    num_layers: int,
    dtype: str,
) -> Shape:
    tokenizer = _tokenizer_source(config, base_model, models)
    if isinstance(config, SpaceConfig) and config.stack is not None:
        return stack(
            config.stack,
            base_model=base_model,
            models=models,
            num_layers=num_layers,
            dtype=dtype,
            tokenizer_source=tokenizer,
        )
    layers = _slices(config, base_model, num_layers)
    scene = Scene(base_model, tuple(models), layers, dtype, tokenizer)
    if isinstance(config, GenomeConfig):
        return evolve_shape(config, scene)
    return numbers(config, scene)


def _tokenizer_source(
    config: SpaceConfig | GenomeConfig, base_model: str, models: Sequence[str]
) -> str | None:
    """ "base", "union" or a folder; None where all models have one vocabulary."""
    source = config.tokenizer_source
    if source is None or not isinstance(config, GenomeConfig):
        return source
    folders = {config.served: base_model, **dict(zip(config.models, models, strict=True))}
    return folders.get(source, source)


def _slices(
    config: SpaceConfig | GenomeConfig, base_model: str, num_layers: int
) -> tuple[Layers, ...]:
    step = config.layer_granularity if config.layer_granularity > 0 else num_layers
    if num_layers % step:
        key = "genome" if isinstance(config, GenomeConfig) else "search_space"
        fitting = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ConfigError(
            f"{key}.layer_granularity: {step} does not divide the {num_layers} layers "
            f"of {base_model}; {', '.join(fitting)} would"
        )
    return tuple((first, first + step) for first in range(0, num_layers, step))


def _check_models(models: Sequence[str]) -> None:
    if not models:
        raise ConfigError("models: is empty; name at least one model to merge")
    repeated = [name for name, count in Counter(models).items() if count > 1]
    if repeated:
        raise ConfigError(f"models: {repeated[0]} is listed twice")
