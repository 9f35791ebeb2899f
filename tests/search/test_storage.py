from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from evomerge import schema
from evomerge.database import check_writable, open_database, open_for_reading
from evomerge.errors import ConfigError, RunError
from evomerge.evaluate.ledger import UnitKey, mean_grade
from evomerge.evaluate.task import ScorerGrade, TaskResult, Usage
from evomerge.optimizer import events as event
from evomerge.schema import answers, events, grades
from evomerge.search.log import EventLog, Measurement
from evomerge.search.loop import run_search
from evomerge.search.status import list_studies, study_status, trial_recipe
from evomerge.search.storage import held, is_held, stored_names, write_whole
from evomerge.search.study import StudyConfig
from tests.search.formula import opener


def result(task: str, grade: float | None = 0.5, answer: str = "a") -> TaskResult:
    return TaskResult(task, "p", answer, "stop", grade, 0.1, "v")


def scored(candidate: str, results: list[TaskResult]) -> event.Event:
    measurement = Measurement(0.5, len(results), 0, 0, "recipe", {"generate": 0.1})
    return event.scored("search", measurement, UnitKey(candidate, 0, "r", "s", "exact"), results)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(open_database(tmp_path), "study")
    yield log
    log.close()


def reopened(log: EventLog, tmp_path: Path) -> EventLog:
    log.close()
    return EventLog(open_database(tmp_path), "study")


def count(tmp_path: Path, table: sql.Table) -> int:
    engine = open_database(tmp_path)
    with engine.connect() as connection:
        number = connection.scalar(sql.select(sql.func.count()).select_from(table))
    engine.dispose()
    assert number is not None
    return int(number)


def test_the_database_is_sqlite_in_wal_mode_with_a_schema_version(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "new")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # NORMAL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        version = connection.exec_driver_sql("SELECT version FROM evomerge_schema").scalar()
    engine.dispose()
    assert version == schema.VERSION == 2
    tables = {"evomerge_schema", "studies", "events", "answers", "grades", "replies"}
    assert set(schema.metadata.tables) == tables


def test_a_grade_is_kept_with_what_it_is_made_of(log: EventLog, tmp_path: Path) -> None:
    parts = (
        ScorerGrade("judge", 4.0, "GRADE: 4\0", Usage(100, 10, 0.5), turn=1),
        ScorerGrade("chrf", 0.25),
    )
    one = replace(result("a", 0.7), details=parts, gates=("length",), earlier=("first",))
    log.append(scored("trial 0", [one, result("b", 0.2)]))
    assert log.grades(["trial 0"]) == {"trial 0": {"a": 0.7, "b": 0.2}}
    engine = open_database(tmp_path)
    with engine.connect() as connection:
        rows = connection.execute(sql.select(grades).order_by(grades.c.id)).all()
        answer = connection.execute(sql.select(answers).order_by(answers.c.id)).first()
    engine.dispose()
    assert [(row.scorer, row.grade, row.total, row.turn) for row in rows] == [
        ("exact", 0.7, True, 0),
        ("judge", 4.0, False, 1),
        ("chrf", 0.25, False, 0),
        ("exact", 0.2, True, 0),
    ]
    assert (rows[1].reply, rows[1].prompt_tokens, rows[1].cost) == ("GRADE: 4\ufffd", 100, 0.5)
    assert answer is not None
    assert (answer.gates, answer.earlier) == ('["length"]', '["first"]')


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    open_database(tmp_path).dispose()
    with sqlite3.connect(tmp_path / "evomerge.db") as connection:
        connection.execute("UPDATE evomerge_schema SET version = 3")
    connection.close()
    for open_it in (open_database, open_for_reading):
        with pytest.raises(
            ConfigError, match="its schema has version 3, this evomerge knows version 2"
        ):
            open_it(tmp_path)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evomerge.db").write_text("not a database, but long enough to look at" * 10)
    with pytest.raises(ConfigError, match=r"evomerge\.db: the database cannot be opened"):
        open_database(tmp_path)


def test_a_storage_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; a directory is needed"):
        check_writable(tmp_path / "file" / "storage")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder nobody can write")
def test_a_storage_that_is_not_writable_is_refused() -> None:
    with pytest.raises(ConfigError, match="storage: /proc/evomerge is not writable"):
        check_writable(Path("/proc/evomerge"))


