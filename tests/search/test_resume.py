"""Kill a real process at random moments: what comes out is what an unbroken run gives."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import load_study

from evomerge.database import open_database
from evomerge.schema import answers, events, grades
from evomerge.search.status import study_status
from tests.search import formula

STUDY = "formula"
SECONDS_PER_TASK = 0.008  # about 2 s for the whole study: time to be killed in


@dataclass
class Run:
    """A search in a process of its own, and the file that its story goes to."""

    process: ForkServerProcess
    story: Path

    def wait_until_begun(self) -> bool:
        """Returns when the process has started to measure; whether it had something to do."""
        while not (self.story.exists() and self.story.read_text().startswith("study ")):
            if not self.process.is_alive():
                return False
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        """kill -9, to this process alone."""
        self.process.kill()
        self.process.join()

    def end(self, status: int) -> str:
        """Waits until the search ends by itself, with this exit status; its story."""
        self.process.join(timeout=120)
        story = self.story.read_text()
        assert self.process.exitcode == status, story
        return story


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Processes start from one that has imported everything: torch alone takes seconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.search.formula"])
    return context


@pytest.fixture
def start(server: ForkServerContext, tmp_path: Path) -> Iterator[Start]:
    """Starts a search of a study file in a storage; what still runs at the end is killed."""
    runs: list[Run] = []

    def start_one(study: Path, storage: Path, **options: Any) -> Run:
        story = tmp_path / f"story {len(runs)}"
        process = server.Process(
            target=formula.run,
            args=(study, storage, story),
            kwargs={"seconds": SECONDS_PER_TASK, **options},
        )
        process.start()
        runs.append(Run(process, story))
        return runs[-1]

    yield start_one
    for run in runs:
        run.kill()


def what_counts(storage: Path) -> dict[str, list[tuple[object, ...]]]:
    """All that must be the same: proposals, scores, failures, tells, winner, answers and grades."""
    engine = open_database(storage)
    kinds = ("generation", "proposed", "scored", "failed", "told", "finished")
    found: dict[str, list[tuple[object, ...]]] = {}
    with engine.connect() as connection:
        query = sql.select(events.c.kind, events.c.payload).order_by(events.c.id)
        found["events"] = [
            (kind, json.dumps({**json.loads(payload), "seconds": None}))
            for kind, payload in connection.execute(query)
            if kind in kinds
        ]
        rows = sql.select(answers.c.candidate, answers.c.task, answers.c.attempt, grades.c.grade)
        joined = rows.join(grades, grades.c.answer_id == answers.c.id).order_by(answers.c.id)
        found["answers"] = [tuple(row) for row in connection.execute(joined)]
    engine.dispose()
    return found


def measured(storage: Path) -> int:
    """How many units the log holds."""
    if not (storage / "evomerge.db").exists():
        return 0
    engine = open_database(storage)
    with engine.connect() as connection:
        query = sql.select(sql.func.count()).select_from(events).where(events.c.kind == "scored")
        number = int(connection.scalar(query) or 0)
    engine.dispose()
    return number


def mirrored(storage: Path) -> list[tuple[float | None, dict[str, float]]]:
    """(value, parameters) of the trials that Optuna reads in the journal."""
    path = storage / "studies" / STUDY / "optuna.journal"
    backend = JournalStorage(JournalFileBackend(str(path)))
    trials = load_study(study_name=STUDY, storage=backend).trials
    return [(trial.value, trial.params) for trial in trials]


def best_config(storage: Path) -> bytes:
    return (storage / "studies" / STUDY / "best_config.yaml").read_bytes()


@pytest.fixture(scope="module")
def moments() -> random.Random:
    """Random moments; their seed is shown where a test fails."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"random seed of the moments: {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("options", [{}, {"limit": 1.0}], ids=["sound", "failing"])
def test_a_search_killed_again_and_again_ends_as_an_unbroken_one(
    study_file: Callable[..., Path],
    tmp_path: Path,
    start: Start,
    moments: random.Random,
    options: dict[str, float],
) -> None:
    # All that a search does: a sweep, parts of the tasks, two units each, a fresh selection.
    study = study_file(
        tasks=30, tasks_per_candidate=16, sweep=True, selection={"attempts": 2}, holdout=0.2
    )
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    start(study, unbroken, **options).end(0)
    before = 0
    for _ in range(5):
        run = start(study, broken, **options)
        if not run.wait_until_begun():
            break
        time.sleep(moments.uniform(0.0, 1.0))
        run.kill()
        assert measured(broken) >= before  # nothing finished is lost
        before = measured(broken)
    start(study, broken, **options).end(0)
    # Nothing is lost or done twice: the very same rows, in the same order.
    assert what_counts(broken) == what_counts(unbroken)
    assert best_config(broken) == best_config(unbroken)
    assert len(mirrored(broken)) == 24
    assert mirrored(broken) == mirrored(unbroken)


def test_a_search_killed_while_it_starts_can_be_started_again(
    study_file: Callable[..., Path], tmp_path: Path, start: Start, moments: random.Random
) -> None:
    study, storage = study_file(), tmp_path / "storage"
    for _ in range(4):
        run = start(study, storage)
        time.sleep(moments.uniform(0.0, 0.2))
        run.kill()
    start(study, storage).end(0)
    status = study_status(storage, STUDY)
    assert status["state"] == "finished"
    assert [trial["number"] for trial in status["trials"]] == list(range(24))


def test_a_second_process_is_refused_with_the_number_of_the_first(
    study_file: Callable[..., Path], tmp_path: Path, start: Start
) -> None:
    study, storage = study_file(), tmp_path / "storage"
    first = start(study, storage, seconds=1.0)
    assert first.wait_until_begun()
    assert study_status(storage, STUDY)["state"] == "running"
    message = start(study, storage).end(2)
    assert f"study {STUDY}: process {first.process.pid} on " in message
    first.kill()
    assert study_status(storage, STUDY)["state"] == "interrupted"


def test_the_lock_ends_with_its_process_even_if_a_child_lives_on(
    study_file: Callable[..., Path], tmp_path: Path, start: Start
) -> None:
    study, storage, child = study_file(), tmp_path / "storage", tmp_path / "child"
    first = start(study, storage, child=child)
    while not child.exists() or not child.read_text():
        time.sleep(0.01)
    first.kill()
    number = int(child.read_text())
    try:
        os.kill(number, 0)  # it is there, with all that it inherited
        start(study, storage).end(0)
    finally:
        os.kill(number, signal.SIGKILL)
    assert study_status(storage, STUDY)["state"] == "finished"


def test_a_storage_that_runs_full_stops_the_run_and_loses_nothing(
    study_file: Callable[..., Path], tmp_path: Path, start: Start
) -> None:
    study, storage, roomy = study_file(), tmp_path / "storage", tmp_path / "roomy"
    story = start(study, storage, largest_file=150_000).end(1)
    message = story.splitlines()[-1]
    assert message.startswith("error: study formula: writing failed:")
    assert message.endswith("make room or repair it, then resume the study")
    assert 0 < measured(storage) < 33
    start(study, storage).end(0)
    start(study, roomy).end(0)
    assert what_counts(storage) == what_counts(roomy)
    assert best_config(storage) == best_config(roomy)
