"""Recipes: mergekit's YAML format, read strictly and written exactly.

A recipe says which models become one model: merge method, slices (or whole models), parameters,
dtype. Numbers stay as they were written; their meaning for one tensor is found by `resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigError, nearest
from evomerge.strict_yaml import load_yaml

# A number or flag, a gradient (list of them), or a list of {filter, value} conditions.
Setting: TypeAlias = object
Settings: TypeAlias = Mapping[str, Setting]

METHOD_NAMES = ("task_arithmetic", "linear", "passthrough")
METHODS_WITH_BASE = frozenset({"task_arithmetic"})
DTYPE_NAMES = ("bfloat16", "float16", "float32")
# What mergekit reads for any of its methods: a name beyond these is a typing error. Names that
# the recipe's own method does not read (int8_mask for task_arithmetic) change nothing, as there.
PARAMETER_NAMES = (
    "weight",
    "density",
    "gamma",
    "epsilon",
    "scale",
    "t",
    "normalize",
    "lambda",
    "rescale",
    "int8_mask",
    "max_iter",
    "tol",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
    "eps",
    "filter_wise",
    "select_topk",
    "r",
    "alpha",
)
# Parameters have short names, in which one wrong letter is a large part.
_CUTOFF = 0.5
_MERGEKIT_ONLY_KEYS = ("modules", "tokenizer", "chat_template")
_TRUE_WORDS = frozenset({"true", "yes", "on", "y", "t", "1"})
_FALSE_WORDS = frozenset({"false", "no", "off", "n", "f", "0"})


def _check_setting(name: str, setting: Setting) -> None:
    """Raises ValueError where `setting` has none of the three forms."""
    if isinstance(setting, Mapping):
        _check_condition(name, setting)
    elif isinstance(setting, list):
        conditional = [isinstance(item, Mapping) for item in setting]
        if any(conditional) and not all(conditional):
            raise ValueError(f"{name}: a list holds numbers or {{filter, value}} entries, not both")
        for item in setting:
            if isinstance(item, Mapping):
                _check_condition(name, item)
            else:
                _check_scalar(name, item)
    else:
        _check_scalar(name, setting)


def _check_condition(name: str, condition: Mapping[str, Setting]) -> None:
    for key in condition:
        if key not in ("filter", "value"):
            raise ValueError(
                f"{name}: unknown key {key!r}{nearest(key, ('filter', 'value'), cutoff=_CUTOFF)}"
            )
    if not isinstance(condition.get("filter", ""), str | None):
        raise ValueError(f"{name}: filter {condition['filter']!r} should be a string")
    if "value" not in condition:
        raise ValueError(f"{name}: {dict(condition)!r} has no value")
    value = condition["value"]
    for item in value if isinstance(value, list) else [value]:
        _check_scalar(name, item)


def _check_scalar(name: str, scalar: Setting) -> None:
    if isinstance(scalar, bool | int | float):
        return
    if not isinstance(scalar, str):
        raise ValueError(f"{name}: {scalar!r} is not a number")
    if scalar.lower() not in _TRUE_WORDS | _FALSE_WORDS:
        try:
            float(scalar)
        except ValueError:
            raise ValueError(f"{name}: {scalar!r} is not a number") from None


def _check_settings(settings: dict[str, Setting]) -> dict[str, Setting]:
    for name, setting in settings.items():
        if name not in PARAMETER_NAMES:
            raise ValueError(
                f"unknown parameter {name!r}{nearest(name, PARAMETER_NAMES, cutoff=_CUTOFF)}"
            )
        _check_setting(name, setting)
    return settings


def _check_dtype(name: str | None) -> str | None:
    if name is not None and name.removeprefix("torch.") not in DTYPE_NAMES:
        raise ValueError(f"{name!r} is no dtype of a merge; one of {', '.join(DTYPE_NAMES)} is")
    return name


def _check_method(name: str) -> str:
    if name not in METHOD_NAMES:
        raise ValueError(
            f"unknown merge method {name!r}{nearest(name, METHOD_NAMES, cutoff=_CUTOFF)}; "
            f"there are {', '.join(METHOD_NAMES)}"
        )
    return name


def _check_tokenizer_source(name: str | None) -> str | None:
    if name not in (None, "base"):
        raise ValueError(f"{name!r} is not supported yet; leave it out, or write base")
    return name


def _no_settings_as_empty(value: object) -> object:
    return {} if value is None else value


Parameters = Annotated[
    dict[str, Setting], BeforeValidator(_no_settings_as_empty), AfterValidator(_check_settings)
]
DtypeName = Annotated[str | None, AfterValidator(_check_dtype)]
ModelName = Annotated[str, Field(min_length=1)]
LayerIndex = Annotated[int, Field(ge=0, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Strict):
    """A whole model that goes into the merge, with its own parameters."""

    model: ModelName
    parameters: Parameters = {}


class Source(_Strict):
    """The layers `layer_range` = [first, end) of a model, with their own parameters."""

    model: ModelName
    layer_range: tuple[LayerIndex, LayerIndex]
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _has_layers(self) -> Source:
        first, end = self.layer_range
        if first >= end:
            raise ValueError(f"layer_range [{first}, {end}] has no layers; write [first, end)")
        return self

    @property
    def num_layers(self) -> int:
        first, end = self.layer_range
        return end - first


class Slice(_Strict):
    """Layers of the output: sources of one length, merged layer by layer."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    base_model: ModelName | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Slice:
        if len({source.num_layers for source in self.sources}) > 1:
            ranges = ", ".join(f"{s.model} {list(s.layer_range)}" for s in self.sources)
            raise ValueError(f"all sources of a slice must have as many layers; here: {ranges}")
        _refuse_repeats("sources", [source.model for source in self.sources])
        return self


