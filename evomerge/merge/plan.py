"""A recipe resolved against checkpoints: for each output tensor its sources, method and weights.

The plan is made from headers alone, once per candidate on the driver's and on every worker's side;
equal plans have equal digests. The same plan fills a live engine and a directory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.architecture import HEAD, Architecture
from evomerge.merge.checkpoint import Checkpoint, TensorHeader
from evomerge.recipe import (
    METHODS_WITH_BASE,
    Recipe,
    Settings,
    Slice,
    Source,
    resolve_bool,
    resolve_float,
)

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
# As mergekit: a smaller sum of weights is no divisor. For linear there is then no model.
_SMALLEST_SUM = 1e-8
# Equal shapes do not show these, and a mix of models that differ here computes nonsense.
_SHARED_CONFIG_KEYS = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a model: the model as the recipe names it, the tensor as its file does."""

    model: str
    name: str


@dataclass(frozen=True)
class PlanEntry:
    """One output tensor: `method` of `merge.methods` over `inputs`, rounded once to `dtype`.

    For task_arithmetic inputs[0] is the base, and weights[i] belongs to inputs[i + 1]; for linear
    weights[i] belongs to inputs[i]; for passthrough there is one input and no weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: str
    inputs: tuple[SourceTensor, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class MergePlan:
    """All output tensors from input to output, and what the model is but for its tensors.

    `config` is the content of config.json; `donor` the model whose tokenizer files go with it;
    `dtype` the widest of the entries'; `digest` a hash of entries and config, the same in every
    process.
    """

    entries: tuple[PlanEntry, ...]
    config: Mapping[str, Any]
    donor: str
    dtype: torch.dtype
    digest: str


def open_checkpoints(recipe: Recipe) -> dict[str, Checkpoint]:
    """The checkpoint of every model that a recipe names, by that name (a local directory)."""
    return {name: Checkpoint.open(Path(name)) for name in recipe.model_names()}


def make_plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
    """What `recipe` makes of `checkpoints`, from their headers alone.

    Raises ConfigError where recipe and checkpoints do not fit together, CandidateError where only
    the weights are at fault (not finite, or a sum near 0 that is to be normalised).
    """
    architectures = {name: _architecture(name, checkpoints) for name in recipe.model_names()}
    _refuse_mixed_models(architectures, checkpoints)
    parts = _parts(recipe, architectures)
    groups = [group for part in parts for group in part.groups()]
    entries = tuple(_entry(group, recipe) for group in groups)
    dtype = reduce(torch.promote_types, (entry.dtype for entry in entries))
    donor = recipe.model_names()[0]
    config = _output_config(checkpoints[donor].config, parts, dtype, checkpoints)
    return MergePlan(entries, config, donor, dtype, _digest(entries, config))


@dataclass(frozen=True)
class _Group:
    """The tensors that become one output tensor, before the weights are looked up.

    `inputs` are the source tensors with their shape and the parameters of their source, in the
    order of listing; `depth` is the place in [0, 1] where gradients are read.
    """

    name: str
    inputs: tuple[tuple[SourceTensor, TensorHeader, Settings], ...]
    part: _Part
    depth: float


@dataclass(frozen=True)
class _Part:
    """A slice of the output: its sources, and which layers of the output it makes.

    `base` is the slice's base model, None where the method has none.
    """

    sources: tuple[Source, ...]
    architectures: tuple[Architecture, ...]
    base: str | None
    levels: tuple[Settings, ...]
    where: str
    first_output_layer: int
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        return self.sources[0].num_layers

    @property
    def is_tied(self) -> bool:
        """Whether no source has output embeddings of its own; then a last part makes none."""
        return all(architecture.tied for architecture in self.architectures)

    def groups(self) -> Iterator[_Group]:
        """The output tensors of this part: the input side, the layers, the output side."""
        if self.is_first:
            yield from self._outer_groups([a.before for a in self.architectures])
        for offset in range(self.num_layers):
            yield from self._layer_groups(offset)
        if self.is_last:
            yield from self._outer_groups([_without_head(a) for a in self.architectures])
            if not self.is_tied:
                yield from self._outer_groups([_head(a) for a in self.architectures])

    def _layer_groups(self, offset: int) -> Iterator[_Group]:
        stack = self.architectures[0].stack
        number = self.first_output_layer + offset
        depth = offset / (self.num_layers - 1) if self.num_layers > 1 else 1.0
        layers = [
            architecture.layers[source.layer_range[0] + offset]
            for source, architecture in zip(self.sources, self.architectures, strict=True)
        ]
        for rest, headers in self._matched(layers, f"output layer {number}"):
            yield self._group(f"{stack}.{number}.{rest}", headers, depth)

    def _outer_groups(self, tensors: Sequence[Mapping[str, TensorHeader]]) -> Iterator[_Group]:
        for name, headers in self._matched(tensors, "the tensors outside of the layers"):
            yield self._group(name, headers, 0.0)

    def _matched(
        self, tensors: Sequence[Mapping[str, TensorHeader]], place: str
    ) -> Iterator[tuple[str, list[TensorHeader]]]:
        """The sources' tensors by name, in the first source's order; all must have the same."""
        names = tensors[0]
        for source, others in zip(self.sources[1:], tensors[1:], strict=True):
            if others.keys() != names.keys():
                different = sorted(others.keys() ^ names.keys())
                owner = source.model if different[0] in others else self.sources[0].model
                raise ConfigError(
                    f"{self.where}: the models have different tensors in {place}: {different[0]} "
                    f"is only in {owner}"
                )
        for name in names:
            yield name, [by_name[name] for by_name in tensors]

    def _group(self, name: str, headers: Sequence[TensorHeader], depth: float) -> _Group:
        shapes = {header.shape for header in headers}
        if len(shapes) > 1:
            raise ConfigError(self._shape_message(name, headers))
        inputs = tuple(
            (SourceTensor(source.model, header.name), header, source.parameters)
            for source, header in zip(self.sources, headers, strict=True)
        )
        return _Group(name, inputs, self, depth)

    def _shape_message(self, name: str, headers: Sequence[TensorHeader]) -> str:
        shapes = ", ".join(
            f"{list(header.shape)} in {source.model}"
            for source, header in zip(self.sources, headers, strict=True)
        )
        hint = ""
        if name in (HEAD, self.architectures[0].embedding):
            hint = "; the models have vocabularies of different size"
        return f"{self.where}: {name} has different shapes: {shapes}{hint}"


def _parts(recipe: Recipe, architectures: Mapping[str, Architecture]) -> list[_Part]:
    slices = recipe.slices or (_models_as_slice(recipe, architectures),)
    parts: list[_Part] = []
    first_output_layer = 0
    for index, part in enumerate(slices):
        where = f"slices.{index}" if recipe.slices else "models"
        _check_layer_ranges(part, architectures, where)
        parts.append(
            _Part(
                sources=part.sources,
                architectures=tuple(architectures[source.model] for source in part.sources),
                base=_base(recipe, part),
                levels=(part.parameters, recipe.parameters),
                where=where,
                first_output_layer=first_output_layer,
                is_first=index == 0,
                is_last=index == len(slices) - 1,
            )
        )
        first_output_layer += part.sources[0].num_layers
    return parts


def _base(recipe: Recipe, part: Slice) -> str | None:
    if recipe.merge_method not in METHODS_WITH_BASE:
        return None
    return part.base_model or recipe.base_model


def _models_as_slice(recipe: Recipe, architectures: Mapping[str, Architecture]) -> Slice:
    """Whole models as one slice; as in mergekit a base that is not listed comes last."""
    assert recipe.models is not None
    counts = {name: architectures[name].num_layers for name in recipe.model_names()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise ConfigError(f"models: the numbers of layers differ: {listed}; use slices")
    layers = (0, next(iter(counts.values())))
    settings = {model.model: model.parameters for model in recipe.models}
    if recipe.base_model and recipe.merge_method != "passthrough":
        settings.setdefault(recipe.base_model, {})
    return Slice(
        sources=tuple(
            Source(model=name, layer_range=layers, parameters=dict(own))
            for name, own in settings.items()
        )
    )


def _check_layer_ranges(part: Slice, architectures: Mapping[str, Architecture], where: str) -> None:
    for source in part.sources:
        available = architectures[source.model].num_layers
        if source.layer_range[1] > available:
            raise ConfigError(
                f"{where}: layer_range {list(source.layer_range)} exceeds {source.model}, "
                f"which has {available} layers (0–{available - 1})"
            )


def _architecture(name: str, checkpoints: Mapping[str, Checkpoint]) -> Architecture:
    if name not in checkpoints:
        raise ConfigError(f"{name}: is not among the models {', '.join(checkpoints)}")
    return checkpoints[name].architecture


def _refuse_mixed_models(
    architectures: Mapping[str, Architecture], checkpoints: Mapping[str, Checkpoint]
) -> None:
    """Raises ConfigError where a model is of another kind than the first one."""
    first, *others = architectures
    for name in others:
        for key in ("architectures", *_SHARED_CONFIG_KEYS):
            values = checkpoints[first].config.get(key), checkpoints[name].config.get(key)
            if None not in values and values[0] != values[1]:
                raise ConfigError(
                    f"{checkpoints[name].directory / 'config.json'}: {key}: {values[1]!r}, but "
                    f"{first} has {values[0]!r}; models of one architecture and shape can be merged"
                )
        if architectures[name].stack != architectures[first].stack:
            raise ConfigError(
                f"{checkpoints[name].directory}: names its layers {architectures[name].stack}.0 …, "
                f"but {first} {architectures[first].stack}.0 …"
            )


def _without_head(architecture: Architecture) -> dict[str, TensorHeader]:
    return {name: header for name, header in architecture.after.items() if name != HEAD}


def _head(architecture: Architecture) -> dict[str, TensorHeader]:
    """The output embeddings: a tied model's are its input embeddings."""
    if architecture.tied:
        return {HEAD: architecture.before[architecture.embedding]}
    return {name: header for name, header in architecture.after.items() if name == HEAD}


