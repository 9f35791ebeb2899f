"""The tables of evomerge's database, their version, and how older databases are brought to it.

`VERSION` 2 added what judges say (`replies`), what a grade is made of, and how answers were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sqlalchemy as sql

VERSION = 2

metadata = sql.MetaData()

# A big integer that SQLite, too, counts up by itself (it does so for INTEGER alone).
_Key = sql.BigInteger().with_variant(sql.Integer(), "sqlite")

schema_table = sql.Table("evomerge_schema", metadata, sql.Column("version", sql.Integer))

studies = sql.Table(
    "studies",
    metadata,
    sql.Column("id", _Key, primary_key=True),
    sql.Column("name", sql.Text, nullable=False, unique=True),
)

# Append only. `payload` is JSON, kept as text: every float comes back with the bits it had.
# `once` names what may happen only once in a study ("scored trial 17"); null where it may again.
events = sql.Table(
    "events",
    metadata,
    sql.Column("id", _Key, primary_key=True),
    sql.Column("study_id", _Key, sql.ForeignKey("studies.id"), nullable=False, index=True),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("at", sql.Float(53), nullable=False),  # seconds since 1970
    sql.Column("once", sql.Text),
    sql.Column("payload", sql.Text, nullable=False),
    sql.UniqueConstraint("study_id", "once"),
)

# What models wrote. `event_id` is the event that made the answer's unit count; both it and
# `study_id` are null for an evaluation outside of any study. In a conversation `prompt` and
# `answer` are those of its last turn. JSON: `settings` (how it was generated), `earlier` (the
# answers of earlier turns), `gates` (what is wrong with it on its face).
answers = sql.Table(
    "answers",
    metadata,
    sql.Column("id", _Key, primary_key=True),
    sql.Column("study_id", _Key, sql.ForeignKey("studies.id")),
    sql.Column("event_id", _Key, sql.ForeignKey("events.id"), index=True),
    sql.Column("candidate", sql.Text, nullable=False),  # "trial 17", "base", "uniform" …
    sql.Column("task", sql.Text, nullable=False),
    sql.Column("attempt", sql.Integer, nullable=False),
    sql.Column("recipe_digest", sql.Text, nullable=False),
    sql.Column("suite_digest", sql.Text, nullable=False),
    sql.Column("version", sql.Text, nullable=False),  # the weights that wrote it, by the engine
    sql.Column("prompt", sql.Text, nullable=False),
    sql.Column("answer", sql.Text, nullable=False),
    sql.Column("finish_reason", sql.Text, nullable=False),
    sql.Column("seconds", sql.Float(53), nullable=False),
    sql.Column("settings", sql.Text),
    sql.Column("earlier", sql.Text),
    sql.Column("gates", sql.Text),
    sql.UniqueConstraint("study_id", "candidate", "task", "attempt"),
)

# Of each answer one row with `total`, its grade, and one for every scorer and turn that it is
# made of.
grades = sql.Table(
    "grades",
    metadata,
    sql.Column("id", _Key, primary_key=True),
    sql.Column("answer_id", _Key, sql.ForeignKey("answers.id"), nullable=False, index=True),
    sql.Column("scorer", sql.Text, nullable=False),
    sql.Column("grade", sql.Float(53)),  # null: unscored
    sql.Column("reply", sql.Text),  # a judge's raw reply
    sql.Column("total", sql.Boolean, nullable=False, server_default=sql.true()),
    sql.Column("turn", sql.Integer, nullable=False, server_default="0"),
    sql.Column("prompt_tokens", sql.BigInteger),
    sql.Column("completion_tokens", sql.BigInteger),
    sql.Column("cost", sql.Float(53)),
)

# Every reply that a judge gave, as soon as it was there: the cache of all studies and evaluations.
# `key` is a hash of all that decides the reply; `grade` null: it had none. `payer`: the study that
# it was asked for, null for an evaluation.
replies = sql.Table(
    "replies",
    metadata,
    sql.Column("id", _Key, primary_key=True),
    sql.Column("key", sql.Text, nullable=False, index=True),
    sql.Column("at", sql.Float(53), nullable=False),  # seconds since 1970
    sql.Column("payer", sql.Text, index=True),
    sql.Column("judge", sql.Text, nullable=False),
    sql.Column("host", sql.Text, nullable=False),
    sql.Column("settings", sql.Text, nullable=False),  # JSON
    sql.Column("task", sql.Text, nullable=False),
    sql.Column("attempt", sql.Integer, nullable=False),
    sql.Column("grading", sql.Integer, nullable=False),
    sql.Column("prompt", sql.Text, nullable=False),
    sql.Column("reply", sql.Text, nullable=False),
    sql.Column("finish_reason", sql.Text, nullable=False),
    sql.Column("grade", sql.Float(53)),
    sql.Column("reason", sql.Text, nullable=False),
    sql.Column("seconds", sql.Float(53), nullable=False),
    sql.Column("prompt_tokens", sql.BigInteger, nullable=False),
    sql.Column("completion_tokens", sql.BigInteger, nullable=False),
    sql.Column("cost", sql.Float(53)),
)


def create(connection: sql.Connection) -> None:
    """Makes all tables in an empty database."""
    metadata.create_all(connection)
    connection.execute(sql.insert(schema_table).values(version=VERSION))


def found_version(connection: sql.Connection) -> int | None:
    """The version of the tables that are there; None where there are none of evomerge."""
    if not sql.inspect(connection).has_table(schema_table.name):
        return None
    return connection.execute(sql.select(schema_table.c.version)).scalar() or 0


def bring_up(connection: sql.Connection, found: int) -> None:
    """Changes the tables of version `found` into those of `VERSION`; their rows stay.

    Within the caller's transaction: all of it or nothing.
    """
    for version in range(found, VERSION):
        _STEPS[version](connection)
    connection.execute(sql.update(schema_table).values(version=VERSION))


def _from_version_1(connection: sql.Connection) -> None:
    for column in (answers.c.settings, answers.c.earlier, answers.c.gates):
        _add_column(connection, column)
    for column in (grades.c.total, grades.c.turn):
        _add_column(connection, column)
    for column in (grades.c.prompt_tokens, grades.c.completion_tokens, grades.c.cost):
        _add_column(connection, column)
    replies.create(connection, checkfirst=True)


# Version -> how it becomes the next one. A later step must not trip over what an earlier one, which
# makes tables as they are described above, has made already: `_add_column` does not.
_STEPS: Mapping[int, Callable[[sql.Connection], None]] = {1: _from_version_1}


def _add_column(connection: sql.Connection, column: sql.Column[object]) -> None:
    table = column.table
    assert isinstance(table, sql.Table)
    if column.name in {each["name"] for each in sql.inspect(connection).get_columns(table.name)}:
        return
    words = sql.schema.CreateColumn(column).compile(dialect=connection.dialect)
    connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {words}")
