"""A recipe resolved against checkpoints: for each output tensor its sources, method and numbers.

The plan is made from headers alone, once per candidate on the driver's and on every worker's side;
equal plans have equal digests. The same plan fills a live engine and a directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from evomerge.errors import CandidateError, ConfigError, nearest
from evomerge.merge.architecture import Architecture, stacked_config
from evomerge.merge.blends import METHODS, Blend, recall_nothing
from evomerge.merge.chat_template import new_template
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.dtypes import DType, dtype_of, widest
from evomerge.merge.headers import TensorHeader
from evomerge.merge.tokenizer import different_tokenizers
from evomerge.merge_rules import MethodRules, Parameter
from evomerge.recipe import Body, Recipe, Slice, Source
from evomerge.settings import Settings, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merge.vocabulary import Vocabulary

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
# Equal shapes do not show these, and a mix of models that differ here computes nonsense.
_SHARED_CONFIG_KEYS = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")


Number: TypeAlias = float | int | bool | None


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a model: the model as the recipe names it, the tensor as its file does."""

    model: str
    name: str


@dataclass(frozen=True)
class PlanEntry:
    """One output tensor: what `merge.methods` makes of `inputs`, rounded once to `dtype`.

    Where the numbers of the tensors have no say, `numbers` is None and `method` an element-wise
    kernel with its `weights`: for task_arithmetic inputs[0] is the base, and weights[i] belongs to
    inputs[i + 1]; for linear weights[i] belongs to inputs[i]; for passthrough there is one input
    and no weight. Else `method` is a merge method and `numbers` its arguments by name; with
    `has_base` inputs[0] is the base, and tuples among them have a number for each other input.
    `by_token` says that there is a row for each token: the plan's vocabulary, if it has one, puts
    the inputs into its order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    method: str
    inputs: tuple[SourceTensor, ...]
    weights: tuple[float, ...]
    has_base: bool = False
    numbers: Mapping[str, Number | tuple[Number, ...]] | None = None
    by_token: bool = False

    @property
    def blend(self) -> Blend:
        """What `method` and `weights` are where `numbers` is None."""
        assert self.numbers is None
        return Blend(cast(Any, self.method), self.weights)


@dataclass(frozen=True)
class MergePlan:
    """All output tensors from input to output, and what the model is but for its tensors.

    `config` is the content of config.json; `donor` the model whose other files go with it, its
    tokenizer among them where `vocabulary` is None; `chat_template` replaces that of the tokenizer.
    `dtype` is the widest of the entries'; `digest` a hash of all this, the same in every process.
    """

    entries: tuple[PlanEntry, ...]
    config: Mapping[str, Any]
    donor: str
    vocabulary: Vocabulary | None
    chat_template: str | None
    dtype: DType
    digest: str

    def read_inputs(self, entry: PlanEntry, checkpoints: Mapping[str, Checkpoint]) -> list[Tensor]:
        """The tensors that go into `entry`, all of its shape; they must not be written to.

        They are mapped from their files; those of models whose tokens are others are no tensors
        but `AlignedRows`, which do as such where only ranges of them are read.
        """
        tensors = [checkpoints[source.model].read(source.name) for source in entry.inputs]
        if self.vocabulary is None or not self.makes_inputs(entry):
            return tensors
        models = [source.model for source in entry.inputs]
        return cast("list[Tensor]", self.vocabulary.aligned(models, tensors, entry.dtype.torch))

    def makes_inputs(self, entry: PlanEntry) -> bool:
        """Whether `entry` is made of other tensors than those in the files."""
        return self.vocabulary is not None and entry.by_token


def open_checkpoints(recipe: Recipe) -> dict[str, Checkpoint]:
    """The checkpoint of every model that a recipe names, by that name (a local directory)."""
    return {name: Checkpoint.open(Path(name)) for name in recipe.model_names()}


def make_plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], *, seed: int = 0) -> MergePlan:
    """What `recipe` makes of `checkpoints`, from their headers alone.

    `seed` decides what random methods draw, together with the output tensor's name. Raises
    ConfigError where recipe and checkpoints do not fit together, CandidateError where only the
    weights are at fault (not finite, or a sum near 0 that is to be normalised).
    """
    architectures = {name: _architecture(name, checkpoints) for name in recipe.model_names()}
    _refuse_mixed_models(architectures, checkpoints)
    donor = recipe.model_names()[0]
    vocabulary = _vocabulary(recipe, checkpoints)
    if vocabulary is not None and vocabulary.is_that_of(checkpoints[donor].directory):
        vocabulary = None
    parts = _parts(recipe, architectures, vocabulary)
    entries = _entries(parts, recipe, seed)
    dtype = widest(entry.dtype for entry in entries)
    config = _output_config(architectures[donor], parts, dtype)
    if vocabulary is not None:
        config = vocabulary.configured(config, donor)
    folders = [checkpoints[name].directory for name in recipe.model_names()]
    template = new_template(
        recipe.chat_template, folders, vocabulary.source if vocabulary else folders[0]
    )
    words = [vocabulary.digest if vocabulary else None, template]
    digest = _digest(entries, config, words)
    return MergePlan(entries, config, donor, vocabulary, template, dtype, digest)


def tokenizer_notes(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """What to warn of before a merge: a missing tokenizer, or tokens merged by number."""
    vocabulary = _vocabulary(recipe, checkpoints)
    if vocabulary is not None:
        return vocabulary.notes
    folders = {name: checkpoints[name].directory for name in recipe.model_names()}
    note = different_tokenizers(folders)
    return () if note is None else (note,)


def _vocabulary(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Vocabulary | None:
    """The vocabulary that `recipe` asks for; torch is imported for those that do."""
    if recipe.tokenizer is None and recipe.tokenizer_source is None:
        return None
    from evomerge.merge.vocabulary import build_vocabulary

    return build_vocabulary(recipe, checkpoints)


@dataclass(frozen=True)
class _Input:
    """A source tensor with the parameters of its source.

    `known_as` is the name that filters are looked for in: the output embeddings of a tied model are
    known by their usual name, though its file has them as input embeddings alone.
    """

    tensor: SourceTensor
    header: TensorHeader
    settings: Settings
    known_as: str


@dataclass(frozen=True)
class _Group:
    """The tensors that become one output tensor, before the weights are looked up.

    `inputs` are in the order of listing; `depth` is the place in [0, 1] where gradients are read;
    `shape` and `by_token` are the output's, as in a PlanEntry.
    """

    name: str
    shape: tuple[int, ...]
    by_token: bool
    inputs: tuple[_Input, ...]
    part: _Part
    depth: float


@dataclass(frozen=True)
class _Part:
    """A slice of the output: its sources, and which layers of the output it makes.

    `base` is the slice's base model, None where the method has none. With a `module` it is that
    one, whole, and makes no layers: a vision tower, an encoder.
    """

    sources: tuple[Source, ...]
    architectures: tuple[Architecture, ...]
    base: str | None
    levels: tuple[Settings, ...]
    where: str
    first_output_layer: int
    is_first: bool
    is_last: bool
    vocabulary: Vocabulary | None
    module: str | None = None

    @property
    def num_layers(self) -> int:
        return self.sources[0].num_layers

    @property
    def is_tied(self) -> bool:
        """Whether no source has output embeddings of its own; then a last part makes none."""
        return all(architecture.tied for architecture in self.architectures)

    def groups(self) -> Iterator[_Group]:
        """The output tensors of this part: the input side, the layers, the output side."""
        if self.module is not None:
            yield from self._module_groups(self.module)
            return
        if self.is_first:
            yield from self._outer_groups([a.before for a in self.architectures])
        for offset in range(self.num_layers):
            yield from self._layer_groups(offset)
        if self.is_last:
            yield from self._outer_groups([_without_head(a) for a in self.architectures])
            if not self.is_tied:
                head = next(a.head for a in self.architectures if not a.tied)
                yield from self._outer_groups([_head(a, head) for a in self.architectures])

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
            yield self._group(name, headers, 0.0, known_as=name)

    def _module_groups(self, module: str) -> Iterator[_Group]:
        """The tensors of a module, each at its depth in the module's own layers."""
        modules = [architecture.others[module] for architecture in self.architectures]
        for name, headers in self._matched([one.tensors for one in modules], module):
            yield self._group(name, headers, modules[0].depths[name])

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

    def _group(
        self,
        name: str,
        headers: Sequence[TensorHeader],
        depth: float,
        *,
        known_as: str | None = None,
    ) -> _Group:
        by_token = self.architectures[0].is_by_token(headers[0].name)
        shapes = {self._output_shape(header, by_token=by_token) for header in headers}
        if len(shapes) > 1:
            raise ConfigError(self._shape_message(name, headers))
        if by_token and self.vocabulary is not None:
            self.vocabulary.require(name, [source.model for source in self.sources])
        inputs = tuple(
            _Input(
                SourceTensor(source.model, header.name),
                header,
                source.parameters,
                known_as or header.name,
            )
            for source, header in zip(self.sources, headers, strict=True)
        )
        return _Group(name, shapes.pop(), by_token, inputs, self, depth)

    def _output_shape(self, header: TensorHeader, *, by_token: bool) -> tuple[int, ...]:
        if by_token and self.vocabulary is not None:
            return (self.vocabulary.size, *header.shape[1:])
        return header.shape

    def _shape_message(self, name: str, headers: Sequence[TensorHeader]) -> str:
        shapes = ", ".join(
            f"{list(header.shape)} in {source.model}"
            for source, header in zip(self.sources, headers, strict=True)
        )
        hint = ""
        if self.architectures[0].is_by_token(headers[0].name) and self.vocabulary is None:
            hint = (
                "; the models have vocabularies of different size: tokenizer_source: union (or "
                "base) merges them by token"
            )
        return f"{self.where}: {name} has different shapes: {shapes}{hint}"


