"""Recipes: mergekit's YAML format, read strictly and written exactly.

A recipe says which models become one model: merge method, slices (or whole models), parameters,
dtype, tokenizer. Numbers stay as they were written; `settings` says what they mean for one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigError, nearest, shown
from evomerge.merge_rules import METHODS, PARAMETER_NAMES, MethodRules
from evomerge.settings import CUTOFF, Setting, Settings, check_setting, misfits, unread_conditions
from evomerge.strict_yaml import load_yaml
from evomerge.wording import Location, complaint, only_follows

DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
# Keys that mergekit declares or skips and that change nothing, by the level that they stand on.
_WITHOUT_EFFECT = {"models": ("layer_range",), "slices": ("residual_weight",)}
# Of an object in place of a model's name, as mergekit writes it.
_REFERENCE_KEYS = ("model", "lora", "override_architecture")
_PATH_KEYS = ("path", "revision")

Say = Callable[[str], None]


def _check_settings(settings: dict[str, Setting]) -> dict[str, Setting]:
    for name, setting in settings.items():
        if name not in PARAMETER_NAMES:
            raise ValueError(
                f"unknown parameter {shown(name)}{nearest(name, PARAMETER_NAMES, cutoff=CUTOFF)}"
            )
        check_setting(name, setting)
    return settings


def _check_dtype(name: str | None) -> str | None:
    if name is not None and name.removeprefix("torch.") not in DTYPE_NAMES:
        meant = _SHORT_DTYPES.get(name.lower())
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(
            f"{shown(name)} is no dtype of a merge; one of {', '.join(DTYPE_NAMES)} is{hint}"
        )
    return name


def _check_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(
            f"unknown merge method {shown(name)}{nearest(name, METHODS, cutoff=CUTOFF)}"
        )
    return name


def _no_settings_as_empty(value: object) -> object:
    return {} if value is None else value


def _model_reference(value: object) -> object:
    """A model's name as one string, also where it is written as mergekit's object."""
    if not isinstance(value, Mapping):
        return value
    _refuse_unknown(value, _REFERENCE_KEYS)
    if "model" not in value:
        raise ValueError("model: is missing in the object that names a model")
    reference = _path_reference(value["model"])
    if value.get("lora") is not None:
        reference += "+" + _path_reference(value["lora"])
    return reference


def _tokenizer_reference(value: object) -> object:
    """The same for a tokenizer's source, which files of mergekit's first year call model:NAME."""
    reference = _model_reference(value)
    return reference.removeprefix("model:") if isinstance(reference, str) else reference


def _path_reference(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{shown(value)} should be a model's name or {{path, revision}}")
    _refuse_unknown(value, _PATH_KEYS)
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not isinstance(revision, str | None) or not path:
        raise ValueError(f"{shown(dict(value))} should have a path and may have a revision")
    return f"{path}@{revision}" if revision else path


def _check_range(value: object) -> object:
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(
            f"{shown(value)} should be [first, end), two whole numbers from 0: [0, 8] has the "
            "layers 0 to 7"
        )
    return value


def _refuse_unknown(mapping: Mapping[object, object], known: Sequence[str]) -> None:
    for key in mapping:
        if key not in known:
            raise ValueError(f"unknown key {shown(key)}{nearest(str(key), known, cutoff=CUTOFF)}")


Parameters = Annotated[
    dict[str, Setting], BeforeValidator(_no_settings_as_empty), AfterValidator(_check_settings)
]
DtypeName = Annotated[str | None, AfterValidator(_check_dtype)]
ModelName = Annotated[str, Field(min_length=1), BeforeValidator(_model_reference)]
TokenizerName = Annotated[str, Field(min_length=1), BeforeValidator(_tokenizer_reference)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_check_range)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Strict):
    """A whole model that goes into the merge, with its own parameters."""

    model: ModelName
    parameters: Parameters = {}


class Source(_Strict):
    """The layers `layer_range` = [first, end) of a model, with their own parameters."""

    model: ModelName
    layer_range: LayerRange
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


class Module(_Strict):
    """One of a model's modules (its text decoder, its vision tower …): models or slices."""

    models: Annotated[tuple[Model, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise ValueError("a module has either models or slices")
        if self.models is not None:
            _refuse_repeats("models", [model.model for model in self.models])
        return self


class ZeroToken(_Strict):
    """Says that a token's embedding is zero."""

    kind: Literal["zero"]


class ModelToken(_Strict):
    """Says that a token's embedding is that of another token, in a model of the recipe."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: Annotated[int, Field(ge=0, strict=True)] | None = None

    @model_validator(mode="after")
    def _names_one(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("model_token takes either token or token_id")
        return self


_SOURCE_KINDS = ("zero", "model_token")
_NAME = "name"


def _source_kind(source: object) -> object:
    """What a token's source is: a model's name, or of the kind that it says."""
    if isinstance(source, str):
        return _NAME
    return source.get("kind") if isinstance(source, Mapping) else getattr(source, "kind", None)


TokenSource = Annotated[
    Annotated[ZeroToken, Tag("zero")]
    | Annotated[ModelToken, Tag("model_token")]
    | Annotated[str, Tag(_NAME)],
    Discriminator(
        _source_kind,
        custom_error_type="token_source",
        custom_error_message=(
            "should be a model's name, {kind: zero} or {kind: model_token, model: NAME, "
            "token: TOKEN}"
        ),
    ),
]


class TokenChoice(_Strict):
    """Where the embedding of one token comes from; `force` replaces it in models that have it."""

    source: TokenSource | None = None
    force: bool = False


class TokenizerChoice(_Strict):
    """The output's tokenizer: `source` is "union", "base" or a model; `tokens` are exceptions."""

    source: TokenizerName = "union"
    tokens: dict[str, TokenChoice] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, strict=True)] | None = None


