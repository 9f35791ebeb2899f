"""The `search_space:` of a study file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from evomerge.errors import nearest, shown
from evomerge.merge_rules import METHODS, PARAMETER_NAMES, MethodRules, Parameter

Per: TypeAlias = Literal["slice", "model", "global"]
# No number of a merge is larger, and none that is searched in its logarithm smaller.
_LARGEST, _SMALLEST = 1e6, 1e-30
_Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]


class Bounds(BaseModel):
    """The bounds of a searched number: `[low, high]`, or a mapping with more to say.

    None: as the method's table has it. `log`: the search moves in its logarithm. `per` slice: a
    value for each slice of layers and group of tensors (and model, where models have their own);
    model: one for each model; global: one. `start`: where the search begins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: _Number | None = None
    high: _Number | None = None
    log: bool | None = None
    per: Per = "slice"
    start: _Number | None = None

    @model_validator(mode="after")
    def _have_two_ends(self) -> Bounds:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high belong together: write both, or neither")
        return self

    def to_plain(self) -> object:
        """What a file says, as short as possible."""
        said = {name: getattr(self, name) for name in ("low", "high", "log", "start")}
        said = {name: value for name, value in said.items() if value is not None}
        if self.per != "slice":
            said["per"] = self.per
        return [self.low, self.high] if said.keys() == {"low", "high"} else said


Fixed: TypeAlias = bool | int | float


def _choice(raw: object) -> Bounds | Fixed:
    """What a file says of a number: bounds to search in, or its value."""
    if isinstance(raw, Bounds):
        return raw
    if isinstance(raw, Mapping):
        return Bounds.model_validate(raw)
    if isinstance(raw, list | tuple):
        if len(raw) != 2:
            raise ValueError(f"{shown(list(raw))} should be [low, high]")
        return Bounds.model_validate({"low": raw[0], "high": raw[1]})
    return _fixed(raw)


def _fixed(raw: object) -> Fixed:
    if isinstance(raw, bool) or (isinstance(raw, int) and abs(raw) <= _LARGEST):
        return raw
    try:
        value = float(raw)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= _LARGEST:
        raise ValueError(
            f"{shown(raw)} is neither [low, high], a mapping with low and high, nor a flag or a "
            f"number within ±{_LARGEST:g}"
        )
    return value


def _plain_choice(choice: Bounds | Fixed) -> object:
    return choice.to_plain() if isinstance(choice, Bounds) else choice


Choice: TypeAlias = Annotated[
    Bounds | Fixed, PlainValidator(_choice), PlainSerializer(_plain_choice, return_type=object)
]


class StackConfig(BaseModel):
    """`stack:` which layers of which models, in which order, make up the merged model.

    The layers of all models are laid out one model after the other, `repeats` times, in blocks of
    `block` layers; each block is there or not. `scale`: bounds of a factor, for each block, of what
    its layers add to the hidden states: it scales the tensors whose names contain one of
    `scale_filters`. A stack of other than `min_layers` to `max_layers` (None: twice a model's
    layers) layers fails.

    Source: the data-flow space of Akiba et al. 2024, arXiv:2403.13187, §3.2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repeats: Annotated[int, Field(ge=1, le=16)] = 2
    block: Annotated[int, Field(ge=1)] = 1
    scale: Choice | None = None
    scale_filters: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)
    ] = ("o_proj", "down_proj")
    min_layers: Annotated[int, Field(ge=1)] = 1
    max_layers: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> StackConfig:
        if self.max_layers is not None and self.max_layers < self.min_layers:
            raise ValueError(f"max_layers: {self.max_layers} is less than min_layers")
        if self.scale is None:
            return self
        if not isinstance(self.scale, Bounds) or self.scale.low is None:
            raise ValueError("scale: is searched: write [low, high], or leave it out for 1")
        if self.scale.per != "slice":
            raise ValueError("scale: each block has its own; leave per out")
        _check_searched(searched_number(Parameter("scale", default=1.0), self.scale))
        return self


@dataclass(frozen=True)
class Searched:
    """A number of the method that is searched, with everything that the file leaves open."""

    parameter: Parameter
    low: float
    high: float
    log: bool
    per: Per
    asked_start: float | None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.parameter.name

    @property
    def start(self) -> float:
        """What the file says, else the method's default within the bounds, else their middle."""
        if self.asked_start is not None:
            return self.asked_start
        if self.parameter.default is not None:
            return min(max(float(self.parameter.default), self.low), self.high)
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    def to_plain(self) -> object:
        """All that decides, as plain values; bounds alone where the rest is usual."""
        bounds = [self.low, self.high]
        if not self.log and self.per == "slice" and self.asked_start is None:
            return bounds
        return {"bounds": bounds, "log": self.log, "per": self.per, "start": self.asked_start}