def _parts(
    recipe: Recipe,
    architectures: Mapping[str, Architecture],
    vocabulary: Vocabulary | None,
) -> list[_Part]:
    """The slices of the language model's layers, then the other modules, if there are any."""
    model = next(iter(architectures.values()))
    bodies = _bodies(recipe, model)
    place, body = bodies.pop(model.main)
    slices = body.slices or (_models_as_slice(recipe, place, body, architectures),)
    _check_layer_ranges(
        f"{place}slices" if body.slices else f"{place}models", slices, architectures
    )
    parts: list[_Part] = []
    first_output_layer = 0
    for index, part in enumerate(slices):
        parts.append(
            _Part(
                sources=part.sources,
                architectures=tuple(architectures[source.model] for source in part.sources),
                base=recipe.base_of(part),
                levels=(part.parameters, body.parameters, recipe.parameters),
                where=f"{place}slices.{index}" if body.slices else f"{place}models",
                first_output_layer=first_output_layer,
                is_first=index == 0,
                is_last=index == len(slices) - 1,
                vocabulary=vocabulary,
            )
        )
        first_output_layer += part.sources[0].num_layers
    for module, (place, body) in bodies.items():
        whole = _models_as_slice(recipe, place, body, architectures)
        parts.append(
            replace(
                parts[0],
                sources=whole.sources,
                architectures=tuple(architectures[source.model] for source in whole.sources),
                base=recipe.base_of(None),
                levels=(body.parameters, recipe.parameters),
                where=f"{place}models",
                module=module,
            )
        )
    return parts