class Recipe(_Strict):
    """A merge configuration in mergekit's format; unknown keys are refused."""

    merge_method: Annotated[str, AfterValidator(_check_method)]
    base_model: ModelName | None = None
    models: Annotated[tuple[Model, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, Module], Field(min_length=1)] | None = None
    parameters: Parameters = {}
    dtype: DtypeName = None
    out_dtype: DtypeName = None
    tokenizer_source: TokenizerName | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if sum(part is not None for part in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("a recipe has either models or slices (or modules with them)")
        if self.models is not None:
            _refuse_repeats("models", [model.model for model in self.models])
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("a recipe has either tokenizer_source or tokenizer")
        for place, body in self.bodies():
            self._check_inputs(place, body)
        return self

    @property
    def rules(self) -> MethodRules:
        """What the recipe's method takes."""
        return METHODS[self.merge_method]

    def bodies(self) -> Iterator[tuple[str, Body]]:
        """What is merged, module by module, with its place in the file ("", "modules.default.")."""
        if self.modules is None:
            yield "", Body(self.models, self.slices, {})
        for name, module in (self.modules or {}).items():
            yield f"modules.{name}.", Body(module.models, module.slices, module.parameters)

    def base_of(self, part: Slice | None) -> str | None:
        """The model that others are measured against in a slice; None where the method has none."""
        if self.rules.base == "none":
            return None
        return (part.base_model if part else None) or self.base_model

    def _check_inputs(self, place: str, body: Body) -> None:
        if body.models is not None:
            names = [model.model for model in body.models]
            self._check_one(f"{place}models", self.base_of(None), names, listed=False)
        for index, part in enumerate(body.slices or ()):
            names = [source.model for source in part.sources]
            self._check_one(f"{place}slices.{index}", self.base_of(part), names, listed=True)

    def _check_one(
        self, place: str, base: str | None, names: Sequence[str], *, listed: bool
    ) -> None:
        """Raises ValueError unless the method takes these inputs, with or without this base."""
        rules = self.rules
        if rules.base == "required" and base is None:
            raise ValueError(f"{self.merge_method} needs a base_model")
        if listed and base is not None and base not in names:
            raise ValueError(f"{place}: base_model {base} must be one of the sources")
        others = len(names) - (base in names)
        if not listed and rules.base == "none" and self.merge_method != "passthrough":
            others += self.base_model is not None and self.base_model not in names
        fewest, most = rules.inputs
        if base is not None and (fewest, most) == (1, None):
            fewest = 0  # the base alone is what comes out, as in mergekit
        if not fewest <= others <= (others if most is None else most):
            wanted = f"at least {fewest}" if most is None else f"exactly {fewest}"
            beside = " beside the base" if base is not None else ""
            kind = "source" if listed else "model"
            each = " for each layer" if listed else ""
            raise ValueError(
                f"{place}: {self.merge_method} takes {wanted} {kind}{'s' * (fewest != 1)}"
                f"{beside}{each}; here there are {others}"
            )

    def model_names(self) -> tuple[str, ...]:
        """Every model that is merged, once: the base first, then in the order of mention."""
        names = [self.base_model] if self.base_model else []
        for _, body in self.bodies():
            names += [model.model for model in body.models or ()]
            for part in body.slices or ():
                names += [part.base_model] if part.base_model else []
                names += [source.model for source in part.sources]
        return tuple(dict.fromkeys(names))

    def tokenizer_models(self) -> tuple[str, ...]:
        """Every model that the tokenizer is made from by name, whether or not it is merged."""
        whole = [self.tokenizer_source, self.tokenizer.source if self.tokenizer else None]
        named = [name for name in whole if name not in _NO_MODELS]
        for choice in (self.tokenizer.tokens if self.tokenizer else {}).values():
            source = choice.source
            named.append(source.model if isinstance(source, ModelToken) else None)
            named.append(source if isinstance(source, str) else None)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def references(self) -> tuple[str, ...]:
        """Every model that has to be found: those that are merged, then the tokenizer's."""
        return tuple(dict.fromkeys([*self.model_names(), *self.tokenizer_models()]))

    def places(self) -> dict[str, str]:
        """The key under which each of `references` stands first, as "models.0.model"."""
        named: dict[str, str] = {}
        if self.base_model:
            named[self.base_model] = "base_model"
        for place, body in self.bodies():
            for index, model in enumerate(body.models or ()):
                named.setdefault(model.model, f"{place}models.{index}.model")
            for index, part in enumerate(body.slices or ()):
                if part.base_model:
                    named.setdefault(part.base_model, f"{place}slices.{index}.base_model")
                for number, source in enumerate(part.sources):
                    where = f"{place}slices.{index}.sources.{number}.model"
                    named.setdefault(source.model, where)
        if self.tokenizer_source:
            named.setdefault(self.tokenizer_source, TOKENIZER_PLACES[0])
        if self.tokenizer:
            named.setdefault(self.tokenizer.source, TOKENIZER_PLACES[1])
        return {name: named.get(name, "tokenizer.tokens") for name in self.references()}

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


# The keys of the output's tokenizer, under which a word may stand in place of a model.
TOKENIZER_PLACES = ("tokenizer_source", "tokenizer.source")
# Words in the place of a model's name that name none.
_NO_MODELS = ("base", "union")


@dataclass(frozen=True)
class Body:
    """What is merged in one module: whole models or slices, and the module's own parameters."""

    models: tuple[Model, ...] | None
    slices: tuple[Slice, ...] | None
    parameters: Settings


def read_recipe(path: Path, *, lenient: bool = False, say: Say | None = None) -> Recipe:
    """The recipe in a YAML file. Raises ConfigError with every mistake of the file.

    `lenient` drops keys and parameters that nobody knows instead of refusing them. `say` is told,
    in one line, what of the file is without effect.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse_recipe(text, str(path), lenient=lenient, say=say)


def parse_recipe(text: str, where: str, *, lenient: bool = False, say: Say | None = None) -> Recipe:
    """The recipe in YAML `text`; `where` names it in messages."""
    try:
        mapping = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    return recipe_from_mapping(mapping, where, lenient=lenient, say=say)


def recipe_from_mapping(
    mapping: object, where: str, *, lenient: bool = False, say: Say | None = None
) -> Recipe:
    """The recipe in plain dicts and lists; raises ConfigError with all its mistakes."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a recipe is a mapping with merge_method and models or slices")
    notes: list[str] = []
    effective = _without_dead_keys(mapping, notes)
    if lenient:
        effective = _without_unknown(effective, Recipe, "", notes)
    try:
        recipe = Recipe.model_validate(effective)
    except ValidationError as error:
        raise ConfigError(_describe_mistakes(error, where)) from error
    mistakes: list[str] = []
    for place, settings, is_source in _levels(recipe):
        _judge(recipe.rules, place, settings, mistakes, notes, is_source=is_source)
    if mistakes:
        raise ConfigError("\n".join(f"{where}: {mistake}" for mistake in mistakes))
    if notes and say is not None:
        say(f"{where}: warning: without effect: {'; '.join(dict.fromkeys(notes))}")
    return recipe


