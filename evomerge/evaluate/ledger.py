"""The ledger: every answer and grade, of all studies, with what made it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sql

from evomerge.database import Database, stops_the_run
from evomerge.evaluate.task import ScorerGrade, TaskResult
from evomerge.schema import answers, grades


@dataclass(frozen=True)
class UnitKey:
    """Whose answers these are: everything but the task that makes an answer unique.

    `candidate` is "trial 17", "base", "model 0" or "uniform", outside of a study the model's name;
    `attempt` counts wanted repetitions from 0; the digests are those of the recipe and of
    everything that decides the grades.
    """

    candidate: str
    attempt: int
    recipe_digest: str
    suite_digest: str
    scorer: str


def record(
    connection: sql.Connection,
    study_id: int,
    event_id: int,
    unit: UnitKey,
    results: Sequence[TaskResult],
    *,
    counts: bool = True,
) -> None:
    """Writes the answers and grades of the unit that event `event_id` ends.

    Within the caller's transaction, so that they are there with the event or not at all. With
    `counts` False they have no grade of their own, only what it would be made of: no score knows
    them, and they make way for answers to the same tasks that do count.
    """
    _make_way(
        connection,
        answers.c.study_id == study_id,
        _of_unit(unit, results),
        ~does_count(),
    )
    rows = [_answer_row(study_id, event_id, unit, result) for result in results]
    connection.execute(sql.insert(answers), rows)
    # Read back by task: RETURNING would make SQLAlchemy send 100 answers to SQLite one by one.
    query = sql.select(answers.c.task, answers.c.id).where(answers.c.event_id == event_id)
    ids = {row.task: row.id for row in connection.execute(query)}
    graded = [
        row
        for result in results
        for row in _grade_rows(ids[result.task_id], unit.scorer, result)
        if counts or not row["total"]
    ]
    if graded:
        connection.execute(sql.insert(grades), graded)


def _make_way(connection: sql.Connection, *which: sql.ColumnElement[bool]) -> None:
    """Deletes the answers of which all this is true."""
    ids = connection.scalars(sql.select(answers.c.id).where(*which)).all()
    if ids:
        connection.execute(sql.delete(grades).where(grades.c.answer_id.in_(ids)))
        connection.execute(sql.delete(answers).where(answers.c.id.in_(ids)))


def _of_unit(unit: UnitKey, results: Sequence[TaskResult]) -> sql.ColumnElement[bool]:
    """Whether an answer is the unit's to one of the tasks of `results`."""
    return sql.and_(
        answers.c.candidate == unit.candidate,
        answers.c.attempt == unit.attempt,
        answers.c.task.in_([result.task_id for result in results]),
    )


def does_count() -> sql.ColumnElement[bool]:
    """Whether an answer is one of those that a score is made of: it has a grade, or is unscored."""
    return sql.exists().where(grades.c.answer_id == answers.c.id, grades.c.total)


def _has_grade() -> sql.ColumnElement[bool]:
    return sql.exists().where(
        grades.c.answer_id == answers.c.id, grades.c.total, grades.c.grade.is_not(None)
    )


def record_evaluation(
    database: Database, unit: UnitKey, results: Sequence[TaskResult], *, counts: bool = True
) -> None:
    """Writes the answers and grades of a model that was evaluated outside of any study.

    In one transaction; answers of the very same evaluation that had no grade make way. `counts` as
    in `record`. Raises RunError where the storage fails.
    """
    if not results:
        return
    rows = [_answer_row(None, None, unit, result) for result in results]
    insert = sql.insert(answers).returning(answers.c.id, sort_by_parameter_order=True)
    with stops_the_run("the ledger"), database.begin() as connection:
        _make_way(
            connection,
            answers.c.study_id.is_(None),
            _of_unit(unit, results),
            answers.c.recipe_digest == unit.recipe_digest,
            answers.c.suite_digest == unit.suite_digest,
            ~_has_grade(),
        )
        ids = connection.scalars(insert, rows).all()
        graded = [
            row
            for answer_id, result in zip(ids, results, strict=True)
            for row in _grade_rows(answer_id, unit.scorer, result)
            if counts or not row["total"]
        ]
        if graded:
            connection.execute(sql.insert(grades), graded)


def _grade_rows(answer_id: int, scorer: str, result: TaskResult) -> list[dict[str, object]]:
    """The answer's grade, and the grades that it is made of."""
    total = ScorerGrade(scorer, result.grade)
    return [
        {
            "answer_id": answer_id,
            "scorer": one.scorer,
            "grade": one.grade,
            "reply": None if one.reply is None else storable(one.reply),
            "total": one is total,
            "turn": one.turn,
            "prompt_tokens": one.usage.prompt_tokens if one.usage else None,
            "completion_tokens": one.usage.completion_tokens if one.usage else None,
            "cost": one.usage.cost if one.usage else None,
        }
        for one in (total, *result.details)
    ]


