"""A study's place in a storage: its log, its lock, and the files that follow from its log."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from evomerge.database import (
    can_be_read,
    check_writable,
    has_database,
    locked,
    open_database,
    open_for_reading,
    stops_the_run,
)
from evomerge.errors import ConfigError
from evomerge.search.log import EventLog, study_names
from evomerge.search.study import study_directory

_LOCK = "lock"
_OWNER = "owner"
_PARTIAL = ".partial"
# What engines write their candidates to, where these cannot be loaded live.
SCRATCH = "scratch"
STUDY_FILE = "study.yaml"


def database_url(database_env: str | None, environment: Mapping[str, str]) -> str | None:
    """The database's URL in the variable of that name; None for SQLite. ConfigError if unset."""
    if database_env is None:
        return None
    url = environment.get(database_env)
    if not url:
        raise ConfigError(
            f"storage.database_env: the variable {database_env} is not set; it should hold "
            "the URL of a database, as postgresql+psycopg://user:password@host/name"
        )
    return url


def open_log(storage: Path, name: str) -> EventLog | None:
    """The log of study `name`, to be read; None where there is none.

    It is wherever the study's study.yaml says. Raises ConfigError where that cannot be read.
    """
    asked = database_env_of(study_directory(storage, name))
    if asked is None and not has_database(storage):
        return None
    url = database_url(asked, os.environ)
    with can_be_read(f"study {name}"):
        return EventLog(open_for_reading(storage, url), name)


def stored_names(storage: Path) -> list[str]:
    """The names of all studies of a storage, those of its own database first.

    Raises ConfigError where that cannot be read and there are no folders, either.
    """
    folders = [path.parent.name for path in sorted((storage / "studies").glob(f"*/{STUDY_FILE}"))]
    try:
        names = _names_in_database(storage) if has_database(storage) else []
    except ConfigError:
        if not folders:
            raise
        names = []
    return list(dict.fromkeys([*names, *folders]))


def _names_in_database(storage: Path) -> list[str]:
    database = open_for_reading(storage)
    try:
        with can_be_read(str(storage)):
            return study_names(database)
    finally:
        database.dispose()


@contextmanager
def held_in_database(storage: Path, name: str, database_env: str | None) -> Iterator[None]:
    """No other machine works on study `name` in the block, where a database server has it.

    Raises ConfigError naming the process that does.
    """
    url = database_url(database_env, os.environ)
    if url is None:
        yield
        return
    database = open_database(storage, url)
    try:
        with locked(database, name) as alone:
            if not alone:
                opened = EventLog(database, name).history.opened or {}
                who = f"process {opened['process']}" if "process" in opened else "another process"
                raise ConfigError(
                    f"study {name}: {who} is at work on it (it holds its lock in the database of "
                    f"{database_env}); wait for it or end it, then start again"
                )
            yield
    finally:
        database.dispose()


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """The study in `directory` (STORAGE/studies/NAME) is this process's; a second one is refused.

    A study that did not begin by the end of the block leaves no folder behind; what a killed
    process left half-made is removed. The lock is the
    process's own: engine processes that it starts do not inherit it, and it is gone with the
    process, however that ends.
    """
    check_writable(directory.parents[1])
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    # A POSIX record lock: unlike flock's, it is not passed on to children. The price: it is lost
    # when this process closes any other handle of the file, so nothing else opens it.
    handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(handle, directory)
        _sweep(directory)
        write_whole(directory / _OWNER, json.dumps(_this_process()))
        try:
            yield
        except BaseException:
            _sweep(directory)
            _leave_nothing(directory, made)
            raise
        finally:
            _sweep(directory)
            (directory / _OWNER).unlink(missing_ok=True)
    finally:
        os.close(handle)


def is_held(directory: Path) -> bool:
    """Whether a process is at work on the study in `directory`."""
    owner = _owner(directory)
    if owner is None:
        return False
    # Asking needs a handle, and closing that would give up a lock of our own.
    if owner == _this_process():
        return True
    try:
        handle = os.open(directory / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _is_locked(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Replaces the file `path` by one with `text`, unless it says so; no moment shows a part."""
    with stops_the_run(str(path)):
        if path.is_file() and path.read_bytes() == text.encode():
            return
        handle, partial = tempfile.mkstemp(_PARTIAL, f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).chmod(0o644)
            Path(partial).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(partial).unlink()
            raise


def study_file_text(begun: Mapping[str, Any]) -> str:
    """What study.yaml says: what was asked and resolved, with versions and seeds."""
    text = yaml.safe_dump(dict(begun), sort_keys=False, allow_unicode=True, width=100)
    return f"# What this study was asked and found; kept for the reader.\n{text}"


def database_env_of(directory: Path) -> str | None:
    """The variable with the URL of the database that holds the study in `directory`, if any."""
    try:
        content = yaml.safe_load((directory / STUDY_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    try:
        name = content["study"]["storage"]["database_env"]
    except (KeyError, TypeError):
        return None
    return str(name)


def _sweep(directory: Path) -> None:
    """Removes what only a run at work needs, of the study that this process holds."""
    shutil.rmtree(directory / SCRATCH, ignore_errors=True)
    for partial in directory.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            partial.unlink()


def _lock(handle: int, directory: Path) -> None:
    # More than one attempt: `is_held`, in another process, takes the lock for a moment.
    for wait in (0.05, 0.1, 0.2, 0.0):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(wait)
        except OSError as error:
            raise ConfigError(
                f"{directory / _LOCK}: this file system cannot lock files: {error.strerror}; "
                "put the storage on one that can"
            ) from error
        else:
            return
    owner = _owner(directory)
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    raise ConfigError(
        f"study {directory.name}: {who} is at work on it (it holds {directory / _LOCK}); "
        "wait for it or end it, then start again"
    )


def _is_locked(handle: int) -> bool:
    """Whether another process holds the lock on a file (by taking a shared one for a moment)."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _this_process() -> dict[str, Any]:
    """What tells this process from every other, also from one that bore its number before."""
    started = ""
    with suppress(OSError, IndexError):
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        started = stat.rpartition(")")[2].split()[19]  # proc_pid_stat(5): field 22, starttime
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _owner(directory: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads((directory / _OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and {"pid", "host"} <= owner.keys() else None


def _leave_nothing(directory: Path, made: Sequence[Path]) -> None:
    """Removes what only the lock needed: a study that did not begin leaves no folder behind."""
    if directory not in made or (directory / STUDY_FILE).exists():
        return
    with suppress(OSError):
        (directory / _OWNER).unlink(missing_ok=True)
        (directory / _LOCK).unlink()
        for folder in made:
            folder.rmdir()  # refuses a folder that holds anything: then it stays
