"""Folders that are whole or absent: filled beside their place, put there when they are whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from evomerge.errors import ConfigError, OutputExistsError, RunError
from evomerge.merge.model_files import CONFIG_FILE

MARKER_FILE = ".evomerge-partial"


def disk_failure(path: Path, error: OSError) -> RunError:
    """The error to raise for an OSError while writing to `path`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: the disk is full ({reason}); free some space and run it again")
    return RunError(f"{path}: writing failed ({reason})")


@contextmanager
def published(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` only when the block ends without an error.

    So a directory that exists is whole; what a killed writer leaves behind ends in `.partial`, and
    the next writer removes it. What it replaces is `.replaced` until it is gone, marked as ours.
    Raises OutputExistsError, before the block runs, where `directory` is there, not empty and not
    to be overwritten; ConfigError where it cannot be made, or a folder of others has such a name.
    """
    directory = directory.absolute()
    _refuse_taken(directory, overwrite=overwrite)
    partial = directory.with_name(directory.name + ".partial")
    with ExitStack() as stack:
        try:
            _remove_if_ours(partial)
            if _is_filled(directory):
                _remove_if_ours(_replaced(directory))
            partial.mkdir(parents=True)
            stack.enter_context(_marked(partial))
        except OSError as error:
            raise ConfigError(
                f"{partial}: cannot be made ({error.strerror}); choose another folder"
            ) from error
        try:
            yield partial
            _replace(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError where `directory` is taken; `overwrite` replaces models alone."""
    _refuse_taken(directory, overwrite=overwrite)
    if _is_filled(directory) and not (directory / CONFIG_FILE).is_file():
        raise OutputExistsError(
            f"{directory}: is not empty and no model directory, so it is not replaced; "
            "choose another name"
        )


def _refuse_taken(directory: Path, *, overwrite: bool) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OutputExistsError(f"{directory}: exists and is no folder; choose another name")
    if not overwrite and _is_filled(directory):
        raise OutputExistsError(
            f"{directory}: exists and is not empty; choose another name or say --overwrite"
        )


def _is_filled(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _replaced(directory: Path) -> Path:
    """Where the old `directory` is while the new one takes its place."""
    return directory.with_name(directory.name + ".replaced")


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Our marker in `folder`, locked as long as its writer lives."""
    with (folder / MARKER_FILE).open("w", encoding="utf-8") as marker:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.lockf(marker, fcntl.LOCK_EX)
        marker.write(f"{os.getpid()}\n")
        marker.flush()
        yield


def _remove_if_ours(folder: Path) -> None:
    """Removes what a killed writer left; raises ConfigError where that is not what is there."""
    if not folder.exists():
        return
    marker = folder / MARKER_FILE
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # killed before it could be marked, or after all but it was gone
        return
    if not marker.is_file():
        raise ConfigError(f"{folder}: is in the way and not ours; move or remove it")
    with marker.open("r+", encoding="utf-8") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: process {opened.read().strip()} is writing it; wait for its end"
            ) from None
        _remove_marked(folder)


def _remove_marked(folder: Path) -> None:
    """Removes `folder`, its marker last: what a kill leaves of it is known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER_FILE:
            path.unlink()
    shutil.rmtree(folder)


def _replace(partial: Path, directory: Path) -> None:
    """Renames `partial` to `directory`; what was there goes only when the new one is whole."""
    try:
        if not _is_filled(directory):
            _rename_marked(partial, directory)
            return
        replaced = _replaced(directory)
        with _marked(directory):
            directory.rename(replaced)
            _rename_marked(partial, directory)
            _remove_marked(replaced)
    except OSError as error:
        raise disk_failure(directory, error) from error


def _rename_marked(partial: Path, directory: Path) -> None:
    partial.rename(directory)  # a rename onto an empty folder replaces it
    (directory / MARKER_FILE).unlink()
