"""The ledger, written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from evomerge.database import open_database
from evomerge.evaluate.ledger import UnitKey, record_evaluation
from evomerge.evaluate.ledger_query import PartGrade, ledger_rows
from evomerge.evaluate.task import ScorerGrade, TaskResult, Usage

UNIT = UnitKey("owner/model", 0, "", "suite", "0.9 judge + 0.1 chrf")


def result(task: str, grade: float | None = 0.5) -> TaskResult:
    return TaskResult(
        task_id=task,
        prompt=f"prompt {task}",
        answer=f"answer {task}\0",
        finish_reason="length",
        grade=grade,
        seconds=0.25,
        version="weights",
        details=(
            ScorerGrade("judge", grade, "raw", Usage(100, 10, 0.2), turn=1),
            ScorerGrade("chrf", 40.0),
        ),
        gates=("language",),
        earlier=("first",),
        settings={"max_tokens": 8, "stop": ("###",)},
    )


def test_an_evaluation_outside_of_a_study_is_in_the_ledger(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    record_evaluation(database, UNIT, [])
    record_evaluation(database, UNIT, [result("b"), result("a", None)])
    record_evaluation(database, UNIT, [result("b", 0.75)])  # once more is nothing wrong
    with database.connect() as connection:
        rows = ledger_rows(connection, None)
        assert [(row.candidate, row.task, row.grade) for row in rows] == [
            ("owner/model", "b", 0.5),
            ("owner/model", "a", None),
            ("owner/model", "b", 0.75),
        ]
        assert rows[0].parts == (
            PartGrade("judge", 1, 0.5, "raw", 100, 10, 0.2),
            PartGrade("chrf", 0, 40.0, None, None, None, None),
        )
        first = rows[0]
        assert (first.answer, first.earlier, first.gates) == (
            "answer b�",
            ("first",),
            ("language",),
        )
        assert first.settings == {"max_tokens": 8, "stop": ["###"]}
        assert [row.task for row in ledger_rows(connection, None, tasks=["a"])] == ["a"]
        assert ledger_rows(connection, None, candidates=["other"]) == []
        assert ledger_rows(connection, 1) == []
    database.dispose()


def test_an_evaluation_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    with database.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON grades WHEN NEW.scorer = 'chrf' "
            "BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    with pytest.raises(IntegrityError, match="no room"):
        record_evaluation(database, UNIT, [result("a")])
    with database.connect() as connection:
        assert ledger_rows(connection, None) == []
    database.dispose()
