"""The judges' replies in the database: written as they come, found again by all that decides them.

So nothing is paid for twice, in a resumed or in another study, and a kill loses no more than the
calls in flight.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from evomerge.database import Database, stops_the_run
from evomerge.evaluate.ledger import storable
from evomerge.schema import replies

# SQLite takes 32,766 parameters in a statement.
_KEYS_AT_ONCE = 500


@dataclass(frozen=True)
class Asked:
    """What a reply is the reply to, in the words of its row."""

    key: str
    judge: str
    host: str
    settings: Mapping[str, Any]
    task: str
    attempt: int
    grading: int
    prompt: str


@dataclass(frozen=True)
class Given:
    """What the judge said, and what it is worth; `grade` None where it has none."""

    reply: str
    finish_reason: str
    grade: float | None
    reason: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Known:
    """The grade that is kept under a key, with its reply."""

    grade: float
    reply: str


@dataclass(frozen=True)
class Spent:
    """What a payer has paid one judge."""

    tokens: int
    cost: float


@dataclass(frozen=True)
class JudgeUsage:
    """What one judge was asked and paid by one payer; `cost` None where no prices are known."""

    judge: str
    host: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def usage_of(connection: sql.Connection, payer: str) -> list[JudgeUsage]:
    """What study `payer` has paid so far, judge by judge, by name."""
    sums = (
        sql.func.count(),
        sql.func.sum(replies.c.prompt_tokens),
        sql.func.sum(replies.c.completion_tokens),
        sql.func.sum(replies.c.cost),
    )
    # A judge on this machine may have had another port in every run.
    query = (
        sql.select(replies.c.judge, sql.func.max(replies.c.host), *sums)
        .where(replies.c.payer == payer)
        .group_by(replies.c.judge)
        .order_by(replies.c.judge)
    )
    return [
        JudgeUsage(judge, host, calls, int(asked), int(said), cost)
        for judge, host, calls, asked, said, cost in connection.execute(query)
    ]


class Replies:
    """The replies in the database that `open_database` gives, once one is asked for or told.

    `payer`: the study that pays for what is added; None for an evaluation. Failures of the database
    raise RunError.
    """

    def __init__(self, open_database: Callable[[], Database], payer: str | None) -> None:
        self._open_database = open_database
        self._payer = payer
        self._opened: Database | None = None

    @property
    def _database(self) -> Database:
        if self._opened is None:
            self._opened = self._open_database()
        return self._opened

    def look_up(self, keys: Sequence[str]) -> dict[str, Known]:
        """What is known of each key; nothing of those whose replies had no grade."""
        found: dict[str, Known] = {}
        with stops_the_run("the judge's replies"), self._database.connect() as connection:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                for key, grade, reply in connection.execute(_OF_KEYS, {"keys": some}):
                    found.setdefault(key, Known(grade, reply))
        return found

    def add(self, asked: Asked, given: Given) -> None:
        """Keeps a reply, in a transaction of its own."""
        row = {
            "key": asked.key,
            "at": time.time(),
            "payer": self._payer,
            "judge": asked.judge,
            "host": asked.host,
            "settings": _settings(asked.settings),
            "task": asked.task,
            "attempt": asked.attempt,
            "grading": asked.grading,
            "prompt": storable(asked.prompt),
            "reply": storable(given.reply),
            "finish_reason": given.finish_reason,
            "grade": given.grade,
            "reason": storable(given.reason),
            "seconds": given.seconds,
            "prompt_tokens": given.prompt_tokens,
            "completion_tokens": given.completion_tokens,
            "cost": given.cost,
        }
        with stops_the_run("the judge's replies"), self._database.begin() as connection:
            connection.execute(sql.insert(replies), row)

    def has_grade(self, settings: Mapping[str, Any]) -> bool:
        """Whether this payer has ever got a grade of the judge of these settings."""
        one = sql.select(replies.c.id).where(
            replies.c.payer == self._payer,  # IS NULL of an evaluation
            replies.c.settings == _settings(settings),
            replies.c.grade.is_not(None),
        )
        with stops_the_run("the judge's replies"), self._database.connect() as connection:
            return connection.execute(one.limit(1)).first() is not None

    def spent(self, judge: str) -> Spent:
        """What this payer has paid the judge so far; nothing for an evaluation."""
        if self._payer is None:
            return Spent(0, 0.0)
        sums = sql.select(
            sql.func.coalesce(sql.func.sum(replies.c.prompt_tokens), 0)
            + sql.func.coalesce(sql.func.sum(replies.c.completion_tokens), 0),
            sql.func.coalesce(sql.func.sum(replies.c.cost), 0.0),
        ).where(replies.c.payer == self._payer, replies.c.judge == judge)
        with stops_the_run("the judge's replies"), self._database.connect() as connection:
            tokens, cost = connection.execute(sums).one()
        return Spent(int(tokens), float(cost))

    def close(self) -> None:
        """Lets go of the database."""
        if self._opened is not None:
            self._opened.dispose()


def _settings(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


_OF_KEYS = (
    sql.select(replies.c.key, replies.c.grade, replies.c.reply)
    .where(replies.c.key.in_(sql.bindparam("keys", expanding=True)), replies.c.grade.is_not(None))
    .order_by(replies.c.id)
)
