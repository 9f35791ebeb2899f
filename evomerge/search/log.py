"""The event log of a study: what was asked, proposed, scored, told. Resume is its replay.

Events are only ever appended, each with all that belongs to it in one transaction; `History` is
what they add up to. Whatever else a study shows (status, best recipe, mirror) follows from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sqlalchemy as sql

from evomerge.database import Database, stops_the_run
from evomerge.evaluate.ledger import (
    Answered,
    UnitKey,
    answered_by,
    grades_by_candidate,
    record,
)
from evomerge.evaluate.ledger_query import LedgerRow, ledger_rows
from evomerge.evaluate.replies import JudgeUsage, usage_of
from evomerge.evaluate.suite import TaskResult
from evomerge.schema import events, studies

Part: TypeAlias = Literal["search", "holdout"]
Payload: TypeAlias = Mapping[str, Any]


def trial_label(number: int) -> str:
    """The candidate name of a trial in log and ledger."""
    return f"trial {number}"


@dataclass(frozen=True)
class Measurement:
    """The scored tasks of one candidate.

    `cut` answers ended at max_tokens; `unscored` ones have no grade and are not in `score`.
    `seconds` says where the time went since the measurement before: keys of `timing.KINDS`.
    """

    score: float
    tasks: int
    unscored: int
    cut: int
    recipe_digest: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Event:
    """One event as it is to be written; `once` names what may happen only once in a study.

    `unit` and `results` are the answers that belong to it, for the ledger.
    """

    kind: str
    payload: Payload
    once: str | None = None
    unit: UnitKey | None = None
    results: Sequence[TaskResult] = ()


def begun(payload: Payload) -> Event:
    """The study as it was asked and resolved: all that a later run needs to be the same."""
    return Event("begun", payload, once="begun")


def opened(*, trials: int, asked_trials: int, process: str, engine_start: float) -> Event:
    """A process took the study up, for `trials` in total; the study's file said `asked_trials`.

    `engine_start` are the seconds until the engine could take a candidate.
    """
    payload = {"trials": trials, "asked_trials": asked_trials, "process": process}
    return Event("opened", {**payload, "engine_start": round(engine_start, 3)})


def generation(block: int, genomes: Mapping[int, Sequence[float]]) -> list[Event]:
    """A generation's proposals, exactly as drawn: number -> genome. Belongs in one transaction."""
    head = Event(
        "generation",
        {"block": block, "numbers": list(genomes), "tasks": None},
        once=f"generation {block}",
    )
    proposals = [
        Event(
            "proposed",
            {"number": number, "block": block, "genome": [float(gene) for gene in genome]},
            once=f"proposed {number}",
        )
        for number, genome in genomes.items()
    ]
    return [head, *proposals]


def scored(
    part: Part, measurement: Measurement, unit: UnitKey, results: Sequence[TaskResult]
) -> Event:
    """A unit was measured: its score, and in the ledger every answer and grade."""
    payload = {
        "candidate": unit.candidate,
        "part": part,
        "attempt": unit.attempt,
        "score": measurement.score,
        "tasks": measurement.tasks,
        "unscored": measurement.unscored,
        "cut": measurement.cut,
        "recipe_digest": measurement.recipe_digest,
        "seconds": dict(measurement.seconds),
    }
    once = f"scored {unit.candidate} {part} {unit.attempt}"
    return Event("scored", payload, once, unit, results)


def failed(
    candidate: str,
    part: Part,
    reason: str,
    seconds: Mapping[str, float],
    engine_died: bool = False,
) -> Event:
    """A candidate could not be scored, for a reason of its own, or killed the engine twice."""
    payload = {"candidate": candidate, "part": part, "reason": reason, "seconds": dict(seconds)}
    return Event("failed", {**payload, "engine_died": engine_died})


def told(block: int, values: Sequence[tuple[int, float]]) -> Event:
    """What the sampler learns of a generation: (number, value), higher is better."""
    return Event(
        "told", {"block": block, "values": [list(pair) for pair in values]}, once=f"told {block}"
    )


def stopped(reason: str, void: Sequence[tuple[str, Part]]) -> Event:
    """The run stopped for a reason not a candidate's own; the failures in `void` do not count."""
    return Event("stopped", {"reason": reason, "void": [list(key) for key in void]})


def finished(winner: Payload, trials: int, seconds: Mapping[str, float]) -> Event:
    """The budget of `trials` is spent and the winner chosen."""
    return Event("finished", {"winner": winner, "trials": trials, "seconds": dict(seconds)})


