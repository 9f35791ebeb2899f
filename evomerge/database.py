"""The database of a storage directory: every study's events, answers and grades (`schema.py`).

SQLite in WAL mode inside the directory, or PostgreSQL by URL. Opening creates what is missing,
brings up what an older evomerge wrote and refuses what a newer one did.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import sqlalchemy as sql
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)

from evomerge import schema
from evomerge.errors import ConfigError, RunError

FILE_NAME = "evomerge.db"

# What a run writes before anything is worth keeping: SQLite's own files and a generation's answers.
_NEEDED_BYTES = 4_000_000
_BUSY_SECONDS = 60
# Where WAL's shared memory is not shared between machines (sqlite.org/wal.html, "Disadvantages").
_NETWORK_FILE_SYSTEMS: tuple[str, ...] = (
    "nfs",
    "nfs4",
    "cifs",
    "smb",
    "smb2",
    "smb3",
    "9p",
    "afs",
    "ceph",
)
_NETWORK_FILE_SYSTEMS += ("lustre", "gpfs", "beegfs", "glusterfs", "fuse.sshfs", "fuse.s3fs")
_NETWORK_FILE_SYSTEMS += ("fuse.glusterfs", "fuse.gcsfuse", "fuse.juicefs")

Database: TypeAlias = sql.Engine


def open_database(directory: Path, url: str | None = None) -> Database:
    """The database of storage `directory`, or the one at `url`, with the tables of this version.

    Raises ConfigError where it cannot be written or reached, where a newer version wrote it, or
    where the file is no database; the message never shows a password.
    """
    if url is None:
        check_writable(directory)
        directory.mkdir(parents=True, exist_ok=True)
    where = _place(directory, url)
    with _cannot_be_opened(where):
        engine = _sqlite_engine(directory) if url is None else sql.create_engine(url)
        with _let_go_on_failure(engine), engine.begin() as connection:
            _create_or_check(connection, where)
    return engine


def open_for_reading(directory: Path, url: str | None = None) -> Database:
    """The database that is there, for queries alone: also where the disk is full or read-only.

    What an older evomerge wrote is brought up first, which needs a place to write. Raises
    ConfigError as `open_database` does, and where it holds no tables of evomerge.
    """
    where = _place(directory, url)
    with _cannot_be_opened(where):
        engine = _sqlite_reader(directory) if url is None else sql.create_engine(url)
        with _let_go_on_failure(engine), engine.connect() as connection:
            found = schema.found_version(connection)
            if found is None:
                raise ConfigError(f"{where}: holds no tables of evomerge")
            _check_not_newer(found, where)
    if found < schema.VERSION:
        engine.dispose()
        return open_database(directory, url)
    return engine


@contextmanager
def _let_go_on_failure(engine: Database) -> Iterator[None]:
    """Closes the connections of an engine that the block refuses."""
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


@contextmanager
def can_be_read(where: str) -> Iterator[None]:
    """Turns a database that fails while it is read (damaged, gone) into a ConfigError saying so."""
    try:
        yield
    except DBAPIError as error:
        raise ConfigError(f"{where}: cannot be read: {_cause(error)}") from error


def has_database(directory: Path) -> bool:
    """Whether a SQLite database lies in storage `directory`."""
    return (directory / FILE_NAME).is_file()


def check_writable(directory: Path) -> None:
    """Raises ConfigError unless a run can write in `directory`, which need not exist yet.

    Leaves no trace.
    """
    candidates = (directory, *directory.absolute().parents)
    existing = next(folder for folder in candidates if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"storage: {directory}: {existing} is a file; a directory is needed")
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"\0" * 65_536)
            probe.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise ConfigError(f"storage: {directory} is not writable: {error.strerror}") from error
    if free < _NEEDED_BYTES:
        raise ConfigError(
            f"storage: the disk of {directory} is full: {free / 1e6:.1f} MB are free, "
            f"{_NEEDED_BYTES / 1e6:.0f} MB at least are needed"
        )


@contextmanager
def locked(database: Database, name: str) -> Iterator[bool]:
    """Whether this process alone holds the lock `name` of a PostgreSQL database in the block.

    True without asking for other databases, which one machine's files lock. The lock is held by a
    connection of its own and ends with this process, however that ends.
    """
    if database.dialect.name != "postgresql":
        yield True
        return
    own = sql.create_engine(database.url, poolclass=sql.NullPool, isolation_level="AUTOCOMMIT")
    digest = hashlib.sha256(f"evomerge study {name}".encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    with own.connect() as connection, _kept_from_children(connection):
        yield _takes_lock(connection, key)


def _takes_lock(connection: sql.Connection, key: int) -> bool:
    # More than one attempt: a server may take a moment to see that a killed process is gone.
    for wait in (0.1, 0.3, 0.6, 0.0):
        if connection.scalar(sql.select(sql.func.pg_try_advisory_lock(key))):
            return True
        time.sleep(wait)
    return False


@contextmanager
def _kept_from_children(connection: sql.Connection) -> Iterator[None]:
    """Forked children have no hand on the connection: one that outlives us would keep it open."""
    driver = connection.connection.driver_connection
    assert driver is not None
    sockets = [driver.fileno()]

    def let_go() -> None:
        for number in sockets:
            # Not closed: the number would be given to another file, and libpq might write to it.
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)

    os.register_at_fork(after_in_child=let_go)
    try:
        yield
    finally:
        sockets.clear()


@contextmanager
def stops_the_run(where: str) -> Iterator[None]:
    """Turns a storage that fails in the middle of a run (full, gone) into a RunError saying so.

    A statement that the database refuses for what it says is a bug, and stays what it is.
    """
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (DBAPIError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # somebody stopped reading our output: no matter of the storage
        raise RunError(
            f"{where}: writing failed: {_cause(error)}; nothing finished before is lost: "
            "make room or repair it, then resume the study"
        ) from error


def _sqlite_engine(directory: Path) -> Database:
    path = directory / FILE_NAME
    engine = sql.create_engine(
        sql.URL.create("sqlite", database=str(path)), connect_args={"timeout": _BUSY_SECONDS}
    )
    wanted = "delete" if _on_network(directory) else "wal"

    @sql.event.listens_for(engine, "connect")
    def set_pragmas(connection: sql.engine.interfaces.DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA journal_mode={wanted}")
        found = [str(row[0]) for row in cursor.fetchall()]
        # A commit under NORMAL survives every kill; without WAL a power cut needs FULL.
        cursor.execute(f"PRAGMA synchronous={'NORMAL' if wanted == 'wal' else 'FULL'}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()
        if found != [wanted]:
            raise ConfigError(
                f"{path}: SQLite's journal mode is {found} here, not {wanted}; put the storage on "
                "a local disk, or use PostgreSQL (storage: {directory: DIR, database_env: NAME})"
            )

    return engine


def _sqlite_reader(directory: Path) -> Database:
    """An engine that makes no file; it sees what a process at work has committed."""
    path = directory / FILE_NAME
    engine = _existing_sqlite(path, {"mode": "rw"})
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema")
    except OperationalError:
        engine.dispose()
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise
        # There is no room for WAL's shared memory, nor need: nobody is at work on the file.
        return _existing_sqlite(path, {"mode": "ro", "immutable": "1"})
    return engine


def _existing_sqlite(path: Path, options: Mapping[str, str]) -> Database:
    url = sql.URL.create("sqlite", database=f"file:{quote(str(path.absolute()))}")
    url = url.update_query_dict({"uri": "true", **options})
    return sql.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})


def _on_network(directory: Path) -> bool:
    """Whether `directory` lies on a file system that other machines share (known on Linux only)."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    target = os.path.realpath(directory)
    best, kind = "", ""
    for line in mounts:
        point, file_system = line.split()[1:3]
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, file_system
    return kind in _NETWORK_FILE_SYSTEMS


