"""The course of a study as numbers to draw: its candidates, the best so far, inputs, the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from evomerge.errors import ConfigError
from evomerge.optimizer.adjusted import adjusted_candidates
from evomerge.optimizer.history import History, trial_label
from evomerge.optimizer.selection import mean_interval
from evomerge.report.status import which
from evomerge.report.table import candidate_words, held_out_words, short_names
from evomerge.search.candidates import BASE, UNIFORM, model_label

# whole: on all search tasks; part: on those of its generation; stopped: before the end of these.
Kind: TypeAlias = Literal["whole", "part", "stopped", "failed"]
Interval: TypeAlias = tuple[float, float]
_SEED = 0  # of bootstraps


@dataclass(frozen=True)
class Point:
    """A trial: its place on the axis of spending, its score (None: failed), on how many tasks."""

    number: int
    at: int
    score: float | None
    kind: Kind
    tasks: int


@dataclass(frozen=True)
class Reference:
    """A candidate that was there before the search, with its score on search tasks.

    `tasks` is how many of them it has answered.
    """

    title: str
    score: float
    tasks: int


@dataclass(frozen=True)
class Column:
    """What was measured at the end: the winner's score with its 95 % interval, where it has one.

    `references` are the scores of the same tasks of the trajectory's references, in their order.
    `apart`: the grades are another suite's, on a scale of their own.
    """

    title: str
    score: float
    interval: Interval | None
    references: tuple[float | None, ...]
    apart: bool = False


@dataclass(frozen=True)
class Trajectory:
    """What a study's log says of its course; scores are adjusted where tasks differ (`adjusted`).

    `unit` is that of the axis of spending, the budget's. `borders` are the places on it where
    generations begin, by their number. `leader` is the winner, or the best trial so far, in words,
    and `leader_number` its number where it is a trial.
    """

    study: str
    state: str
    unit: Literal["trial", "tasks answered"]
    points: tuple[Point, ...]
    borders: Mapping[int, float]
    references: tuple[Reference, ...]
    columns: tuple[Column, ...]
    search_tasks: int
    adjusted: bool
    leader: str
    leader_number: int | None

    def of_kind(self, kind: Kind) -> list[Point]:
        """The trials of one kind, in the order of their numbers."""
        return [point for point in self.points if point.kind == kind]

    @property
    def best_so_far(self) -> list[tuple[int, float]]:
        """(place on the axis, best score up to there), at each place where the best changes.

        Of trials that were measured to their end, as the search itself chooses its best one.
        """
        steps: list[tuple[int, float]] = []
        for point in sorted(self.points, key=lambda one: (one.at, one.number)):
            if point.kind not in ("whole", "part") or point.score is None:
                continue
            if not steps or point.score > steps[-1][1]:
                steps.append((point.at, point.score))
        return steps


def trajectory_of(history: History, status: Mapping[str, Any]) -> Trajectory:
    """The course of the study that `history` and its `study_status` are of.

    Raises ConfigError where no trial has a score.
    """
    trials = status["trials"]
    if all(trial["adjusted"] is None for trial in trials):
        raise ConfigError(_nothing_to_draw(status))
    unit: Literal["trial", "tasks answered"] = (
        "trial" if status["budget"]["trials"] is not None else "tasks answered"
    )
    by_trial, search = unit == "trial", status["tasks"]["search"]
    labels = _references(history)
    best = status["best"]
    return Trajectory(
        study=status["study"],
        state=status["state"],
        unit=unit,
        points=tuple(
            Point(
                number=trial["number"],
                at=trial["number"]
                if by_trial
                else history.spent_at[trial_label(trial["number"]), "search"],
                score=trial["adjusted"],
                kind=_kind(trial, search),
                tasks=trial["tasks"],
            )
            for trial in trials
        ),
        borders={
            block: numbers[0] - 0.5 if by_trial else float(history.spent_before[block])
            for block, numbers in history.generations.items()
        },
        references=tuple(labels.values()),
        columns=tuple(_columns(history, status, list(labels))),
        search_tasks=search,
        adjusted=any(trial["adjusted"] not in (None, trial["score"]) for trial in trials),
        leader="" if best is None else which(best["source"], best["number"]),
        leader_number=None if best is None else best["number"],
    )


def _nothing_to_draw(status: Mapping[str, Any]) -> str:
    failed = len(status["trials"])
    words = f"study {status['study']} has no scored trial yet"
    words += f", {failed} failed" if failed else ""
    return f"{words}; it stopped: {status['stopped']}" if status["stopped"] else words


def _kind(trial: Mapping[str, Any], search_tasks: int) -> Kind:
    if trial["state"] == "failed" or trial["adjusted"] is None:
        return "failed"
    if trial["state"] == "stopped":
        return "stopped"
    return "whole" if trial["tasks"] >= search_tasks else "part"


def _references(history: History) -> dict[str, Reference]:
    """Base, models and uniform merges by their names in the log, as far as they have scores."""
    assert history.begun is not None
    study, tasks = history.begun["study"], history.begun["search_tasks"]
    models = [model_label(index) for index in range(len(study["models"]))]
    titles = {BASE: BASE, **dict(zip(models, short_names(study["models"]), strict=True))}
    scores = adjusted_candidates(history, tasks)
    swept = history.start["candidate"] if history.start else None
    for label in (UNIFORM, swept):
        # The best of the sweep has a line of its own unless it is as good as the plain one.
        if label == UNIFORM or (label and scores.get(label) != scores.get(UNIFORM)):
            titles[label] = candidate_words(label)
    return {
        label: Reference(title, scores[label], len(tasks) - len(history.missing(label, 0, tasks)))
        for label, title in titles.items()
        if label in scores
    }


def _columns(history: History, status: Mapping[str, Any], labels: Sequence[str]) -> list[Column]:
    """What the study ended with; empty before."""
    outcome = status["outcome"]
    if outcome is None or history.finished is None or history.begun is None:
        return []
    winner, found = history.finished["winner"]["candidate"], []
    fresh = outcome.get("fresh")
    if fresh is not None:
        interval = None if fresh["low"] is None else (fresh["low"], fresh["high"])
        search = history.begun["search_tasks"]
        scores = tuple(history.greedy_score(label, search) for label in labels)
        found.append(Column("measured\nafresh", fresh["score"], interval, scores))
    held_out = history.begun["holdout_tasks"]
    score = history.greedy_score(winner, held_out)
    if score is not None:
        scores = tuple(history.greedy_score(label, held_out) for label in labels)
        interval = task_interval(history, winner, held_out)
        apart = status["tasks"]["holdout_suite"] is not None
        found.append(Column(held_out_words(status), score, interval, scores, apart))
    return found


def task_interval(history: History, label: str, tasks: Sequence[str]) -> Interval | None:
    """The 95 % interval of a candidate's score over tasks; None for fewer than two grades.

    It ends where its grades end.
    """
    answered = history.grades[label, 0]
    grades = [grade for task in tasks if (grade := answered.get(task)) is not None]
    if not grades:
        return None
    return mean_interval(np.array([grades]), (min(grades), max(grades)), _SEED)