def _without_dead_keys(mapping: Mapping[str, object], notes: list[str]) -> dict[str, object]:
    """A copy without the keys that mergekit takes and that change nothing there either."""
    copy = dict(mapping)
    for level, dead in _WITHOUT_EFFECT.items():
        parts = copy.get(level)
        if isinstance(parts, list):
            copy[level] = [_without(part, dead, level, notes) for part in parts]
    modules = copy.get("modules")
    if isinstance(modules, Mapping):
        copy["modules"] = {
            name: _without_dead_keys(module, notes) if isinstance(module, Mapping) else module
            for name, module in modules.items()
        }
    return copy


def _without(part: object, dead: Sequence[str], level: str, notes: list[str]) -> object:
    if not isinstance(part, Mapping):
        return part
    notes += [f"{key} under {level}" for key in dead if key in part]
    return {key: value for key, value in part.items() if key not in dead}


# Which level of the file a key leads to.
_NEXT_LEVEL: Mapping[str, type[BaseModel]] = {
    "models": Model,
    "slices": Slice,
    "sources": Source,
    "modules": Module,
    "tokenizer": TokenizerChoice,
}


def _without_unknown(
    node: Mapping[str, object], level: type[BaseModel], place: str, notes: list[str]
) -> dict[str, object]:
    """A copy of what is known of `node`, a mapping on `level`, and of the levels below it."""
    kept: dict[str, object] = {}
    for key, value in node.items():
        if key not in level.model_fields:
            notes.append(f"unknown key {place}{key}")
        elif key == "parameters" and isinstance(value, Mapping):
            kept[key] = {name: item for name, item in value.items() if name in PARAMETER_NAMES}
            unknown = [name for name in value if name not in PARAMETER_NAMES]
            notes += [f"unknown parameter {place}{name}" for name in unknown]
        elif key in _NEXT_LEVEL:
            kept[key] = _each_without_unknown(value, _NEXT_LEVEL[key], f"{place}{key}.", notes)
        else:
            kept[key] = value
    return kept


