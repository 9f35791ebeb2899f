"""The ledger read back: what was asked, answered and graded, an answer a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy as sql

from evomerge.evaluate.ledger import UnitKey
from evomerge.evaluate.task import ScorerGrade, TaskResult, Usage
from evomerge.schema import answers, events, grades


@dataclass(frozen=True)
class PartGrade:
    """One of the grades that an answer's own is made of: by one scorer, of one turn."""

    scorer: str
    turn: int
    grade: float | None
    reply: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None

    @classmethod
    def of(cls, given: ScorerGrade) -> Self:
        """The grade as the ledger has it."""
        usage = given.usage
        return cls(
            scorer=given.scorer,
            turn=given.turn,
            grade=given.grade,
            reply=given.reply,
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            completion_tokens=None if usage is None else usage.completion_tokens,
            cost=None if usage is None else usage.cost,
        )

    def to_grade(self) -> ScorerGrade:
        """The grade as it was written to the ledger."""
        usage = None
        if self.prompt_tokens is not None and self.completion_tokens is not None:
            usage = Usage(self.prompt_tokens, self.completion_tokens, self.cost)
        return ScorerGrade(self.scorer, self.grade, self.reply, usage, self.turn)


@dataclass(frozen=True)
class LedgerRow:
    """One answer with all that is known of it.

    `candidate` is "trial 17", "base" …, outside of a study a model; `settings` how it was
    generated; `grade` None where it is unscored; `parts` what the grade is made of; `seconds` its
    share of the call that generated its unit. `reason`: why it has no part in any score.
    """

    candidate: str
    task: str
    attempt: int
    prompt: str
    earlier: tuple[str, ...]
    answer: str
    finish_reason: str
    gates: tuple[str, ...]
    scorer: str
    grade: float | None
    parts: tuple[PartGrade, ...]
    seconds: float
    settings: dict[str, Any]
    version: str
    recipe_digest: str
    suite_digest: str
    reason: str | None = None

    @classmethod
    def of(cls, unit: UnitKey, result: TaskResult) -> Self:
        """The row that `result` is in the ledger, as an answer of `unit`."""
        return cls(
            candidate=unit.candidate,
            task=result.task_id,
            attempt=result.attempt,
            prompt=result.prompt,
            earlier=result.earlier,
            answer=result.answer,
            finish_reason=result.finish_reason,
            gates=result.gates,
            scorer=unit.scorer,
            grade=result.grade,
            parts=tuple(PartGrade.of(part) for part in result.details),
            seconds=result.seconds,
            settings=dict(result.settings),
            version=result.version,
            recipe_digest=unit.recipe_digest,
            suite_digest=unit.suite_digest,
        )

    def to_result(self) -> TaskResult:
        """The answer as it was written to the ledger."""
        return TaskResult(
            task_id=self.task,
            prompt=self.prompt,
            answer=self.answer,
            finish_reason=self.finish_reason,
            grade=self.grade,
            seconds=self.seconds,
            version=self.version,
            attempt=self.attempt,
            details=tuple(part.to_grade() for part in self.parts),
            gates=self.gates,
            earlier=self.earlier,
            settings=self.settings,
        )


def ledger_rows(
    connection: sql.Connection,
    study_id: int | None,
    candidates: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[LedgerRow]:
    """The answers of a study, or of all evaluations outside of studies, as they were given.

    `candidates` and `tasks`: of these alone.
    """
    chosen = (
        answers.c.study_id == study_id if study_id is not None else answers.c.study_id.is_(None)
    )
    if candidates is not None:
        chosen &= answers.c.candidate.in_(candidates)
    if tasks is not None:
        chosen &= answers.c.task.in_(tasks)
    of_answers = sql.select(answers).where(chosen).order_by(answers.c.id)
    of_grades = (
        sql.select(grades)
        .join(answers, grades.c.answer_id == answers.c.id)
        .where(chosen)
        .order_by(grades.c.id)
    )
    by_answer: dict[int, list[Any]] = {}
    for grade in connection.execute(of_grades):
        by_answer.setdefault(grade.answer_id, []).append(grade)
    found = connection.execute(of_answers).all()
    reasons = _reasons(connection, found, by_answer)
    return [_row(answer, by_answer.get(answer.id, []), reasons) for answer in found]


def _reasons(
    connection: sql.Connection, found: Sequence[Any], by_answer: Mapping[int, Sequence[Any]]
) -> dict[int, str]:
    """Event -> why its answers do not count, of those without a grade of their own."""
    idle = {
        answer.event_id
        for answer in found
        if not any(grade.total for grade in by_answer.get(answer.id, []))
    }
    query = sql.select(events.c.id, events.c.payload).where(events.c.id.in_(idle))
    return {
        event: str(json.loads(payload).get("reason", ""))
        for event, payload in connection.execute(query)
    }


def _row(answer: Any, graded: Sequence[Any], reasons: Mapping[int, str]) -> LedgerRow:
    total = next((grade for grade in graded if grade.total), None)
    scorers = dict.fromkeys(grade.scorer for grade in graded)
    return LedgerRow(
        candidate=answer.candidate,
        task=answer.task,
        attempt=answer.attempt,
        prompt=answer.prompt,
        earlier=tuple(json.loads(answer.earlier or "[]")),
        answer=answer.answer,
        finish_reason=answer.finish_reason,
        gates=tuple(json.loads(answer.gates or "[]")),
        scorer=total.scorer if total else " + ".join(scorers),
        grade=total.grade if total else None,
        parts=tuple(
            PartGrade(
                scorer=grade.scorer,
                turn=grade.turn,
                grade=grade.grade,
                reply=grade.reply,
                prompt_tokens=grade.prompt_tokens,
                completion_tokens=grade.completion_tokens,
                cost=grade.cost,
            )
            for grade in graded
            if not grade.total
        ),
        seconds=answer.seconds,
        settings=json.loads(answer.settings or "{}"),
        version=answer.version,
        recipe_digest=answer.recipe_digest,
        suite_digest=answer.suite_digest,
        reason=None if total else reasons.get(answer.event_id),
    )