class SpaceConfig(BaseModel):
    """The `search_space:` of a study file.

    `numbers` are the method's parameters, which stand beside the other keys in the file: bounds to
    search in, or a value that all recipes have. What it does not name is searched where
    `merge_rules` has bounds for it, else left to the method. `tokenizer_source` is that of all
    recipes, for models whose vocabularies differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge_method: str = "task_arithmetic"
    layer_granularity: Annotated[int, Field(ge=0)] = 0
    filters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    smooth: bool = False
    tokenizer_source: Literal["base", "union"] | None = None
    stack: StackConfig | None = None
    numbers: dict[str, Choice] = {}

    @model_validator(mode="before")
    @classmethod
    def _gathers_the_numbers(cls, raw: object) -> object:
        if not isinstance(raw, Mapping):
            return raw
        if "numbers" in raw:
            raise ValueError("unknown key 'numbers'; the parameters stand beside merge_method")
        numbers = {key: raw[key] for key in raw if key in PARAMETER_NAMES}
        others = {key: value for key, value in raw.items() if key not in numbers}
        said = {key: value for key, value in numbers.items() if value is not None}
        return {**others, "numbers": said}

    @model_serializer(mode="wrap")
    def _lays_out_the_numbers(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = serialize(self)
        numbers = plain.pop("numbers")
        later = ("smooth", "tokenizer_source", "stack")
        unsaid = [key for key in later if not plain.get(key)]
        return {key: value for key, value in plain.items() if key not in unsaid} | dict(numbers)

    @field_validator("merge_method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"unknown merge method {name!r}{nearest(name, METHODS, cutoff=0.5)}")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> SpaceConfig:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n  ".join(mistakes))
        return self

    def _mistakes(self) -> list[str]:
        if len(set(self.filters)) < len(self.filters):
            return [f"filters: {list(self.filters)} names one twice"]
        if self.stack is not None:
            return self._mistakes_of_a_stack()
        wrong = [_mistake(self.rules, name, said) for name, said in self.numbers.items()]
        mistakes = [mistake for mistake in wrong if mistake]
        return mistakes or self._mistakes_of_numbers()

    def _mistakes_of_a_stack(self) -> list[str]:
        idle = [key for key in ("layer_granularity", "filters", "smooth") if getattr(self, key)]
        mistakes = [f"{key}: has no meaning beside stack; leave it out" for key in idle]
        mistakes += [f"{key}: has no meaning beside stack; leave it out" for key in self.numbers]
        if self.merge_method != "passthrough":
            mistakes.append(f"stack: needs merge_method: passthrough, not {self.merge_method}")
        return mistakes

    def _mistakes_of_numbers(self) -> list[str]:
        mistakes = []
        for one in self.rules.parameters:
            if one.required and one.name not in self.numbers and one.searched is None:
                mistakes.append(f"{one.name}: is missing; {self.merge_method} needs it")
        for searched in self.searched:
            try:
                _check_searched(searched)
            except ValueError as error:
                mistakes.append(str(error))
        if not self.searched:
            mistakes.append(_nothing_to_search(self.rules))
        return mistakes or _impossible_densities(self)

    @property
    def rules(self) -> MethodRules:
        """What the method takes."""
        return METHODS[self.merge_method]

    @property
    def searched(self) -> tuple[Searched, ...]:
        """The numbers that are searched, in the table's order."""
        return tuple(
            searched_number(one, said)
            for one in self.rules.parameters
            if isinstance(said := self.numbers.get(one.name, _unsaid(one)), Bounds)
        )

    @property
    def fixed(self) -> dict[str, Fixed]:
        """The numbers that all recipes of the space have alike."""
        said = self.numbers.items()
        return {name: value for name, value in said if not isinstance(value, Bounds)}

    def to_fingerprint(self) -> dict[str, object]:
        """All that decides a search, as plain values, with the defaults filled in."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return plain | {searched.name: searched.to_plain() for searched in self.searched}


# The keys that a search_space may have.
SPACE_KEYS = (*(key for key in SpaceConfig.model_fields if key != "numbers"), *PARAMETER_NAMES)


def searched_number(parameter: Parameter, bounds: Bounds) -> Searched:
    """`bounds` with the table's values for what they leave open."""
    low, high = bounds.low, bounds.high
    if low is None or high is None:
        low, high = parameter.searched or (-math.inf, math.inf)
    log = bounds.log if bounds.log is not None else parameter.log and low > 0
    return Searched(parameter, low, high, log, bounds.per, bounds.start)


