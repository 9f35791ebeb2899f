"""What a study's log says: its trials, the best so far, the winner and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evomerge.errors import ConfigError
from evomerge.recipe import Recipe
from evomerge.search.candidates import (
    BASE,
    UNIFORM,
    candidate_of,
    model_label,
    space_from_mapping,
)
from evomerge.search.log import EventLog, History, Part, begun_with, trial_label
from evomerge.search.storage import is_held, open_log, stored_names
from evomerge.search.study import StudyConfig, study_directory, study_from_mapping

Source: TypeAlias = Literal["trial", "mean", "model", "uniform"]
BEST_FILE = "best_config.yaml"


@dataclass(frozen=True)
class Best:
    """A candidate that leads: where it comes from, a trial's number, its score on search tasks."""

    source: Source
    number: int | None
    label: str
    score: float


def best_trial(history: History) -> Best | None:
    """The trial with the highest score, the earliest of equals; None before the first score."""
    scored = [
        (measurement.score, -number, number)
        for number in history.genomes
        if (measurement := history.scores.get((trial_label(number), "search")))
    ]
    if not scored:
        return None
    score, _, number = max(scored)
    return Best("trial", number, trial_label(number), score)


def choose_winner(history: History) -> Best | None:
    """The best of trials, uniform merge and models on the search tasks; a trial wins a tie.

    The base is a baseline, not a candidate. None where nothing has a score.
    """
    labels: list[tuple[Source, str]] = [("uniform", UNIFORM)]
    labels += [("model", model_label(index)) for index in range(_model_count(history))]
    others = [
        Best(source, None, label, score)
        for source, label in labels
        if (score := history.score(label)) is not None
    ]
    trial = best_trial(history)
    return max([trial, *others] if trial else others, key=lambda best: best.score, default=None)


def best_so_far(history: History) -> Best | None:
    """The winner of a finished study, else the best trial."""
    if history.finished is None:
        return best_trial(history)
    return choose_winner(history)


def outcome_of(history: History) -> dict[str, Any] | None:
    """The scores of baselines and winner on search and held-out tasks; None before the end.

    A score that could not be had is None; "holdout" is None where no tasks were held out.
    """
    winner = choose_winner(history)
    if history.finished is None or history.begun is None or winner is None:
        return None
    held_out = bool(history.begun["holdout_tasks"])
    return {
        "search": _scores(history, winner, "search"),
        "holdout": _scores(history, winner, "holdout") if held_out else None,
    }


def study_state(history: History, running: bool) -> str:
    """ "finished", "running" or "interrupted"."""
    if history.finished is not None:
        return "finished"
    return "running" if running else "interrupted"


def trials_of(history: History) -> list[dict[str, Any]]:
    """Every trial that has come to an end, by number, as plain values."""
    return [
        trial
        for number in sorted(history.genomes)
        if (trial := _trial(history, number)) is not None
    ]


def study_status(storage: Path, name: str) -> dict[str, Any]:
    """The JSON of `evomerge status NAME --json`, and what a report needs beside it.

    Raises ConfigError where there is no such study.
    """
    log = existing_log(storage, name)
    try:
        judges = [asdict(usage) for usage in log.judge_usage()]
        return {**status_of(log.history, storage, name), "judges": judges}
    finally:
        log.close()


def status_of(history: History, storage: Path, name: str) -> dict[str, Any]:
    """`study_status` of a log that is open already."""
    directory = study_directory(storage, name)
    best = best_so_far(history)
    opened = history.opened or {}
    return {
        "study": name,
        "state": study_state(history, is_held(directory)),
        "trials": trials_of(history),
        "best": None
        if best is None
        else {
            "source": best.source,
            "number": best.number,
            "score": best.score,
            "config": str(directory / BEST_FILE),
        },
        "outcome": outcome_of(history),
        "budget": {"trials": opened.get("trials")},
        "seconds": {kind: round(spent, 3) for kind, spent in history.seconds.items()},
        "stopped": history.stopped,
    }


def list_studies(storage: Path) -> list[dict[str, Any]]:
    """Each study of a storage: name, state, number of trials that ended, best score.

    One that cannot be read is in the state "unreadable", with the reason and nothing else.
    """
    return [_listed(storage, name) for name in stored_names(storage)]


def _listed(storage: Path, name: str) -> dict[str, Any]:
    try:
        status = study_status(storage, name)
    except ConfigError as error:
        unknown = {"trials": None, "budget": None, "best": None}
        return {"study": name, "state": "unreadable", **unknown, "reason": str(error)}
    best = status["best"]
    return {
        "study": name,
        "state": status["state"],
        "trials": len(status["trials"]),
        "budget": status["budget"]["trials"],
        "best": None if best is None else best["score"],
        "reason": status["stopped"],
    }


def trial_recipe(storage: Path, name: str, number: int | None = None) -> Recipe:
    """The recipe of trial `number`; None is the winner, or the best trial while there is none.

    Raises ConfigError where there is no such study or trial.
    """
    log = existing_log(storage, name)
    log.close()
    history = log.history
    space = space_from_mapping(begun_with(log)["space"])
    best = best_so_far(history)
    if number is not None:
        if number not in history.genomes:
            raise ConfigError(
                f"study {name} has no trial {number}; there are {len(history.genomes)}, from 0"
            )
        return space.decode(history.genomes[number])
    if best is None:
        raise ConfigError(f"study {name} has no scored trial yet")
    return candidate_of(space, history.genomes, best.label).recipe


def stored_study(storage: Path, name: str, *, trust_code: bool = False) -> StudyConfig:
    """The study as it was last asked for. Raises ConfigError where there is none of this name."""
    log = existing_log(storage, name)
    log.close()
    begun, opened = begun_with(log), log.history.opened or {}
    asked = dict(begun["study"])
    asked["budget"] = {"trials": opened.get("asked_trials", asked["budget"]["trials"])}
    return study_from_mapping(
        asked, where=f"study {name}", folder=Path(begun["folder"]), trust_code=trust_code
    )


def existing_log(storage: Path, name: str) -> EventLog:
    """The log of study `name`, to be read and closed. Raises ConfigError where there is none."""
    log = open_log(storage, name)
    if log is None or not log.exists:
        raise ConfigError(f"{storage}: there is no study {name} ({_known(storage)})")
    return log


def _known(storage: Path) -> str:
    names = stored_names(storage)
    return f"there are {', '.join(names)}" if names else "there are none"


def _trial(history: History, number: int) -> dict[str, Any] | None:
    key: tuple[str, Part] = (trial_label(number), "search")
    measurement = history.scores.get(key)
    if measurement is None and key not in history.failures:
        return None
    return {
        "number": number,
        "state": "complete" if measurement else "failed",
        "genome": list(history.genomes[number]),
        "tasks": measurement.tasks if measurement else 0,
        "score": measurement.score if measurement else None,
        # All candidates see the same tasks: there is no difficulty to take off.
        "adjusted": measurement.score if measurement else None,
        "reason": None if measurement else history.failures[key],
        "seconds": dict(measurement.seconds) if measurement else {},
    }


def _model_count(history: History) -> int:
    return len(history.begun["study"]["models"]) if history.begun else 0


def _scores(history: History, winner: Best, part: Part) -> dict[str, Any]:
    models: Sequence[str] = history.begun["study"]["models"] if history.begun else ()
    return {
        "base": history.score(BASE, part),
        "uniform": history.score(UNIFORM, part),
        "evolved": history.score(winner.label, part),
        "models": {
            name: history.score(model_label(index), part) for index, name in enumerate(models)
        },
    }