@dataclass
class History:
    """What the events of a study add up to. Keys of scores and failures: (candidate, part)."""

    begun: Payload | None = None
    opened: Payload | None = None
    finished: Payload | None = None
    stopped: str | None = None
    generations: dict[int, list[int]] = field(default_factory=dict)
    genomes: dict[int, tuple[float, ...]] = field(default_factory=dict)
    scores: dict[tuple[str, Part], Measurement] = field(default_factory=dict)
    failures: dict[tuple[str, Part], str] = field(default_factory=dict)
    told: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    # Who killed the engine since the last score, in order.
    engine_deaths: list[tuple[str, Part]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def apply(self, kind: str, payload: Payload) -> None:
        """Takes one more event into account; kinds of a later version's making are passed over."""
        change = getattr(self, f"_on_{kind}", None)
        if change is not None:
            change(payload)

    def is_done(self, candidate: str, part: Part) -> bool:
        """Whether there is a score, or a failure that counts."""
        return (candidate, part) in self.scores or (candidate, part) in self.failures

    def score(self, candidate: str, part: Part = "search") -> float | None:
        """The score of a candidate; None where it has none."""
        measurement = self.scores.get((candidate, part))
        return None if measurement is None else measurement.score

    def _on_begun(self, payload: Payload) -> None:
        self.begun = payload

    def _on_opened(self, payload: Payload) -> None:
        self.opened, self.finished, self.stopped = payload, None, None
        self._spend({"engine": payload["engine_start"]})

    def _on_generation(self, payload: Payload) -> None:
        self.generations[payload["block"]] = list(payload["numbers"])

    def _on_proposed(self, payload: Payload) -> None:
        self.genomes[payload["number"]] = tuple(payload["genome"])

    def _on_scored(self, payload: Payload) -> None:
        key = (payload["candidate"], payload["part"])
        self.scores[key] = Measurement(
            score=payload["score"],
            tasks=payload["tasks"],
            unscored=payload["unscored"],
            cut=payload["cut"],
            recipe_digest=payload["recipe_digest"],
            seconds=payload["seconds"],
        )
        self.failures.pop(key, None)
        self.engine_deaths.clear()
        self._spend(payload["seconds"])

    def _on_failed(self, payload: Payload) -> None:
        key = (payload["candidate"], payload["part"])
        self.failures[key] = payload["reason"]
        if payload.get("engine_died"):
            self.engine_deaths.append(key)
        self._spend(payload["seconds"])

    def _on_told(self, payload: Payload) -> None:
        self.told[payload["block"]] = [(number, value) for number, value in payload["values"]]

    def _on_stopped(self, payload: Payload) -> None:
        self.stopped = payload["reason"]
        for candidate, part in payload["void"]:
            self.failures.pop((candidate, part), None)
        self.engine_deaths.clear()

    def _on_finished(self, payload: Payload) -> None:
        self.finished = payload
        self._spend(payload["seconds"])

    def _spend(self, seconds: Mapping[str, float]) -> None:
        for kind, spent in seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + spent


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
                self._replay(connection, self._study_id)

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
            self.history.apply(event.kind, json.loads(_to_json(event.payload)))

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

    def judge_usage(self) -> list[JudgeUsage]:
        """What the study has paid its judges."""
        with self._database.connect() as connection:
            return usage_of(connection, self.name)

    def close(self) -> None:
        """Lets go of the database."""
        self._database.dispose()

    def _replay(self, connection: sql.Connection, study_id: int) -> None:
        query = (
            sql.select(events.c.kind, events.c.payload)
            .where(events.c.study_id == study_id)
            .order_by(events.c.id)
        )
        for kind, payload in connection.execute(query):
            self.history.apply(kind, json.loads(payload))

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
            record(connection, study_id, _key(inserted), event.unit, event.results)


def study_names(database: Database) -> list[str]:
    """The names of all studies in a database, oldest first."""
    with database.connect() as connection:
        return list(connection.scalars(sql.select(studies.c.name).order_by(studies.c.id)))


def begun_with(log: EventLog) -> Payload:
    """What the study of a log that exists began with."""
    assert log.history.begun is not None, f"study {log.name} has not begun"
    return log.history.begun


def _key(result: sql.CursorResult[Any]) -> int:
    primary_key = result.inserted_primary_key
    assert primary_key is not None
    return int(primary_key[0])


def _to_json(payload: Payload) -> str:
    """JSON whose floats come back bit by bit; a NaN or an infinity is a bug and raises."""
    return json.dumps(payload, allow_nan=False)
