"""What is wrong with a value of a user's file, in words of the file: pydantic's are of Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pydantic_core import ErrorDetails

from evomerge.errors import nearest, shown

Location = Sequence[int | str]

# What a value should be, by pydantic's names of mistakes; {…} is what pydantic tells with them.
_WANTED = {
    "string_type": "should be a text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping of keys to values",
    "model_type": "should be a mapping of keys to values",
    "too_short": "should have at least {min_length}",
    "too_long": "should have at most {max_length}",
    "string_too_short": "should not be empty",
    "greater_than": "should be above {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be below {lt}",
    "less_than_equal": "should be at most {le}",
    "literal_error": "should be {expected}",
}
# Where pydantic marks that a key is meant, not its value.
_KEY = "[key]"


def complaint(
    mistake: ErrorDetails, keys_at: Callable[[Location], Sequence[str]], *, cutoff: float = 0.6
) -> str:
    """One mistake as "place: what is wrong and what would be right".

    `keys_at` are the keys that a place in the file may have; `cutoff` as in `nearest`.
    """
    location = mistake["loc"]
    is_key = location[-1:] == (_KEY,)
    if mistake["type"] == "extra_forbidden" or (is_key and mistake["type"] == "literal_error"):
        *above, key = location[:-1] if is_key else location
        return f"{_placed(location)}unknown key{nearest(str(key), keys_at(above), cutoff=cutoff)}"
    if is_key or mistake["type"] == "invalid_key":
        return f"{_placed(location)}the key {shown(mistake['input'])} should be a text"
    if mistake["type"] == "missing":
        return f"{_placed(location)}is missing"
    if mistake["type"] == "value_error":
        return _placed(location) + mistake["msg"].removeprefix("Value error, ")
    wanted = _wanted(mistake)
    if mistake["type"] == "model_type":
        wanted += f" ({', '.join(keys_at(location))})"
    if mistake["input"] is None:
        return f"{_placed(location)}has no value; it {wanted}"
    return f"{_placed(location)}{wanted} (given: {shown(mistake['input'])})"


def only_follows(mistake: ErrorDetails, mistakes: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short because a wrong item of it was not counted."""
    place = mistake["loc"]
    return mistake["type"] == "too_short" and any(
        len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in mistakes
    )


def _placed(location: Location) -> str:
    parts = [str(part) for part in location if part != _KEY]
    return f"{'.'.join(parts)}: " if parts else ""


def _wanted(mistake: ErrorDetails) -> str:
    context: Mapping[str, object] = mistake.get("ctx", {})
    counts = {
        name: "1 entry" if context[name] == 1 else f"{context[name]} entries"
        for name in ("min_length", "max_length")
        if name in context
    }
    wording = _WANTED.get(mistake["type"])
    return mistake["msg"] if wording is None else wording.format(**{**context, **counts})
