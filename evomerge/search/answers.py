"""The answers of a study: of its winner and the base, of some trials, or to one task."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from evomerge.database import can_be_read
from evomerge.errors import ConfigError, nearest
from evomerge.evaluate.ledger_query import LedgerRow
from evomerge.search.candidates import BASE, candidate_titles
from evomerge.search.log import EventLog, begun_with, trial_label
from evomerge.search.status import best_so_far, existing_log, winner_of


def study_answers(
    storage: Path,
    name: str,
    trials: Sequence[int] = (),
    task: str | None = None,
    *,
    few: bool = False,
) -> list[LedgerRow]:
    """The answers of study `name`, in the order they were given: of these trials, to this task.

    `few` is for a reader: base and winner (or best trial) where nothing else is said, and the base
    beside trials. Raises ConfigError where there is no such study, trial or task.
    """
    with contextlib.closing(existing_log(storage, name)) as log, can_be_read(f"study {name}"):
        _check_trials(log, trials)
        _check_task(log, task)
        return log.rows(_candidates(log, trials, task, few), None if task is None else [task])


def study_titles(storage: Path, name: str) -> dict[str, str]:
    """The candidates of study `name` that a reader has another name for than the log.

    Models and merges are called as the study's file calls them, and a winner that is no trial is
    "the winner".
    """
    with contextlib.closing(existing_log(storage, name)) as log:
        study, winner = begun_with(log)["study"], winner_of(log.history)
    titles = candidate_titles(study["models"], study.get("warm_start", ()))
    if winner is not None and winner.source in ("mean", "peak"):
        titles[winner.label] = "the winner"
    return titles


def _candidates(
    log: EventLog, trials: Sequence[int], task: str | None, few: bool
) -> list[str] | None:
    """The candidates that are meant; None for all."""
    labels = [trial_label(number) for number in trials]
    if labels:
        return [BASE, *labels] if few else labels
    if not few or task is not None:
        return None
    best = best_so_far(log.history)
    return [BASE] if best is None else [BASE, best.label]


def _check_trials(log: EventLog, trials: Sequence[int]) -> None:
    there = log.history.genomes
    for number in trials:
        if number not in there:
            raise ConfigError(
                f"study {log.name} has no trial {number}; there are {len(there)}, from 0"
            )


def _check_task(log: EventLog, task: str | None) -> None:
    begun = begun_with(log)
    known = [*begun["search_tasks"], *begun["holdout_tasks"]]
    if task is not None and task not in known:
        raise ConfigError(f"study {log.name} has no task {task!r}{nearest(task, known)}")
