"""What goes to which stream, which files may be written, and how a command is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

from evomerge.errors import CandidateError, ConfigError, OutputExistsError

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def say(message: str) -> None:
    """One message to stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: object) -> None:
    """One document to stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def interrupted(message: str) -> typer.Exit:
    """What to raise where Ctrl-C ended a command, whose user is told `message`."""
    say(message)
    return typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """What engines print to stdout in the block goes to stderr, from their processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def engines_at_work() -> Iterator[None]:
    """What engines print goes to stderr, and nothing of what their libraries warn themselves of."""
    with stdout_for_results(), warnings.catch_warnings():
        # Of vLLM's and torch's own code: nothing that a reader could mend.
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def mistakes_of(recipe: Path) -> Iterator[None]:
    """Names the recipe's file in what is wrong with it; weights that give no model are wrong."""
    try:
        yield
    except OutputExistsError:
        raise
    except (ConfigError, CandidateError) as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{recipe}: {line}" for line in lines)) from error


def refuse_existing_file(path: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError where `path` is there and may not be replaced.

    ConfigError where its folder is not there.
    """
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path}: exists already; --overwrite replaces it")
    require_folder_of(path)


def require_folder_of(path: Path) -> None:
    """Raises ConfigError where the folder that `path` is to be written in is not there."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: cannot be written: there is no folder {path.parent}")


def refuse_input(out: Path, *references: str) -> None:
    """Raises OutputExistsError where `out` is what one of `references` names."""
    parts = [part for reference in references for part in (reference, *reference.split("+"))]
    if out.exists() and any(Path(part).expanduser().resolve() == out.resolve() for part in parts):
        raise OutputExistsError(f"{out}: is an input, too; choose another name")


def write_new(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes `text` to `path`. Raises ConfigError where that is not allowed or not possible."""
    refuse_existing_file(path, overwrite=overwrite)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def from_here(path: Path) -> Path:
    """The path as a person would write it: relative where it is inside the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
