"""Two studies side by side: their winners, paired on the tasks that both answered."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.database import can_be_read
from evomerge.errors import ConfigError
from evomerge.evaluate.ledger import Answered
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.merge.inputs import InputModels
from evomerge.optimizer.selection import paired_interval
from evomerge.search.held_out import HeldOutSuite
from evomerge.search.log import EventLog, begun_with
from evomerge.search.status import Best, best_so_far, existing_log

# The sections of a study that decide how answers come about and are graded.
_COMPARED_SECTIONS = ("suite", "judge", "engine", "holdout")


@dataclass(frozen=True)
class Side:
    """One study of a comparison: its winner (or its best trial so far) and what that answered.

    `answers` by task; `holdout` are the tasks that had no say in the search.
    """

    name: str
    begun: Mapping[str, Any]
    winner: Best
    finished: bool
    answers: Mapping[str, Sequence[Answered]]
    holdout: frozenset[str]


@dataclass(frozen=True)
class Pair:
    """The grades of one task on both sides."""

    task: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """second − first."""
        return self.second - self.first


def compare_studies(storage: Path, first: str, second: str) -> dict[str, Any]:
    """The JSON of `evomerge compare FIRST SECOND --json`; differences are second − first.

    "all" is None where the held-out tasks are of a second suite: the two have no common scale.
    Raises ConfigError where one is not there or has no scored candidate, where their grades come
    from different scorers, or where they share no task; the message lists what differs.
    """
    if first == second:
        raise ConfigError(f"{first}: a study is compared with another one; name two")
    sides = _read_side(storage, first), _read_side(storage, second)
    differs = _differences(*sides)
    _check_scorers(sides)
    shared = _shared(*sides)
    pairs = [pair for task in shared if (pair := _pair(task, sides)) is not None]
    if not pairs:
        raise ConfigError(
            "\n  ".join(
                [f"{first} and {second} share no graded task with the same prompt", *differs]
            )
        )
    held_out = sides[0].holdout & sides[1].holdout
    categories, note = _categories(storage, sides)
    return {
        "studies": [_side_json(side) for side in sides],
        "differs": differs,
        "all": _summary(pairs) if _is_one_suite(pairs, sides[0]) else None,
        "holdout": _summary([pair for pair in pairs if pair.task in held_out]),
        "searched": _summary([pair for pair in pairs if pair.task not in held_out]),
        "categories": _by_category(pairs, categories),
        "tasks": [
            {
                "task": pair.task,
                "category": categories.get(pair.task),
                "holdout": pair.task in held_out,
                "first": pair.first,
                "second": pair.second,
                "difference": pair.difference,
            }
            for pair in sorted(pairs, key=lambda pair: -abs(pair.difference))
        ],
        "left_out": _left_out(sides, shared, pairs),
        "notes": [*_notes(sides), *note],
    }


def _read_side(storage: Path, name: str) -> Side:
    with contextlib.closing(existing_log(storage, name)) as log:
        winner = best_so_far(log.history)
        if winner is None:
            raise ConfigError(f"study {name} has no scored trial yet")
        begun = begun_with(log)
        return Side(
            name=name,
            begun=begun,
            winner=winner,
            finished=log.history.finished is not None,
            answers=_answers(log, winner.label),
            holdout=frozenset(begun["holdout_tasks"]),
        )


def _answers(log: EventLog, label: str) -> dict[str, list[Answered]]:
    """What a candidate answered, by task."""
    answers: dict[str, list[Answered]] = {}
    with can_be_read(f"study {log.name}"):
        for answer in log.answered(label):
            answers.setdefault(answer.task, []).append(answer)
    return answers


def _check_scorers(sides: Sequence[Side]) -> None:
    """Raises ConfigError where the grades are of different scorers: they have no common scale."""
    first, second = (
        sorted({one.scorer for answers in side.answers.values() for one in answers})
        for side in sides
    )
    if first != second:
        names = (
            f"{side.name} by {', '.join(by)}"
            for side, by in zip(sides, (first, second), strict=True)
        )
        raise ConfigError(f"grades of different scorers cannot be compared: {'; '.join(names)}")


def _shared(first: Side, second: Side) -> list[str]:
    """The tasks that were the same on both sides, by name: so resampling them repeats itself.

    All of one id where the suites are the same; else those whose prompts are.
    """
    return [
        task
        for task, answers in sorted(first.answers.items())
        if task in second.answers
        and (
            answers[0].suite_digest == second.answers[task][0].suite_digest
            or answers[0].prompt == second.answers[task][0].prompt
        )
    ]


def _pair(task: str, sides: Sequence[Side]) -> Pair | None:
    """The task's mean grades over the same attempts of both; None where one side has none.

    Fresh attempts (from 1 on) come before attempt 0, by which a search's winner was chosen.
    """
    first, second = (
        {one.attempt: one.grade for one in side.answers[task] if one.grade is not None}
        for side in sides
    )
    if not first or not second:
        return None
    common = first.keys() & second.keys()
    attempts = {attempt for attempt in common if attempt} or common
    return Pair(task, *(_mean(grades, attempts or grades.keys()) for grades in (first, second)))


def _mean(grades: Mapping[int, float], attempts: Iterable[int]) -> float:
    found = [grades[attempt] for attempt in attempts]
    return math.fsum(found) / len(found)


def _summary(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Both means, and their difference with its paired 95 % interval over tasks; None of none."""
    if not pairs:
        return None
    first, second = (
        np.array([getattr(pair, side) for pair in pairs]) for side in ("first", "second")
    )
    difference, *interval = paired_interval(second[None], first[None], seed=0)
    return {
        "tasks": len(pairs),
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": difference,
        "interval": interval if len(pairs) > 1 else None,
    }