def _each_without_unknown(
    value: object, level: type[BaseModel], place: str, notes: list[str]
) -> object:
    if isinstance(value, list):
        return [
            _without_unknown(item, level, f"{place}{index}.", notes)
            if isinstance(item, Mapping)
            else item
            for index, item in enumerate(value)
        ]
    if isinstance(value, Mapping) and level is Module:
        return {
            name: _without_unknown(item, level, f"{place}{name}.", notes)
            if isinstance(item, Mapping)
            else item
            for name, item in value.items()
        }
    return _without_unknown(value, level, place, notes) if isinstance(value, Mapping) else value


def _levels(recipe: Recipe) -> Iterator[tuple[str, Settings, bool]]:
    """All parameters of a recipe with their place, and whether they belong to one input alone."""
    yield "", recipe.parameters, False
    for place, body in recipe.bodies():
        if place:
            yield place, body.parameters, False
        for number, model in enumerate(body.models or ()):
            yield f"{place}models.{number}.", model.parameters, True
        for number, part in enumerate(body.slices or ()):
            yield f"{place}slices.{number}.", part.parameters, False
            for index, source in enumerate(part.sources):
                yield f"{place}slices.{number}.sources.{index}.", source.parameters, True


def _judge(
    rules: MethodRules,
    place: str,
    settings: Settings,
    mistakes: list[str],
    notes: list[str],
    *,
    is_source: bool,
) -> None:
    """Adds what is wrong with the numbers of one level, and what of it nobody reads."""
    for name, setting in settings.items():
        parameter = rules.parameter(name)
        if parameter is None:
            if name not in rules.ignored:
                notes.append(f"{name} ({rules.name} does not read it)")
        elif is_source and not parameter.own:
            notes.append(f"{name} of one model ({rules.name} reads it for all models together)")
        else:
            mistakes += [f"{place}parameters.{wrong}" for wrong in misfits(parameter, setting)]
            notes += unread_conditions(f"{place}parameters.{name}", setting)


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
            if key in _MODEL_KEYS and isinstance(value, str):
                node[key] = names.get(value, value)
            elif key in _TOKENIZER_KEYS and isinstance(value, str):
                node[key] = value if value in _NO_MODELS else names.get(value, value)
            elif key == "tokens":  # its keys are tokens, whatever they are called
                for choice in value.values():
                    _rename_token_source(choice, names)
            elif key != "parameters":
                _rename_models(value, names)
    elif isinstance(node, list):
        for item in node:
            _rename_models(item, names)


def _rename_token_source(choice: dict[str, object], names: Mapping[str, str]) -> None:
    source = choice.get("source")
    if isinstance(source, str):
        choice["source"] = names.get(source, source)
    else:
        _rename_models(source, names)


# Under which keys a model's name stands; under the tokenizer's it may be a word instead.
_MODEL_KEYS = ("model", "base_model")
_TOKENIZER_KEYS = ("tokenizer_source", "source")


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
    mistakes = [_without_tags(one) for one in error.errors(include_url=False)]
    return "\n".join(
        f"{where}: {complaint(mistake, _keys_at, cutoff=CUTOFF)}"
        for mistake in mistakes
        if not only_follows(mistake, mistakes)
    )


def _without_tags(mistake: ErrorDetails) -> ErrorDetails:
    """A mistake at its place in the file: pydantic's names the kind of a token's source, too."""
    location = mistake["loc"]
    place = tuple(
        part
        for before, part in zip((None, *location), location, strict=False)
        if not (before == "source" and part in (*_SOURCE_KINDS, _NAME))
    )
    return {**mistake, "loc": place}


def _keys_at(location: Location) -> list[str]:
    """The keys of the level at `location`, such as ("slices", 3, "sources", 0)."""
    level: type[BaseModel] = Recipe
    for number, part in enumerate(location):
        if part == "tokens":  # the keys below are tokens, whatever they are called
            level = ModelToken if "source" in location[number + 2 :] else TokenChoice
            break
        level = _NEXT_LEVEL.get(str(part), level)
    return list(level.model_fields)