def test_a_full_disk_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 100_000})()  # noqa: E731
    monkeypatch.setattr("evomerge.database.shutil.disk_usage", usage)
    with pytest.raises(ConfigError, match=r"is full: 0\.1 MB are free, 4 MB at least are needed"):
        check_writable(tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def test_a_study_is_read_where_the_disk_is_full(
    study: Callable[..., StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    monkeypatch.setattr("evomerge.database._NEEDED_BYTES", 1 << 80)
    with pytest.raises(ConfigError, match="is full"):
        check_writable(tmp_path)
    status = study_status(tmp_path, "formula")
    assert status == {**outcome.status, "judges": [], "gates": status["gates"]}


def test_reading_a_database_makes_no_file_and_changes_none(log: EventLog, tmp_path: Path) -> None:
    log.append(event.begun({"study": {}}))
    log.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    engine = open_for_reading(tmp_path)
    assert EventLog(engine, "study").history == log.history
    engine.dispose()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_for_reading(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_damaged_database_hides_no_study(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    (tmp_path / "evomerge.db").write_text("no database" * 100)
    (listed,) = list_studies(tmp_path)
    assert (listed["study"], listed["state"]) == ("formula", "unreadable")
    assert "the database cannot be opened" in listed["reason"]


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError) as caught:
        open_database(tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith("postgresql+psycopg://me:***@127.0.0.1:1/none: ")


def test_floats_come_back_bit_by_bit(log: EventLog, tmp_path: Path) -> None:
    genome = [0.1 + 0.2, 5e-324, -0.0, math.pi * 1e300, 1 / 3]
    log.append(*event.generation(0, {0: genome}), event.told(0, [(0, 2 / 3)]))
    history = reopened(log, tmp_path).history
    assert [gene.hex() for gene in history.genomes[0]] == [gene.hex() for gene in genome]
    assert history.told == {0: [(0, 2 / 3)]}


def test_the_history_while_writing_is_the_one_that_is_read(log: EventLog, tmp_path: Path) -> None:
    log.append(event.begun({"study": {"models": ["m"]}, "tasks": ("a", "b")}))
    budget, asked = ({"trials": trials, "task_evaluations": None} for trials in (9, 8))
    log.append(event.opened(budget=budget, asked_budget=asked, process="1", engine_start=0.5))
    log.append(*event.generation(0, {0: [0.5], 1: [0.25]}))
    log.append(scored("trial 0", [result("a")]))
    log.append(event.failed("trial 1", "search", "NaN", {"switch": 0.25}))
    log.append(event.stopped("full", [("trial 1", "search")]))
    log.append(event.finished({"source": "trial", "number": 0}, budget, {"log": 0.125}, None))
    assert reopened(log, tmp_path).history == log.history
    assert log.history.seconds == {"engine": 0.5, "generate": 0.1, "switch": 0.25, "log": 0.125}


def test_a_unit_is_written_whole_or_not_at_all(log: EventLog, tmp_path: Path) -> None:
    twice = scored("trial 0", [result("a"), result("b"), result("a")])
    with pytest.raises(IntegrityError):
        log.append(twice)
    assert [count(tmp_path, table) for table in (events, answers, grades)] == [0, 0, 0]
    assert log.history.scores == {}
    log.append(scored("trial 0", [result("a"), result("b")]))
    assert [count(tmp_path, table) for table in (events, answers, grades)] == [1, 2, 2]


@pytest.mark.parametrize(
    "again",
    [
        scored("trial 0", [result("c")]),
        event.generation(0, {7: [0.0]})[0],
        event.generation(9, {0: [0.0]})[1],
        event.told(0, [(0, 0.0)]),
    ],
    ids=["scored", "generation", "proposed", "told"],
)
def test_nothing_is_recorded_twice(log: EventLog, again: event.Event) -> None:
    log.append(*event.generation(0, {0: [0.5]}), scored("trial 0", [result("a")]))
    log.append(event.told(0, [(0, 0.5)]))
    with pytest.raises(IntegrityError):
        log.append(again)


def test_answers_that_no_database_takes_are_kept_with_marks(log: EventLog, tmp_path: Path) -> None:
    log.append(scored("trial 0", [result("a", answer="x\0y \ud800 \U0001f600 é")]))
    engine = open_database(tmp_path)
    with engine.connect() as connection:
        (answer,) = connection.scalars(sql.select(answers.c.answer))
    engine.dispose()
    assert answer == "x�y � \U0001f600 é"


def test_the_score_is_the_mean_of_the_grades_there_are() -> None:
    tenths = [result(str(index), 0.1) for index in range(10)]
    assert mean_grade(tenths) == 0.1  # a plain sum of ten is 0.9999999999999999
    assert mean_grade([result("a", 1.0), result("b", None), result("c", 0.0)]) == 0.5
    assert mean_grade([result("a", None)]) is None


def test_a_held_study_is_known_as_such_by_its_own_process(tmp_path: Path) -> None:
    directory = tmp_path / "studies" / "s"
    assert not is_held(directory)
    with held(directory):
        assert is_held(directory)
        assert json.loads((directory / "owner").read_text())["pid"] == os.getpid()
        (directory / "study.yaml").write_text("")
    assert not is_held(directory)
    assert (directory / "lock").exists()


def test_the_folder_of_a_study_that_never_began_is_gone(tmp_path: Path) -> None:
    with held(tmp_path / "storage" / "studies" / "s"):
        pass
    (tmp_path / "storage" / "studies" / "s" / "study.yaml").write_text("")
    with pytest.raises(KeyError), held(tmp_path / "fresh" / "studies" / "s"):
        raise KeyError
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(KeyError), held(tmp_path / "storage" / "studies" / "s"):
        raise KeyError
    assert (tmp_path / "storage" / "studies" / "s" / "study.yaml").exists()


def test_what_a_killed_run_left_half_made_is_gone_before_and_after_the_next(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "studies" / "s"
    (directory / "scratch" / "candidate").mkdir(parents=True)
    (directory / ".best_config.yaml.abcd.partial").write_text("half")
    (directory / "best_config.yaml").write_text("whole")
    with held(directory):
        names = {path.name for path in directory.iterdir()}
        assert names == {"lock", "owner", "best_config.yaml"}
        (directory / "scratch").mkdir()
    assert {path.name for path in directory.iterdir()} == {"lock", "best_config.yaml"}


def test_temporary_files_are_named_so_that_they_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "studies" / "s"
    directory.mkdir(parents=True)

    def killed(self: Path, target: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        patched.setattr(Path, "unlink", lambda self: None)
        with pytest.raises(SystemExit):
            write_whole(directory / "best_config.yaml", "half")
    assert len(list(directory.iterdir())) == 1
    with held(directory):
        pass
    assert [path.name for path in directory.iterdir()] == ["lock"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    write_whole(path, "first\n")
    write_whole(path, "second\n")
    assert path.read_text() == "second\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.yaml"]
    with pytest.raises(RunError, match="writing failed"):
        write_whole(tmp_path / "absent" / "best.yaml", "")


def test_a_search_with_postgresql_is_the_search_with_sqlite(
    study: Callable[..., StudyConfig],
    tmp_path: Path,
    postgresql: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUDIES_URL", postgresql)
    asked = study(storage={"database_env": "STUDIES_URL"})
    storage = tmp_path / "pg"
    run_search(asked, storage=storage, open_evaluator=opener(), trials=12)
    resumed = run_search(asked, storage=storage, open_evaluator=opener(), trials=24)
    plain = run_search(study(), storage=tmp_path / "sqlite", open_evaluator=opener())
    genomes = [trial["genome"] for trial in resumed.status["trials"]]
    assert genomes == [trial["genome"] for trial in plain.status["trials"]]
    assert resumed.status["outcome"] == plain.status["outcome"]
    # By the storage alone: its study.yaml names the variable, not what is in it.
    status = study_status(storage, "formula")
    assert status == {**resumed.status, "judges": [], "gates": status["gates"]}
    assert trial_recipe(storage, "formula") == plain.recipe
    assert [listed["trials"] for listed in list_studies(storage)] == [24]
    assert stored_names(storage) == ["formula"]
    assert not (storage / "evomerge.db").exists()
    assert postgresql not in (storage / "studies" / "formula" / "study.yaml").read_text()
    monkeypatch.delenv("STUDIES_URL")
    with pytest.raises(ConfigError, match="the variable STUDIES_URL is not set"):
        study_status(storage, "formula")
    run_search(study(study="local"), storage=storage, open_evaluator=opener(), trials=6)
    local, gone = list_studies(storage)
    assert (local["study"], local["state"], local["trials"]) == ("local", "finished", 6)
    assert (gone["study"], gone["state"], gone["trials"]) == ("formula", "unreadable", None)
    assert "the variable STUDIES_URL is not set" in gone["reason"]


def test_a_study_of_a_database_server_is_one_machines_at_a_time(
    study: Callable[..., StudyConfig],
    tmp_path: Path,
    postgresql: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two storages stand for two machines; the first one's process forks and is killed."""
    monkeypatch.setenv("STUDIES_URL", postgresql)
    asked = study(study="shared", storage={"database_env": "STUDIES_URL"})
    run_search(asked, storage=tmp_path / "one", open_evaluator=opener(), trials=6)
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from evomerge.search.storage import held_in_database\n"
        "with held_in_database(Path(sys.argv[1]), 'shared', 'STUDIES_URL'):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        try:
            with pytest.raises(ConfigError) as caught:
                run_search(asked, storage=tmp_path / "two", open_evaluator=opener(), trials=12)
            who = f"process {os.getpid()} on {socket.gethostname()}"  # the last that opened it
            assert f"study shared: {who} is at work on it" in str(caught.value)
            first.kill()
            first.wait()
            os.kill(child, 0)  # it is there, with all that it inherited
            outcome = run_search(
                asked, storage=tmp_path / "two", open_evaluator=opener(), trials=12
            )
        finally:
            first.kill()
            os.kill(child, signal.SIGKILL)
    assert len(outcome.status["trials"]) == 12