def _is_one_suite(pairs: Sequence[Pair], side: Side) -> bool:
    """Whether the grades are of one scale: a second suite's are not those of the first one."""
    return len({side.answers[pair.task][0].suite_digest for pair in pairs}) == 1


def _by_category(
    pairs: Sequence[Pair], categories: Mapping[str, str]
) -> dict[str, dict[str, Any] | None]:
    """`_summary` of each category, by name; none where all tasks are of one or of none."""
    members: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.task in categories:
            members.setdefault(categories[pair.task], []).append(pair)
    if len(members) < 2:
        return {}
    return {name: _summary(members[name]) for name in sorted(members)}


def _categories(storage: Path, sides: Sequence[Side]) -> tuple[dict[str, str], list[str]]:
    """Task -> category as either study's suite has them, and a note where none can be read.

    A suite's files that have changed since say nothing about the answers there are.
    """
    reasons = []
    for side in sides:
        try:
            categories, digests = _categories_of(storage, side.begun)
        except (ConfigError, ValueError) as error:
            reasons.append(str(error).splitlines()[0])
            continue
        if {one[0].suite_digest for one in side.answers.values()} <= digests:
            return categories, []
        reasons.append(f"the suite of {side.name} is not what it was")
    return {}, [f"no categories: {'; '.join(reasons)}"]


def _categories_of(storage: Path, begun: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Task -> category, and the digests, of the suites that a study's file names.

    A second suite's categories are apart from the first one's. Raises ConfigError, or ValueError.
    """
    suite = _suite_of(storage, begun, "suite")
    categories = {task.id: task.category for task in suite.tasks}
    if isinstance(begun["study"].get("holdout", 0.0), float | int):
        return categories, {suite.digest}
    held_out = HeldOutSuite(_suite_of(storage, begun, "holdout"))
    categories |= {task.id: f"{task.category} (held out)" for task in held_out.tasks}
    return categories, {suite.digest, held_out.suite.digest}


def _suite_of(storage: Path, begun: Mapping[str, Any], key: str) -> Suite:
    asked = begun["study"][key]
    config = asked if isinstance(asked, str) else SuiteConfig.model_validate(asked)
    folder = Path(begun["folder"])
    return load_suite(config, folder, find_model=InputModels(storage, folder).resolve)


def _differences(first: Side, second: Side) -> list[str]:
    """What decides grades and is not the same in both studies, a line each."""
    lines = [
        f"{key}: {first.name} has {one}, {second.name} has {other}"
        for section in _COMPARED_SECTIONS
        for key, one, other in _differing(
            section, first.begun["study"].get(section), second.begun["study"].get(section)
        )
    ]
    digests = [{one[0].suite_digest for one in side.answers.values()} for side in (first, second)]
    if digests[0] != digests[1] and not any(line.startswith("suite") for line in lines):
        lines.append("suite: the tasks or settings in its files are not the same")
    return lines


def _differing(section: str, first: object, second: object) -> list[tuple[str, str, str]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return [
            (f"{section}.{key}", _said(first.get(key)), _said(second.get(key)))
            for key in dict.fromkeys((*first, *second))
            if first.get(key) != second.get(key)
        ]
    return [(section, _said(first), _said(second))] if first != second else []


def _said(value: object) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _left_out(
    sides: Sequence[Side], shared: Sequence[str], pairs: Sequence[Pair]
) -> dict[str, int]:
    """How many tasks take no part, by the reason."""
    first, second = (side.answers.keys() for side in sides)
    return {
        "only_first": len(first - second),
        "only_second": len(second - first),
        "other_prompt": len(first & second) - len(shared),
        "unscored": len(shared) - len(pairs),
    }


def _notes(sides: Sequence[Side]) -> list[str]:
    return [
        f"study {side.name} is not finished: its best trial so far stands for it, chosen by the "
        "same answers, so its grades are biased upward"
        for side in sides
        if not side.finished
    ]


def _side_json(side: Side) -> dict[str, Any]:
    winner = side.winner
    return {
        "study": side.name,
        "state": "finished" if side.finished else "unfinished",
        "winner": {"source": winner.source, "number": winner.number, "candidate": winner.label},
    }