def _bodies(recipe: Recipe, model: Architecture) -> dict[str, tuple[str, Body]]:
    """What is merged for each module of a model, with its place in the file."""
    if recipe.modules is None:
        place, body = next(recipe.bodies())
        if body.slices and model.others:
            raise ConfigError(
                f"slices: these models have the modules {', '.join(model.module_names)}; write "
                f"modules: {{{model.main}: {{slices: …}}, {next(iter(model.others))}: {{models: …}}"
                ", …}"
            )
        return dict.fromkeys(model.module_names, (place, body))
    bodies = dict(zip(recipe.modules, recipe.bodies(), strict=True))
    mistakes = [
        f"modules.{name}: there is no such module{nearest(name, model.module_names)}"
        for name in bodies
        if name not in model.module_names
    ]
    mistakes += [
        f"modules: {name} is missing, which these models have; every module has to be merged"
        for name in model.module_names
        if name not in bodies
    ]
    mistakes += [
        f"modules.{name}: slices: only the layers of {model.main} can be stacked anew; write models"
        for name, (_, body) in bodies.items()
        if body.slices and name in model.others
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return bodies


def _models_as_slice(
    recipe: Recipe, place: str, body: Body, architectures: Mapping[str, Architecture]
) -> Slice:
    """Whole models as one slice; as in mergekit a base that is not listed comes last."""
    assert body.models is not None
    names = [model.model for model in body.models]
    names += [recipe.base_model] if recipe.base_model else []
    counts = {name: architectures[name].num_layers for name in names}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise ConfigError(f"{place}models: the numbers of layers differ: {listed}; use slices")
    layers = (0, next(iter(counts.values())))
    settings = {model.model: model.parameters for model in body.models}
    if recipe.base_model and recipe.merge_method != "passthrough":
        settings.setdefault(recipe.base_model, {})
    return Slice(
        sources=tuple(
            Source(model=name, layer_range=layers, parameters=dict(own))
            for name, own in settings.items()
        )
    )


def _check_layer_ranges(
    place: str, slices: Sequence[Slice], architectures: Mapping[str, Architecture]
) -> None:
    mistakes = [
        f"{place}.{number}: layer_range {list(source.layer_range)} exceeds {source.model}, which "
        f"has {available} layers (0–{available - 1})"
        for number, part in enumerate(slices)
        for source in part.sources
        if source.layer_range[1] > (available := architectures[source.model].num_layers)
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


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
            values = [architectures[model].said(key) for model in (first, name)]
            if None not in values and values[0] != values[1]:
                raise ConfigError(
                    f"{checkpoints[name].directory / 'config.json'}: {key}: {values[1]!r}, but "
                    f"{first} has {values[0]!r}; models of one architecture and shape can be merged"
                )
        if set(architectures[name].module_names) != set(architectures[first].module_names):
            raise ConfigError(
                f"{checkpoints[name].directory}: has the modules "
                f"{', '.join(architectures[name].module_names)}, but {first} has "
                f"{', '.join(architectures[first].module_names)}"
            )
        if architectures[name].stack != architectures[first].stack:
            raise ConfigError(
                f"{checkpoints[name].directory}: names its layers {architectures[name].stack}.0 …, "
                f"but {first} {architectures[first].stack}.0 …"
            )


def _without_head(architecture: Architecture) -> dict[str, TensorHeader]:
    after = architecture.after.items()
    return {name: header for name, header in after if name != architecture.head}


def _head(architecture: Architecture, name: str) -> dict[str, TensorHeader]:
    """The output embeddings, by `name`: a tied model's are its input embeddings."""
    if architecture.tied:
        return {name: architecture.embedding_header}
    return {architecture.head: architecture.after[architecture.head]}


def _entries(parts: Sequence[_Part], recipe: Recipe, seed: int) -> tuple[PlanEntry, ...]:
    """What makes each tensor; raises ConfigError with the first mistake of every part."""
    entries: list[PlanEntry] = []
    mistakes: list[str] = []
    for part in parts:
        try:
            entries += [_entry(group, recipe, seed) for group in part.groups()]
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return tuple(entries)


def _entry(group: _Group, recipe: Recipe, seed: int) -> PlanEntry:
    rules = recipe.rules
    base = [one.tensor for one in group.inputs if one.tensor.model == group.part.base]
    others = [one for one in group.inputs if one.tensor.model != group.part.base]
    inputs = (*base, *(one.tensor for one in others))
    entry = partial(
        PlanEntry,
        name=group.name,
        shape=group.shape,
        dtype=_dtype(group, recipe),
        inputs=inputs,
        by_token=group.by_token,
    )
    if not others:  # nothing to compare the base with
        return entry(method="passthrough", weights=())
    numbers = _numbers(group, rules, others)
    for name, value in numbers.items():
        for number in value if isinstance(value, tuple) else [value]:
            _require_float32(group, name.removesuffix("_"), number or 0.0)
    if rules.whole:
        if rules.random:
            numbers["seed"] = _tensor_seed(seed, group.name)
        return entry(method=recipe.merge_method, weights=(), has_base=bool(base), numbers=numbers)
    blend = _blend(group, recipe.merge_method, numbers)
    return entry(method=blend.kernel, weights=blend.weights)


def _blend(group: _Group, method: str, numbers: Mapping[str, Number | tuple[Number, ...]]) -> Blend:
    """What is left of a method that does not look at the tensors."""
    try:
        blend = _method(method)(None, (), recall=recall_nothing, **numbers)
    except ValueError as error:
        raise CandidateError(f"{group.name}: {error}") from error
    assert isinstance(blend, Blend)
    for weight in blend.weights:
        _require_float32(group, "weight", weight)
    return blend


def _method(name: str) -> Callable[..., Any]:
    if name not in METHODS:
        import evomerge.merge.methods  # noqa: F401  (enters the others)
    return METHODS[name]


def _numbers(
    group: _Group,
    rules: MethodRules,
    inputs: Sequence[_Input],
) -> dict[str, Number | tuple[Number, ...]]:
    """The arguments of the method for this tensor, by the names that its function has."""
    numbers: dict[str, Number | tuple[Number, ...]] = {}
    for parameter in rules.parameters:
        keyword = "lambda_" if parameter.name == "lambda" else parameter.name
        if parameter.own:
            numbers[keyword] = tuple(_own_number(group, parameter, one) for one in inputs)
        else:
            numbers[keyword] = _shared_number(group, rules, parameter)
    return numbers


def _own_number(group: _Group, parameter: Parameter, one: _Input) -> Number:
    """The number of one source; filters look into the name that the tensor has there."""
    levels = (one.settings, *group.part.levels)
    value = resolve(levels, parameter, one.known_as, group.depth)
    if value is None and parameter.required:
        raise ConfigError(
            f"{group.part.where}: {one.tensor.model} has no {parameter.name} for {one.known_as}"
        )
    return _whole_if_asked(group, parameter, value)


def _shared_number(group: _Group, rules: MethodRules, parameter: Parameter) -> Number:
    """The number for all sources together; filters look into the name of the output."""
    value = resolve(group.part.levels, parameter, group.name, group.depth)
    if value is None and parameter.required:
        raise ConfigError(
            f"{group.part.where}: {rules.name} needs {parameter.name}, and there is none for "
            f"{group.name}"
        )
    return _whole_if_asked(group, parameter, value)


def _whole_if_asked(group: _Group, parameter: Parameter, value: float | bool | None) -> Number:
    """The value, the default for None; ConfigError for parts of a whole number (of a gradient)."""
    if value is None or parameter.kind is not int:
        return parameter.default if value is None else value
    if not float(value).is_integer():
        raise ConfigError(
            f"{group.part.where}: {parameter.name}: {value} for {group.name} should be a whole "
            "number"
        )
    return int(value)


def _require_float32(group: _Group, what: str, number: float) -> None:
    if not abs(number) <= _LARGEST_FLOAT32:
        raise CandidateError(f"{group.name}: {what} {number} is not a finite float32 number")


def _tensor_seed(seed: int, name: str) -> int:
    """What a random method draws from for one output tensor, whichever worker makes it when."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


def _dtype(group: _Group, recipe: Recipe) -> DType:
    name = recipe.out_dtype or recipe.dtype
    return widest(one.header.dtype for one in group.inputs) if name is None else dtype_of(name)


def _output_config(donor: Architecture, parts: Sequence[_Part], dtype: DType) -> dict[str, Any]:
    """The donor's config with the output's dtype, layers and tied embeddings."""
    stack = [part for part in parts if part.module is None]
    origins = [
        (part.architectures[0], index)
        for part in stack
        for index in range(*part.sources[0].layer_range)
    ]
    stacked = stacked_config(donor, origins, tied=stack[-1].is_tied)
    config = {key: value for key, value in stacked.items() if key not in _NOT_THE_OUTPUTS}
    config["dtype"] = dtype.name
    return config


# `torch_dtype` is an older name of `dtype`, `_name_or_path` the donor's own.
_NOT_THE_OUTPUTS = ("torch_dtype", "_name_or_path")


def _digest(
    entries: Sequence[PlanEntry], config: Mapping[str, Any], words: Sequence[str | None]
) -> str:
    plain = [
        [
            *(e.name, e.shape, str(e.dtype), e.method, [[t.model, t.name] for t in e.inputs]),
            *(e.weights, e.has_base, e.numbers),
        ]
        for e in entries
    ]
    return hashlib.sha256(json.dumps([plain, config, words], sort_keys=True).encode()).hexdigest()