def _unsaid(parameter: Parameter) -> Bounds | None:
    return Bounds() if parameter.searched is not None else None


def _mistake(rules: MethodRules, name: str, said: Bounds | Fixed) -> str | None:
    """What is wrong with a file's word on the number `name`, whatever its bounds are."""
    parameter = rules.parameter(name)
    if parameter is not None:
        if isinstance(said, Bounds):
            return _mistake_of_bounds(parameter, said)
        return _mistake_of_value(parameter, said)
    if name in rules.ignored and not isinstance(said, Bounds):
        return None
    names = ", ".join(one.name for one in rules.parameters)
    has = f"it has {names}" if names else "it has no parameters"
    return f"{name}: {rules.name} does not read it; {has}"


def _mistake_of_bounds(parameter: Parameter, said: Bounds) -> str | None:
    name = parameter.name
    if parameter.kind is not float:
        kind = "a flag" if parameter.kind is bool else "a count"
        return f"{name}: is {kind}, which is not searched; write its value"
    if said.low is None and parameter.searched is None:
        return f"{name}: has no usual bounds; write [low, high]"
    if said.per == "model" and not parameter.own:
        return f"{name}: models do not have their own; per is slice or global"
    return None


def _mistake_of_value(parameter: Parameter, value: Fixed) -> str | None:
    name = parameter.name
    if parameter.kind is bool:
        return None if value in (0, 1) else f"{name}: {value} is neither true nor false"
    if isinstance(value, bool) or (parameter.kind is int and value != int(value)):
        return f"{name}: {value} is no {'whole ' if parameter.kind is int else ''}number"
    if not parameter.low <= value <= parameter.high:
        return f"{name}: {value} is outside [{parameter.low}, {parameter.high}]"
    return None


def _check_searched(searched: Searched) -> None:
    """Raises ValueError where there is no such search."""
    name, low, high = searched.name, searched.low, searched.high
    parameter = searched.parameter
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: [{low}, {high}] should be [low, high] with low < high")
    if low < parameter.low or high > parameter.high:
        allowed = f"[{parameter.low}, {parameter.high}]"
        raise ValueError(f"{name}: [{low}, {high}] is not within {allowed}, its range")
    if searched.log and low < _SMALLEST:
        raise ValueError(f"{name}: log needs bounds of at least {_SMALLEST}, not [{low}, {high}]")
    start = searched.asked_start
    if start is not None and not low <= start <= high:
        raise ValueError(f"{name}: start: {start} is not within [{low}, {high}]")


def _nothing_to_search(rules: MethodRules) -> str:
    numbers = [one.name for one in rules.parameters if one.kind is float]
    if rules.name == "passthrough":
        return "passthrough has nothing to search but stack: (which layers), or bounds for scale"
    if numbers:
        return (
            f"{rules.name} has nothing to search here: give one of {', '.join(numbers)} bounds, "
            "as [low, high]"
        )
    return f"{rules.name} has no numbers that could be searched: `evomerge merge` makes its model"


# How much of the room between density and the nearer of 0 and 1 epsilon may take: DELLA's keep
# probabilities, density ± epsilon, must lie strictly between them.
ROOM = 0.99


def _impossible_densities(config: SpaceConfig) -> list[str]:
    """Says where no density goes with the least epsilon."""
    ends = [_ends(config, name) for name in ("density", "epsilon")]
    if not is_della(config.rules) or None in ends:
        return []
    (low, high), (epsilon, _) = (end or (0.0, 0.0) for end in ends)
    if low <= 1 - epsilon / ROOM and high >= epsilon / ROOM:
        return []
    return [
        f"density: {config.merge_method} keeps an element with a probability between density − "
        f"epsilon and density + epsilon, strictly within 0 and 1: with an epsilon of {epsilon} "
        f"some density must lie within [{epsilon / ROOM:g}, {1 - epsilon / ROOM:g}]"
    ]


def is_della(rules: MethodRules) -> bool:
    """Whether density ± epsilon are probabilities."""
    epsilon = rules.parameter("epsilon")
    return epsilon is not None and epsilon.own and rules.parameter("density") is not None


def _ends(config: SpaceConfig, name: str) -> tuple[float, float] | None:
    """The least and the greatest value of a number in all recipes of the space."""
    for searched in config.searched:
        if searched.name == name:
            return searched.low, searched.high
    parameter = config.rules.parameter(name)
    if parameter is None:
        return None
    value = float(config.fixed.get(name, parameter.default or 0.0))
    return value, value
