"""The event log of a study: what was asked, proposed, scored, told. Resume is its replay.

Events are only ever appended, each with all that belongs to it in one transaction; `History` is
what they add up to. Whatever else a study shows (status, best recipe, mirror) follows from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import sqlalchemy as sql

from evomerge.database import Database, stops_the_run
from evomerge.evaluate.ledger import (
    Answered,
    UnitKey,
    answered_by,
    gate_counts,
    grades_by_candidate,
    grades_by_event,
    record,
)
from evomerge.evaluate.ledger_query import LedgerRow, ledger_rows
from evomerge.evaluate.replies import JudgeUsage, usage_of
from evomerge.evaluate.task import TaskResult
from evomerge.optimizer.events import Event
from evomerge.optimizer.history import History, Measurement, Part, Payload, trial_label
from evomerge.schema import events, studies

__all__ = ["Event", "EventLog", "History", "Measurement", "Part", "Payload", "trial_label"]


class Log(Protocol):
    """Where the events of a search go; `history` is always what has been written so far."""

    @property
    def history(self) -> History:
        """What the events add up to."""

    def append(self, *new: Event) -> None:
        """Writes events, all or none."""


class MemoryLog:
    """A log that ends with its process."""

    def __init__(self) -> None:
        self.history = History()

    def append(self, *new: Event) -> None:
        """Takes the events into account."""
        for event in new:
            _note(self.history, event, event.payload)


class EventLog:
    """One study's log in a database; `history` is always what has been written so far."""

    def __init__(self, database: Database, name: str) -> None:
        """Reads the events of study `name`; a study without any is made by the first `append`."""
        self.name = name
        self._database = database
        self._study_id: int | None = None
        self.history = History()
        with self._database.connect() as connection:
            self._study_id = connection.scalar(
                sql.select(studies.c.id).where(studies.c.name == name)
            )
            if self._study_id is not None:
                for _ in _replayed(connection, self._study_id, self.history):
                    pass

    @property
    def exists(self) -> bool:
        """Whether the study has begun."""
        return self.history.begun is not None

    def append(self, *new: Event) -> None:
        """Writes events and their answers, all or none. Raises RunError where that fails."""
        with stops_the_run(f"study {self.name}"), self._database.begin() as connection:
            study_id = self._study_id or self._make_study(connection)
            for event in new:
                self._insert(connection, study_id, event)
        self._study_id = study_id
        for event in new:
            # Through JSON, so that a run goes on from exactly what a resumed one reads.
            _note(self.history, event, json.loads(_to_json(event.payload)))

    def as_told(self) -> Iterator[tuple[int, History]]:
        """(block, history) of each block that was told: what was known then, and not since.

        It is one history, which grows from block to block.
        """
        if self._study_id is None:
            return
        history = History()
        with self._database.connect() as connection:
            for kind, payload in _replayed(connection, self._study_id, history):
                if kind == "told":
                    yield payload["block"], history

    def grades(self, candidates: Sequence[str]) -> Mapping[str, dict[str, float | None]]:
        """candidate -> task -> grade, of these candidates, as far as the search may know them.

        Neither fresh attempts count nor held-out tasks, which a winner answers, too.
        """
        if self._study_id is None:
            return {}
        with self._database.connect() as connection:
            found = grades_by_candidate(connection, self._study_id, candidates)
        held_out = set((self.history.begun or {}).get("holdout_tasks", ()))
        return {
            candidate: {task: grade for task, grade in by_task.items() if task not in held_out}
            for candidate, by_task in found.items()
        }

    def answered(self, candidate: str) -> list[Answered]:
        """Every graded answer of this candidate, all attempts."""
        if self._study_id is None:
            return []
        with self._database.connect() as connection:
            return answered_by(connection, self._study_id, candidate)

    def rows(
        self, candidates: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> list[LedgerRow]:
        """The study's answers with all that is known of them; of some candidates or tasks alone."""
        if self._study_id is None:
            return []
        with self._database.connect() as connection:
            return ledger_rows(connection, self._study_id, candidates, tasks)

    def kept_answers(self, unit: UnitKey, tasks: Sequence[str]) -> list[TaskResult] | None:
        """A unit's answers to these tasks, in their order, that no run had graded.

        None unless all are there.
        """
        known = {
            row.task: row.to_result()
            for row in self.rows([unit.candidate], tasks)
            if (row.attempt, row.recipe_digest, row.suite_digest)
            == (unit.attempt, unit.recipe_digest, unit.suite_digest)
        }
        return [known[task] for task in tasks] if all(task in known for task in tasks) else None

    def gate_counts(self, candidate: str | None = None) -> tuple[int, dict[str, int]]:
        """How many answers the study or one candidate has, and how many each gate closed for."""
        if self._study_id is None:
            return 0, {}
        with self._database.connect() as connection:
            return gate_counts(connection, self._study_id, candidate)

    def judge_usage(self) -> list[JudgeUsage]:
        """What the study has paid its judges."""
        with self._database.connect() as connection:
            return usage_of(connection, self.name)

    def close(self) -> None:
        """Lets go of the database."""
        self._database.dispose()

    def _make_study(self, connection: sql.Connection) -> int:
        inserted = connection.execute(sql.insert(studies).values(name=self.name))
        return _key(inserted)

    def _insert(self, connection: sql.Connection, study_id: int, event: Event) -> None:
        inserted = connection.execute(
            sql.insert(events).values(
                study_id=study_id,
                kind=event.kind,
                at=time.time(),
                once=event.once,
                payload=_to_json(event.payload),
            )
        )
        if event.unit is not None:
            record(
                connection,
                study_id,
                _key(inserted),
                event.unit,
                event.results,
                counts=event.counts,
            )


def study_names(database: Database) -> list[str]:
    """The names of all studies in a database, oldest first."""
    with database.connect() as connection:
        return list(connection.scalars(sql.select(studies.c.name).order_by(studies.c.id)))


def begun_with(log: EventLog) -> Payload:
    """What the study of a log that exists began with."""
    assert log.history.begun is not None, f"study {log.name} has not begun"
    return log.history.begun


def _replayed(
    connection: sql.Connection, study_id: int, history: History
) -> Iterator[tuple[str, Payload]]:
    """(kind, payload) of a study's events in their order, each once `history` knows of it."""
    graded = grades_by_event(connection, study_id)
    query = (
        sql.select(events.c.id, events.c.kind, events.c.payload)
        .where(events.c.study_id == study_id)
        .order_by(events.c.id)
    )
    for event_id, kind, text in connection.execute(query):
        unit = graded.get(event_id)
        if unit is not None:
            history.note_grades(unit.candidate, unit.attempt, unit.grades)
        payload = json.loads(text)
        history.apply(kind, payload)
        yield kind, payload


def _note(history: History, event: Event, payload: Payload) -> None:
    if event.unit is not None and event.counts:
        grades = {result.task_id: result.grade for result in event.results}
        history.note_grades(event.unit.candidate, event.unit.attempt, grades)
    history.apply(event.kind, payload)


def _key(result: sql.CursorResult[Any]) -> int:
    primary_key = result.inserted_primary_key
    assert primary_key is not None
    return int(primary_key[0])


def _to_json(payload: Payload) -> str:
    """JSON whose floats come back bit by bit; a NaN or an infinity is a bug and raises."""
    return json.dumps(payload, allow_nan=False)
