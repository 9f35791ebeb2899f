"""What can go wrong, by whose fault it is."""

from __future__ import annotations


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