def _create_or_check(connection: sql.Connection, where: str) -> None:
    # Two studies may open a fresh storage at once: the second waits here for the first.
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7313)")
    found = schema.found_version(connection)
    if found is None:
        schema.create(connection)
    elif found < schema.VERSION:
        schema.bring_up(connection, found)
    else:
        _check_not_newer(found, where)


def _check_not_newer(found: int, where: str) -> None:
    if found > schema.VERSION:
        raise ConfigError(
            f"{where}: its schema has version {found}, this evomerge knows version "
            f"{schema.VERSION}; use the evomerge that wrote it, or another storage"
        )


def _place(directory: Path, url: str | None) -> str:
    return str(directory / FILE_NAME) if url is None else _without_password(url)


@contextmanager
def _cannot_be_opened(where: str) -> Iterator[None]:
    try:
        yield
    except (DatabaseError, NoSuchModuleError, ImportError, OSError) as error:
        raise ConfigError(f"{where}: the database cannot be opened: {_cause(error)}") from error


def _without_password(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except sql.exc.ArgumentError as error:
        raise ConfigError(
            "the database URL cannot be read; right is postgresql+psycopg://user:password@host/name"
        ) from error


def _cause(error: BaseException) -> str:
    """The driver's own words, in one line, without SQL and parameters."""
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else repr(original)
