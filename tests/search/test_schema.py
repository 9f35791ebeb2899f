"""A database of version 1 is brought up to today's: its rows stay, and it looks like a new one."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sql

from evomerge import schema
from evomerge.database import open_database, open_for_reading
from evomerge.errors import ConfigError

# Version 1 as its evomerge made it, for either database.
KEY = {"sqlite": "INTEGER NOT NULL PRIMARY KEY", "postgresql": "BIGSERIAL PRIMARY KEY"}
VERSION_1 = """
CREATE TABLE evomerge_schema (version INTEGER);
CREATE TABLE studies (id KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE events (id KEY, study_id BIGINT NOT NULL REFERENCES studies (id), kind TEXT NOT NULL,
  at DOUBLE PRECISION NOT NULL, once TEXT, payload TEXT NOT NULL, UNIQUE (study_id, once));
CREATE TABLE answers (id KEY, study_id BIGINT REFERENCES studies (id),
  event_id BIGINT REFERENCES events (id), candidate TEXT NOT NULL, task TEXT NOT NULL,
  attempt INTEGER NOT NULL, recipe_digest TEXT NOT NULL, suite_digest TEXT NOT NULL,
  version TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL, finish_reason TEXT NOT NULL,
  seconds DOUBLE PRECISION NOT NULL, UNIQUE (study_id, candidate, task, attempt));
CREATE TABLE grades (id KEY, answer_id BIGINT NOT NULL REFERENCES answers (id),
  scorer TEXT NOT NULL, grade DOUBLE PRECISION, reply TEXT);
INSERT INTO evomerge_schema VALUES (1);
INSERT INTO studies (name) VALUES ('old');
INSERT INTO events (study_id, kind, at, once, payload) VALUES (1, 'begun', 1.5, 'begun', '{}');
INSERT INTO answers (study_id, event_id, candidate, task, attempt, recipe_digest, suite_digest,
  version, prompt, answer, finish_reason, seconds)
  VALUES (1, 1, 'trial 0', 'a', 0, 'r', 's', 'v', 'p', 'words', 'stop', 0.25);
INSERT INTO grades (answer_id, scorer, grade) VALUES (1, 'exact', 0.75)
"""


def write_version_1(engine: sql.Engine) -> None:
    with engine.begin() as connection:
        for statement in VERSION_1.split(";"):
            text = statement.replace("id KEY", f"id {KEY[engine.dialect.name]}")
            connection.exec_driver_sql(text)
    engine.dispose()


def columns(engine: sql.Engine) -> dict[str, list[tuple[str, bool]]]:
    inspector = sql.inspect(engine)
    return {
        table: sorted((one["name"], one["nullable"]) for one in inspector.get_columns(table))
        for table in schema.metadata.tables
    }


def check_brought_up(engine: sql.Engine, fresh: sql.Engine) -> None:
    with engine.connect() as connection:
        assert connection.scalar(sql.select(schema.schema_table.c.version)) == schema.VERSION
        (answer,) = connection.execute(sql.select(schema.answers)).mappings()
        (grade,) = connection.execute(sql.select(schema.grades)).mappings()
    assert (answer["answer"], answer["seconds"], answer["settings"]) == ("words", 0.25, None)
    assert (grade["grade"], grade["total"], grade["turn"]) == (0.75, True, 0)
    assert columns(engine) == columns(fresh)
    engine.dispose()
    fresh.dispose()


@pytest.mark.parametrize("open_it", [open_database, open_for_reading])
def test_a_file_of_version_1_is_brought_up(tmp_path: Path, open_it: object) -> None:
    (tmp_path / "old").mkdir()
    write_version_1(sql.create_engine(f"sqlite:///{tmp_path / 'old' / 'evomerge.db'}"))
    assert callable(open_it)
    check_brought_up(open_it(tmp_path / "old"), open_database(tmp_path / "new"))
    open_database(tmp_path / "old").dispose()  # and once more, where nothing is to do


def test_what_fails_on_the_way_up_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_1(sql.create_engine(f"sqlite:///{tmp_path / 'evomerge.db'}"))

    def half_a_step(connection: sql.Connection) -> None:
        schema.replies.create(connection)
        connection.exec_driver_sql("ALTER TABLE answers ADD COLUMN settings TEXT")
        raise OSError("the power is gone")

    monkeypatch.setattr(schema, "_STEPS", {1: half_a_step})
    with pytest.raises(ConfigError, match="the power is gone"):
        open_database(tmp_path)
    monkeypatch.undo()
    check_brought_up(open_database(tmp_path), open_database(tmp_path / "new"))


def test_a_server_of_version_1_is_brought_up(tmp_path: Path, postgresql: str) -> None:
    old, fresh = (sql.make_url(postgresql).set(database=name) for name in ("old", "fresh"))
    maker = sql.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with maker.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE old")
        connection.exec_driver_sql("CREATE DATABASE fresh")
    maker.dispose()
    write_version_1(sql.create_engine(old))
    old_url, fresh_url = (url.render_as_string(hide_password=False) for url in (old, fresh))
    check_brought_up(open_database(tmp_path, old_url), open_database(tmp_path, fresh_url))
