"""What can go wrong, by whose fault it is."""

from __future__ import annotations

from collections.abc import Iterable

_NAMED_AT_MOST = 40


class EvomergeError(Exception):
    """An error with a message for the user: the CLI prints it without a traceback."""

    exit_status = 1


class ConfigError(EvomergeError):
    """The input is wrong: the message names file, key, value and what would be right."""

    exit_status = 2


class OutputExistsError(ConfigError):
    """The place to write to is taken, and nobody said that it may be overwritten."""


class RunError(EvomergeError):
    """The run cannot go on for a reason that is not a candidate's own (disk full, engine gone)."""


class CandidateError(EvomergeError):
    """One candidate could not be made or scored: a state of its trial, never a score."""


class EngineDiedError(EvomergeError):
    """The engine is gone or broken: it must be opened again before anything else is asked of it."""


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown `word`: the known one it is like, or some of all.

    `cutoff` in [0, 1] is how like it has to be (`difflib.get_close_matches`).
    """
    words = list(known)
    import difflib

    close = difflib.get_close_matches(word[:100], words, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = len(words) - _NAMED_AT_MOST
    named = ", ".join(words[:_NAMED_AT_MOST])
    return f"; known are {named} and {more} more" if more > 0 else f"; known are {named}"


def shown(value: object, *, longest: int = 200) -> str:
    """`value` as a message quotes it: its repr, cut where that is longer than a line should be."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def reason_of(error: Exception) -> str:
    """Why a library could not read a file, in one line: in its words where they are for people."""
    if isinstance(error, AttributeError | IndexError | KeyError | TypeError):
        return f"a value in its files is not of the kind that belongs there ({error!r})"
    return (str(error) or repr(error)).splitlines()[0]
