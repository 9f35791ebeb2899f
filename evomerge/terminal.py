"""What every command shares: options, where studies are kept, what goes to which stream."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.errors import ConfigError, OutputExistsError

if TYPE_CHECKING:
    from evomerge.search.study import StudyConfig

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended

STORAGE_VARIABLE = "EVOMERGE_STORAGE"
DEFAULT_STORAGE = "evol_merge_storage"

StorageOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help=f"Where studies are kept; else ${STORAGE_VARIABLE}, else ./{DEFAULT_STORAGE}.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there already.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def storage_directory(option: Path | None, study: StudyConfig | None = None) -> Path:
    """Where studies are kept: the option, else the study's own key, else the environment's.

    What a study's file says starts at the file's folder, as all its relative paths do.
    """
    if option is None and study is not None and study.storage.directory:
        return study.folder / Path(study.storage.directory).expanduser()
    named = option or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE
    return Path(named).expanduser()


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


def write_new(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes `text` to `path`. Raises ConfigError where that is not allowed or not possible."""
    refuse_existing_file(path, overwrite=overwrite)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


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


def say(message: str) -> None:
    """One message to stderr."""
    print(message, file=sys.stderr, flush=True)