class Recipe(_Strict):
    """A merge configuration in mergekit's format; unknown keys are refused."""

    merge_method: Annotated[str, AfterValidator(_check_method)]
    base_model: ModelName | None = None
    models: Annotated[tuple[Model, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    parameters: Parameters = {}
    dtype: DtypeName = None
    out_dtype: DtypeName = None
    tokenizer_source: Annotated[str | None, AfterValidator(_check_tokenizer_source)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if (self.models is None) == (self.slices is None):
            raise ValueError("a recipe has either models or slices")
        if self.models is not None:
            _refuse_repeats("models", [model.model for model in self.models])
        if self.merge_method in METHODS_WITH_BASE:
            self._check_base()
        if self.merge_method == "passthrough":
            self._check_single_sources()
        return self

    def _check_base(self) -> None:
        if self.models is not None and self.base_model is None:
            raise ValueError(f"{self.merge_method} needs a base_model")
        for index, part in enumerate(self.slices or ()):
            base = part.base_model or self.base_model
            if base is None:
                raise ValueError(f"{self.merge_method} needs a base_model")
            if base not in [source.model for source in part.sources]:
                raise ValueError(f"slices.{index}: base_model {base} must be one of the sources")

    def _check_single_sources(self) -> None:
        counts = [len(part.sources) for part in self.slices or ()]
        counts += [len(self.models)] if self.models is not None else []
        if any(count != 1 for count in counts):
            raise ValueError("passthrough takes exactly one source for each layer")

    def model_names(self) -> tuple[str, ...]:
        """Every model of the recipe once: the base first, then in the order of mention."""
        names = [self.base_model] if self.base_model else []
        names += [model.model for model in self.models or ()]
        for part in self.slices or ():
            names += [part.base_model] if part.base_model else []
            names += [source.model for source in part.sources]
        return tuple(dict.fromkeys(names))

    def with_models(self, names: Mapping[str, str]) -> Recipe:
        """The same recipe with models renamed; names that are no key stay as they are."""
        mapping = self.to_mapping()
        _rename_models(mapping, names)
        return Recipe.model_validate(mapping)

    def to_mapping(self) -> dict[str, object]:
        """The recipe as plain dicts, lists and exact numbers, without what was left out."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The recipe in mergekit's style: keys sorted, numbers exact, layer ranges in one line."""
        return yaml.dump(
            _with_flow_ranges(self.to_mapping()),
            Dumper=_RecipeDumper,
            sort_keys=True,
            allow_unicode=True,
            width=2**20,
        )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises ConfigError with every mistake of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe in YAML `text`; `where` names it in messages."""
    try:
        mapping = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    return recipe_from_mapping(mapping, where)


def recipe_from_mapping(mapping: object, where: str) -> Recipe:
    """The recipe in plain dicts and lists; raises ConfigError with all its mistakes."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a recipe is a mapping with merge_method and models or slices")
    unsupported = [key for key in _MERGEKIT_ONLY_KEYS if key in mapping]
    if unsupported:
        raise ConfigError(f"{where}: {', '.join(unsupported)}: not supported yet; leave it out")
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(_describe_mistakes(error, where)) from error


def resolve(levels: Iterable[Settings], parameter: str, tensor: str, depth: float) -> object | None:
    """What `parameter` is for one tensor, from the first of `levels` that says so; else None.

    `tensor` is the name that filters are looked for in (plain substrings, first match wins);
    `depth` in [0, 1] is the place within the slice where gradients are read.
    """
    for level in levels:
        if parameter in level:
            value = _select(level[parameter], tensor, depth)
            if value is not None:
                return value
    return None


def resolve_float(
    levels: Iterable[Settings], parameter: str, tensor: str, depth: float
) -> float | None:
    """`resolve` as a number: numeric strings are read, true is 1."""
    value = resolve(levels, parameter, tensor, depth)
    return None if value is None else as_float(value)


def resolve_bool(
    levels: Iterable[Settings], parameter: str, tensor: str, depth: float
) -> bool | None:
    """`resolve` as a flag: 1 and 1.0 are true. Raises ConfigError for 0.5 and the like."""
    value = resolve(levels, parameter, tensor, depth)
    if value is None or isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in _TRUE_WORDS | {"1.0"}:
        return True
    if word in _FALSE_WORDS | {"0.0"}:
        return False
    raise ConfigError(f"{parameter}: {value!r} is neither true nor false")


def as_float(value: object) -> float:
    """A scalar of a recipe as a number."""
    if isinstance(value, str):
        word = value.lower()
        if word in _TRUE_WORDS - {"1"}:
            return 1.0
        if word in _FALSE_WORDS - {"0"}:
            return 0.0
    assert isinstance(value, bool | int | float | str)
    return float(value)


def _select(setting: Setting, tensor: str, depth: float) -> object | None:
    # dict and list, not Mapping and Sequence: asking an abstract class costs half of a plan's time.
    conditions = [setting] if isinstance(setting, dict) else setting
    if not isinstance(conditions, list):
        return conditions
    if not conditions:
        return None
    if not isinstance(conditions[0], dict):
        return _gradient(conditions, depth)
    for condition in conditions:
        wanted = condition.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return _select(condition["value"], tensor, depth)
    return None


def _gradient(anchors: Sequence[object], depth: float) -> object:
    """The anchors as a piecewise linear function of `depth`; flags are not mixed but chosen."""
    place = depth * (len(anchors) - 1)
    index = math.floor(place)
    if index >= len(anchors) - 1:
        return anchors[-1]
    if all(isinstance(anchor, bool) for anchor in anchors):
        return anchors[index]
    share = place - index
    return (1 - share) * as_float(anchors[index]) + share * as_float(anchors[index + 1])


def _refuse_repeats(key: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{key}: {repeated[0]} is listed twice; once is enough")


def _plain(level: BaseModel) -> dict[str, object]:
    plain: dict[str, object] = {}
    for name in type(level).model_fields:
        value = getattr(level, name)
        if value is None or (name == "parameters" and not value):
            continue
        plain[name] = _plain_value(value)
    return plain


def _plain_value(value: object) -> object:
    if isinstance(value, BaseModel):
        return _plain(value)
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value


def _rename_models(node: object, names: Mapping[str, str]) -> None:
    """Renames in place, within what `to_mapping` has just made."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("model", "base_model"):
                node[key] = names.get(value, value)
            elif key != "parameters":
                _rename_models(value, names)
    elif isinstance(node, list):
        for item in node:
            _rename_models(item, names)


class _FlowList(list[object]):
    """A list that YAML writes in one line."""


class _RecipeDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


_RecipeDumper.add_representer(
    _FlowList,
    lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True),
)


def _with_flow_ranges(node: object) -> object:
    if isinstance(node, dict):
        return {
            key: _FlowList(value) if key == "layer_range" else _with_flow_ranges(value)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_flow_ranges(item) for item in node]
    return node


def _describe_mistakes(error: ValidationError, where: str) -> str:
    """All mistakes that pydantic found in `where`, one line each, with the nearest known key."""
    mistakes = error.errors(include_url=False, include_context=False)
    return "\n".join(
        f"{where}: {_describe(mistake)}"
        for mistake in mistakes
        if not _only_follows(mistake, mistakes)
    )


def _only_follows(mistake: ErrorDetails, mistakes: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short because a wrong item of it was not counted."""
    place = mistake["loc"]
    return mistake["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in mistakes
    )


def _describe(mistake: ErrorDetails) -> str:
    location = mistake["loc"]
    place = ".".join(str(part) for part in location) + ": " if location else ""
    if mistake["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        return f"{place}unknown key{nearest(str(location[-1]), known, cutoff=_CUTOFF)}"
    if mistake["type"] == "missing":
        return f"{place}is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return place + message
    return f"{place}{message} (given: {mistake['input']!r})"


def _keys_at(location: Sequence[object]) -> list[str]:
    """The keys of the level at `location`, such as ("slices", 3, "sources", 0)."""
    levels: dict[object, type[BaseModel]] = {"slices": Slice, "sources": Source, "models": Model}
    found = [levels[part] for part in location if part in levels]
    return list((found[-1] if found else Recipe).model_fields)
