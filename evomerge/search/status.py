"""What a study's log says: its trials, the best so far, the winner and the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evomerge.errors import ConfigError
from evomerge.optimizer.adjusted import adjusted_trials
from evomerge.optimizer.history import History, Part, trial_label
from evomerge.recipe import Recipe
from evomerge.search.candidates import (
    BASE,
    UNIFORM,
    WARM,
    candidate_of,
    model_label,
    space_from_mapping,
    trial_number,
)
from evomerge.search.log import EventLog, begun_with
from evomerge.search.storage import is_held, open_log, stored_names
from evomerge.search.study import (
    StudyConfig,
    study_directory,
    study_from_mapping,
    with_options,
)

# peak: where a Gaussian process over all candidates is highest.
Source: TypeAlias = Literal["trial", "mean", "peak", "model", "uniform", "warm start"]
BEST_FILE = "best_config.yaml"


@dataclass(frozen=True)
class Best:
    """A candidate that leads: where it comes from, a trial's number, its score on search tasks.

    The score is adjusted where candidates see different tasks.
    """

    source: Source
    number: int | None
    label: str
    score: float | None


def best_trial(history: History) -> Best | None:
    """The trial with the highest adjusted score, the earliest of equals; None before the first.

    Trials that were stopped before the end of their tasks are left out, and those still under way.
    """
    scores = adjusted_trials(history, _search_tasks(history))
    whole = [
        (scores[number], -number)
        for number in history.ended_trials()
        if number in scores and not _is_stopped(history, number)
    ]
    if not whole:
        return None
    score, negative = max(whole)
    return Best("trial", -negative, trial_label(-negative), score)


def winner_of(history: History) -> Best | None:
    """The winner of a finished study, with its score on the search tasks; None before the end."""
    if history.finished is None:
        return None
    payload = history.finished["winner"]
    label = payload["candidate"]
    score = history.greedy_score(label, _search_tasks(history))
    summary = history.finished.get("summary") or {}
    if score is None and summary.get("fresh"):
        score = summary["fresh"]["score"]
    return Best(payload["source"], payload["number"], label, score)


def best_so_far(history: History) -> Best | None:
    """The winner of a finished study, else the best trial."""
    return best_trial(history) if history.finished is None else winner_of(history)


def describe(history: History, label: str) -> dict[str, Any]:
    """Where the candidate of this name comes from, for the log: source, number, candidate."""
    kind = label.partition(" ")[0]
    sources: dict[str, Source] = {
        "trial": "trial",
        "model": "model",
        UNIFORM: "uniform",
        WARM: "warm start",
    }
    source = sources.get(kind, "peak" if kind == "peak" else "mean")
    number = trial_number(label) if source == "trial" else None
    return {"source": source, "number": number, "candidate": label}


def outcome_of(history: History) -> dict[str, Any] | None:
    """The scores of baselines and winner on search and held-out tasks; None before the end.

    A score that could not be had is None; "holdout" is None where no tasks were held out. What
    follows from them (`summary.summary_of`) stands beside them.
    """
    winner = winner_of(history)
    if history.finished is None or history.begun is None or winner is None:
        return None
    held_out = history.begun["holdout_tasks"]
    return {
        "search": _scores(history, winner, _search_tasks(history)),
        "holdout": _scores(history, winner, held_out) if held_out else None,
        **(history.finished.get("summary") or {}),
    }


def study_state(history: History, running: bool) -> str:
    """ "finished", "running" or "interrupted"."""
    if history.finished is not None:
        return "finished"
    return "running" if running else "interrupted"


def trials_of(history: History) -> list[dict[str, Any]]:
    """Every trial that has come to an end, by number, as plain values."""
    adjusted = adjusted_trials(history, _search_tasks(history))
    return [
        trial
        for number in sorted(history.ended_trials())
        if (trial := _trial(history, number, adjusted.get(number))) is not None
    ]


def study_status(storage: Path, name: str) -> dict[str, Any]:
    """The JSON of `evomerge status NAME --json`, and what a report needs beside it.

    Raises ConfigError where there is no such study.
    """
    log = existing_log(storage, name)
    try:
        return status_of(log, storage, name)
    finally:
        log.close()


def status_of(log: EventLog, storage: Path, name: str) -> dict[str, Any]:
    """`study_status` of a log that is open already."""
    history = log.history
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
        "tasks": _tasks(history),
        "budget": {
            "trials": opened.get("trials"),
            "task_evaluations": opened.get("task_evaluations"),
            "spent": history.spent,
            "population": (history.begun or {}).get("population"),
        },
        "seconds": {kind: round(spent, 3) for kind, spent in history.seconds.items()},
        "stopped": history.stopped,
        "judges": [asdict(usage) for usage in log.judge_usage()],
        "gates": _gates(log, best),
    }


def _tasks(history: History) -> dict[str, Any] | None:
    """How many tasks the search has, and how many are held out of it; None before it began.

    `holdout_suite`: what the suite is called that the latter come from; None for the search's own.
    """
    if history.begun is None:
        return None
    counts = {part: len(history.begun[f"{part}_tasks"]) for part in ("search", "holdout")}
    suite = history.begun["study"].get("holdout")
    named = Path(suite).stem if isinstance(suite, str) else "another suite"
    return {**counts, "holdout_suite": named if isinstance(suite, str | Mapping) else None}


def _gates(log: EventLog, best: Best | None) -> dict[str, Any]:
    """How many answers there are and gate -> how many it closed for: of all, and of the best."""
    answers, closed = log.gate_counts()
    of_best, closed_for_best = (0, {}) if best is None else log.gate_counts(best.label)
    return {
        "answers": answers,
        "closed": closed,
        "best": {"answers": of_best, "closed": closed_for_best},
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
    return candidate_of(space, history, best.label).recipe


def stored_study(storage: Path, name: str, *, trust_code: bool = False) -> StudyConfig:
    """The study as it was last asked for. Raises ConfigError where there is none of this name."""
    log = existing_log(storage, name)
    log.close()
    begun, opened = begun_with(log), log.history.opened or {}
    asked = dict(begun["study"])
    budget = {
        "trials": opened.get("asked_trials"),
        "task_evaluations": opened.get("asked_task_evaluations"),
    }
    if any(budget.values()):
        asked["budget"] = {key: value for key, value in budget.items() if value is not None}
    if opened.get("judge"):
        asked["judge"] = opened["judge"]  # the same one, perhaps with other limits
    config = study_from_mapping(
        asked, where=f"study {name}", folder=Path(begun["folder"]), trust_code=trust_code
    )
    table = Path(asked["suite"]["data"]) if begun.get("typed_table") else None
    return with_options(config, data=table)


def existing_log(storage: Path, name: str) -> EventLog:
    """The log of study `name`, to be read and closed. Raises ConfigError where there is none."""
    log = open_log(storage, name)
    if log is None or not log.exists:
        raise ConfigError(f"{storage}: there is no study {name} ({_known(storage)})")
    return log


def _known(storage: Path) -> str:
    names = stored_names(storage)
    return f"there are {', '.join(names)}" if names else "there are none"


def _trial(history: History, number: int, adjusted: float | None) -> dict[str, Any] | None:
    key: tuple[str, Part] = (trial_label(number), "search")
    measurement = history.scores.get(key)
    if measurement is None and key not in history.failures:
        return None
    stop = history.futile.get(key[0])
    state = "failed" if key in history.failures else "stopped" if stop else "complete"
    return {
        "number": number,
        "state": state,
        "genome": list(history.genomes[number]),
        "tasks": measurement.tasks if measurement else 0,
        "score": history.score(key[0]),
        "adjusted": adjusted,
        "reason": history.failures.get(key) or (stop and stop["reason"]),
        "seconds": dict(measurement.seconds) if measurement else {},
    }


def _is_stopped(history: History, number: int) -> bool:
    return trial_label(number) in history.futile


def _search_tasks(history: History) -> Sequence[str]:
    return history.begun["search_tasks"] if history.begun else ()


def _scores(history: History, winner: Best, tasks: Sequence[str]) -> dict[str, Any]:
    begun = history.begun
    assert begun is not None, "a finished study has begun"
    scores: dict[str, Any] = {
        "base": history.greedy_score(BASE, tasks),
        "uniform": history.greedy_score(UNIFORM, tasks),
        "evolved": history.greedy_score(winner.label, tasks),
        "models": {
            name: history.greedy_score(model_label(index), tasks)
            for index, name in enumerate(begun["study"]["models"])
        },
    }
    best = history.start["candidate"] if history.start else None
    if best is not None:
        scores["uniform_best"] = {
            "scale": _scale(history, best),
            "score": history.greedy_score(best, tasks),
        }
    return scores


def _scale(history: History, label: str) -> float:
    """The weights of a uniform merge."""
    models = len(history.begun["study"]["models"]) if history.begun else 1
    return 1 / models if label == UNIFORM else float(label.removeprefix(f"{UNIFORM} "))
