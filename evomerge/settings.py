"""Parameter settings of a recipe: their forms, and what they mean for one tensor.

A setting is a number or flag, a gradient (a list of numbers over the layers of a slice), or a list
of {filter, value} conditions on the tensor's name; a value may be a gradient again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from evomerge.errors import ConfigError, nearest, shown
from evomerge.merge_rules import Parameter

Setting: TypeAlias = object
Settings: TypeAlias = Mapping[str, Setting]

# Parameters and keys have short names, in which one wrong letter is a large part.
CUTOFF = 0.5
_TRUE_WORDS = frozenset({"true", "yes", "on", "y", "t", "1"})
_FALSE_WORDS = frozenset({"false", "no", "off", "n", "f", "0"})


def check_setting(name: str, setting: Setting) -> None:
    """Raises ValueError where `setting` has none of the three forms."""
    if isinstance(setting, Mapping):
        _check_condition(name, setting)
    elif isinstance(setting, list):
        conditional = [isinstance(item, Mapping) for item in setting]
        if not setting:
            raise ValueError(f"{name}: [] is a gradient without numbers; write at least one")
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
            known = ("filter", "value")
            hint = nearest(str(key), known, cutoff=CUTOFF)
            raise ValueError(f"{name}: unknown key {shown(key)}{hint}")
    if not isinstance(condition.get("filter", ""), str | None):
        raise ValueError(f"{name}: filter {shown(condition['filter'])} should be a string")
    if "value" not in condition:
        raise ValueError(f"{name}: {shown(dict(condition))} has no value")
    value = condition["value"]
    if value == []:
        raise ValueError(f"{name}: [] is a gradient without numbers; write at least one")
    for item in value if isinstance(value, list) else [value]:
        _check_scalar(name, item)


def _check_scalar(name: str, scalar: Setting) -> None:
    if isinstance(scalar, str) and scalar.lower() in _TRUE_WORDS | _FALSE_WORDS:
        return
    try:
        if not isinstance(scalar, bool | int | float | str):
            raise ValueError
        float(scalar)
    except (ValueError, OverflowError):  # an integer may be too large for a float
        raise ValueError(f"{name}: {shown(scalar)} is not a number") from None


def misfits(parameter: Parameter, setting: Setting) -> list[str]:
    """What is wrong with the numbers of a setting for `parameter`: kind and range, one line each.

    Gradients lie between their anchors, so anchors in the range keep every layer in it.
    """
    return [
        wrong for scalar in _scalars(setting) if (wrong := _misfit(parameter, scalar)) is not None
    ]


def unread_conditions(name: str, setting: Setting) -> list[str]:
    """Conditions that no tensor reaches, one line each: an earlier one matches all that they do."""
    if not isinstance(setting, list) or not all(isinstance(item, Mapping) for item in setting):
        return []
    filters = [_wanted(condition) for condition in setting]
    unread: list[str] = []
    for number, wanted in enumerate(filters):
        first = next((other for other in filters[:number] if other in wanted), None)
        if first is not None:
            this, that = (f"filter {one!r}" if one else "no filter" for one in (wanted, first))
            unread.append(f"{name}: the value with {this} (the one with {that} comes before)")
    return unread


def _wanted(condition: Mapping[str, Setting]) -> str:
    """What a tensor's name has to contain; "" for all names."""
    wanted = condition.get("filter")
    return "" if wanted in (None, "*") else str(wanted)


def _misfit(parameter: Parameter, scalar: object) -> str | None:
    name = parameter.name
    if parameter.kind is bool:
        try:
            as_flag(name, scalar)
        except ConfigError as error:
            return str(error)
        return None
    number = as_float(scalar)
    if parameter.kind is int and not number.is_integer():
        return f"{name}: {shown(scalar)} should be a whole number"
    bounded = math.isfinite(parameter.low) or math.isfinite(parameter.high)
    if bounded and not parameter.low <= number <= parameter.high:
        wanted = f"at least {parameter.low:g}"
        if math.isfinite(parameter.high):
            wanted = f"in [{parameter.low:g}, {parameter.high:g}]"
        return f"{name}: {shown(scalar)} should be {wanted}"
    return None


def _scalars(setting: Setting) -> Iterator[object]:
    if isinstance(setting, Mapping):
        yield from _scalars(setting["value"])
    elif isinstance(setting, list | tuple):
        for item in setting:
            yield from _scalars(item)
    else:
        yield setting


def resolve(
    levels: Iterable[Settings], parameter: Parameter, tensor: str, depth: float
) -> float | bool | None:
    """What `parameter` is for one tensor, from the first of `levels` that says so; else None.

    `tensor` is the name that filters are looked for in (plain substrings, first match wins);
    `depth` in [0, 1] is the place within the slice where gradients are read. Flags are read from 1,
    "yes" and the like, numbers from numeric strings and flags. Raises ConfigError for a flag of 0.5
    and the like.
    """
    for level in levels:
        if parameter.name in level:
            value = _select(level[parameter.name], tensor)
            if isinstance(value, list):
                return _gradient(parameter, value, depth)
            if value is not None:
                return _scalar(parameter, value)
    return None


def _scalar(parameter: Parameter, value: object) -> float | bool:
    return as_flag(parameter.name, value) if parameter.kind is bool else as_float(value)


def as_flag(parameter: str, value: object) -> bool:
    """A scalar of a recipe as a flag; ConfigError where it is neither true nor false."""
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in _TRUE_WORDS | {"1.0"}:
        return True
    if word in _FALSE_WORDS | {"0.0"}:
        return False
    raise ConfigError(f"{parameter}: {shown(value)} is neither true nor false")


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


def _select(setting: Setting, tensor: str) -> object | None:
    """The scalar or the gradient that is said for `tensor`; None where nothing is."""
    # dict and list, not Mapping and Sequence: asking an abstract class costs half of a plan's time.
    conditions = [setting] if isinstance(setting, dict) else setting
    if not isinstance(conditions, list):
        return conditions
    if not conditions:
        return None
    if not isinstance(conditions[0], dict):
        return conditions
    for condition in conditions:
        wanted = condition.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            value: object = condition["value"]
            return value
    return None


def _gradient(parameter: Parameter, anchors: Sequence[object], depth: float) -> float | bool:
    """The anchors as a piecewise linear function of `depth`; flags are not mixed but chosen."""
    place = depth * (len(anchors) - 1)
    index = math.floor(place)
    if index >= len(anchors) - 1:
        return _scalar(parameter, anchors[-1])
    if parameter.kind is bool:
        return _scalar(parameter, anchors[index])
    share = place - index
    return (1 - share) * as_float(anchors[index]) + share * as_float(anchors[index + 1])