def mean_grade(results: Sequence[TaskResult]) -> float | None:
    """The score: the mean of the grades there are; None where no answer could be graded.

    Summed exactly, so that the order of the tasks does not matter.
    """
    found = [result.grade for result in results if result.grade is not None]
    return math.fsum(found) / len(found) if found else None


def grades_by_candidate(
    connection: sql.Connection, study_id: int, candidates: Sequence[str]
) -> Mapping[str, dict[str, float | None]]:
    """candidate -> task -> grade of these candidates of a study, in attempt 0."""
    query = (
        sql.select(answers.c.candidate, answers.c.task, grades.c.grade)
        .join(grades, grades.c.answer_id == answers.c.id)
        .where(
            answers.c.study_id == study_id,
            answers.c.candidate.in_(candidates),
            answers.c.attempt == 0,
            grades.c.total,
        )
        .order_by(answers.c.id)
    )
    found: dict[str, dict[str, float | None]] = {}
    for candidate, task, grade in connection.execute(query):
        found.setdefault(candidate, {})[task] = grade
    return found


def gate_counts(
    connection: sql.Connection, study_id: int, candidate: str | None = None
) -> tuple[int, dict[str, int]]:
    """How many answers a study (or one candidate of it) has, and gate -> how many it closed for."""
    query = (
        sql.select(answers.c.gates, sql.func.count())
        .where(answers.c.study_id == study_id, does_count())
        .group_by(answers.c.gates)
    )
    if candidate is not None:
        query = query.where(answers.c.candidate == candidate)
    closed: dict[str, int] = {}
    total = 0
    for gates, number in connection.execute(query):
        total += number
        for gate in json.loads(gates or "[]"):
            closed[gate] = closed.get(gate, 0) + number
    return total, dict(sorted(closed.items()))


@dataclass(frozen=True)
class UnitGrades:
    """The grades of a unit that count, by task."""

    candidate: str
    attempt: int
    grades: dict[str, float | None]


def grades_by_event(connection: sql.Connection, study_id: int) -> dict[int, UnitGrades]:
    """Event -> the grades of the unit that it ended, of everything that a study asked."""
    query = (
        sql.select(
            answers.c.event_id,
            answers.c.candidate,
            answers.c.attempt,
            answers.c.task,
            grades.c.grade,
        )
        .join(grades, grades.c.answer_id == answers.c.id)
        .where(answers.c.study_id == study_id, grades.c.total)
        .order_by(answers.c.id)
    )
    found: dict[int, UnitGrades] = {}
    for event_id, candidate, attempt, task, grade in connection.execute(query):
        found.setdefault(event_id, UnitGrades(candidate, attempt, {})).grades[task] = grade
    return found


@dataclass(frozen=True)
class Answered:
    """One answer of a candidate, as far as comparisons need it; `grade` None: unscored."""

    task: str
    attempt: int
    prompt: str
    suite_digest: str
    scorer: str
    grade: float | None


def answered_by(connection: sql.Connection, study_id: int, candidate: str) -> list[Answered]:
    """Every answer of this candidate of a study, all attempts, in the order they were given."""
    columns = (answers.c.task, answers.c.attempt, answers.c.prompt, answers.c.suite_digest)
    query = (
        sql.select(*columns, grades.c.scorer, grades.c.grade)
        .join(grades, grades.c.answer_id == answers.c.id)
        .where(answers.c.study_id == study_id, answers.c.candidate == candidate, grades.c.total)
        .order_by(answers.c.id)
    )
    return [Answered(*row) for row in connection.execute(query)]


def _answer_row(
    study_id: int | None, event_id: int | None, unit: UnitKey, result: TaskResult
) -> dict[str, object]:
    return {
        "study_id": study_id,
        "event_id": event_id,
        "candidate": unit.candidate,
        "task": result.task_id,
        "attempt": unit.attempt,
        "recipe_digest": unit.recipe_digest,
        "suite_digest": unit.suite_digest,
        "version": result.version,
        "prompt": storable(result.prompt),
        "answer": storable(result.answer),
        "finish_reason": result.finish_reason,
        "seconds": result.seconds,
        "settings": json.dumps(dict(result.settings), ensure_ascii=False),
        "earlier": json.dumps([storable(text) for text in result.earlier], ensure_ascii=False),
        "gates": json.dumps(list(result.gates)),
    }


def storable(text: str) -> str:
    """`text` with U+FFFD for what a database takes no text with: NUL, and halves of surrogates.

    PostgreSQL refuses the first, every driver the second; a broken merge may well write them.
    """
    if text.isascii() and "\0" not in text:
        return text
    marked = text.replace("\0", "\ufffd")
    return marked.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