def _entry(group: _Group, recipe: Recipe) -> PlanEntry:
    method, inputs, weights = _METHODS[recipe.merge_method](group)
    for weight in weights:
        if not abs(weight) <= _LARGEST_FLOAT32:
            raise CandidateError(f"{group.name}: weight {weight} is not a finite float32 number")
    header = group.inputs[0][1]
    return PlanEntry(group.name, header.shape, _dtype(group, recipe), method, inputs, weights)


def _task_arithmetic(
    group: _Group,
) -> tuple[str, tuple[SourceTensor, ...], tuple[float, ...]]:
    """Inputs with the base first; lambda and normalize are folded into the weights (float64)."""
    base = next(tensor for tensor, _, _ in group.inputs if tensor.model == group.part.base)
    tuned = [entry for entry in group.inputs if entry[0].model != group.part.base]
    if not tuned:
        return "passthrough", (base,), ()
    weights = [_own_weight(group, tensor, own) for tensor, _, own in tuned]
    total = math.fsum(weights) if _flag(group, "normalize", default=False) else 1.0
    factor = resolve_float(group.part.levels, "lambda", group.name, group.depth)
    scale = (1.0 if factor is None else factor) / (total if abs(total) >= _SMALLEST_SUM else 1.0)
    if scale != 1.0:
        weights = [weight * scale for weight in weights]
    return "task_arithmetic", (base, *(tensor for tensor, _, _ in tuned)), tuple(weights)


def _linear(group: _Group) -> tuple[str, tuple[SourceTensor, ...], tuple[float, ...]]:
    """Inputs in the order of listing; normalized weights are divided by their sum (float64)."""
    weights = [_own_weight(group, tensor, own) for tensor, _, own in group.inputs]
    if _flag(group, "normalize", default=True):
        total = math.fsum(weights)
        if not abs(total) >= _SMALLEST_SUM:
            raise CandidateError(f"{group.name}: weights that sum to {total} cannot be normalised")
        weights = [weight / total for weight in weights]
    return "linear", tuple(tensor for tensor, _, _ in group.inputs), tuple(weights)


def _passthrough(group: _Group) -> tuple[str, tuple[SourceTensor, ...], tuple[float, ...]]:
    """The one input; mergekit's `scale`, where given, makes it a linear merge of one."""
    ((tensor, _, own),) = group.inputs
    scale = resolve_float((own, *group.part.levels), "scale", tensor.name, group.depth)
    if scale is None or scale == 1.0:
        return "passthrough", (tensor,), ()
    return "linear", (tensor,), (scale,)


_METHODS = {
    "task_arithmetic": _task_arithmetic,
    "linear": _linear,
    "passthrough": _passthrough,
}


def _own_weight(group: _Group, tensor: SourceTensor, own: Settings) -> float:
    """The weight of one source; filters look into the name that the tensor has there."""
    weight = resolve_float((own, *group.part.levels), "weight", tensor.name, group.depth)
    if weight is None:
        raise ConfigError(f"{group.part.where}: {tensor.model} has no weight for {tensor.name}")
    return weight


def _flag(group: _Group, parameter: str, *, default: bool) -> bool:
    flag = resolve_bool(group.part.levels, parameter, group.name, group.depth)
    return default if flag is None else flag


def _dtype(group: _Group, recipe: Recipe) -> torch.dtype:
    name = recipe.out_dtype or recipe.dtype
    if name is not None:
        dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
        return dtype
    return reduce(torch.promote_types, (header.dtype for _, header, _ in group.inputs))


def _output_config(
    donor_config: Mapping[str, Any],
    parts: Sequence[_Part],
    dtype: torch.dtype,
    checkpoints: Mapping[str, Checkpoint],
) -> dict[str, Any]:
    """The donor's config with the output's dtype, layers and tied embeddings."""
    config = {key: value for key, value in donor_config.items() if key not in _NOT_THE_OUTPUTS}
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = parts[-1].is_tied
    config[parts[0].architectures[0].layer_count_key] = sum(part.num_layers for part in parts)
    if "layer_types" in config:  # one word per layer: restacked as the layers are
        firsts = [part.sources[0] for part in parts]
        config["layer_types"] = [
            checkpoints[source.model].config.get("layer_types", config["layer_types"])[index]
            for source in firsts
            for index in range(*source.layer_range)
        ]
    return config


# `torch_dtype` is an older name of `dtype`, `_name_or_path` the donor's own.
_NOT_THE_OUTPUTS = ("torch_dtype", "_name_or_path")


def _digest(entries: Sequence[PlanEntry], config: Mapping[str, Any]) -> str:
    plain = [
        [e.name, e.shape, str(e.dtype), e.method, [[t.model, t.name] for t in e.inputs], e.weights]
        for e in entries
    ]
    return hashlib.sha256(json.dumps([plain, config], sort_keys=True).encode()).hexdigest()
