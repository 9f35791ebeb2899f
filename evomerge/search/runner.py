"""One process's run of a study: its course, driven with an engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from evomerge.errors import CandidateError, EvomergeError, RunError
from evomerge.evaluate.ledger import UnitKey, mean_grade
from evomerge.evaluate.task import (
    AnsweredCandidateError,
    AnsweredError,
    AnsweredRunError,
    TaskResult,
)
from evomerge.optimizer import events
from evomerge.optimizer.adjusted import adjusted_trials
from evomerge.optimizer.course import Course, GiveUp, Measure, Unit, Write
from evomerge.optimizer.events import Event
from evomerge.optimizer.history import Grades, History, Measurement, Part, told_numbers, trial_label
from evomerge.recipe import Recipe
from evomerge.search.bench import Bench, EngineKilledError
from evomerge.search.candidates import (
    candidate_of,
    candidate_titles,
    recipe_digest,
    trial_number,
)
from evomerge.search.log import EventLog
from evomerge.search.mirror import Mirror, MirroredSpace, MirroredTrial
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.status import BEST_FILE, Best, best_trial
from evomerge.search.storage import write_whole
from evomerge.search.story import Measured, Report, Said
from evomerge.search.timing import Stopwatch

# Candidates that follow each other and all kill the engine do not: something else does.
_DEATHS_IN_A_ROW = 3
# Units whose answers are there and whose grades are not: what a kill loses is answered again.
_MOST_PENDING = 4
_MIRROR_FILE = "optuna.journal"


@dataclass(frozen=True)
class _Begun:
    """A unit on its way: the recipe it is of, and the results to come (or why there are none)."""

    unit: Unit
    recipe: Recipe | None
    results: Future[list[TaskResult]]

    @property
    def stops_the_run(self) -> bool:
        """Whether it is known already that the run stops here."""
        return self.results.done() and isinstance(self.results.exception(), RunError)


class Runner:
    """Drives a course: measures what it asks for, writes what it says."""

    def __init__(
        self,
        study: ResolvedStudy,
        course: Course,
        log: EventLog,
        *,
        bench: Bench,
        report: Report,
        total: int,
    ) -> None:
        """`total` is the number of trials that the budget allows, for displays."""
        self._study = study
        self._course = course
        self._log = log
        self._bench = bench
        self._watch = Stopwatch()
        self._report = report
        self._total = total
        self._best: Best | None = None
        self._pending: deque[_Begun] = deque()
        self._has_stopped = False
        bench.watched_by(self._watch)

    @property
    def _history(self) -> History:
        return self._log.history

    def run(self) -> dict[str, float]:
        """The course to its end; the seconds since the last event.

        Whatever error ends it before is in the log, with all answers that there are.
        """
        try:
            return self._run()
        except KeyboardInterrupt:
            # Nobody waits for grades any more.
            if self._pending:
                self._bench.stop_grading()
                with suppress(EvomergeError):
                    self._keep_pending()
            raise
        except Exception as error:
            if not self._has_stopped:
                name = "" if isinstance(error, EvomergeError) else f"{type(error).__name__}: "
                self._note_the_end(f"{name}{error}")
            raise

    def _run(self) -> dict[str, float]:
        self._look_for_the_best()
        with self._mirror().running() as mirror:
            told = len(self._history.told)
            numbers = told_numbers(self._history)
            mirror.catch_up(len(numbers), lambda: self._mirrored_as_told(told))
            while True:
                with self._watch.measure("ask"):
                    step = self._course.next()
                if step is None:
                    return self._watch.take()
                if isinstance(step, GiveUp):
                    self._stop(step.reason, step.failures)
                elif isinstance(step, Write):
                    self._write(step, mirror)
                else:
                    self._measure_all(step)

    def _write(self, step: Write, mirror: Mirror) -> None:
        with self._watch.measure("log"):
            self._log.append(*step.events)
        for event in step.events:
            if event.kind == "futile":
                self._report(Said(f"{event.payload['candidate']} {event.payload['reason']}"))
            if event.kind == "told":
                mirror.add(self._mirrored(self._history, event.payload["block"]))
                self._look_for_the_best()

    def _measure_all(self, step: Measure) -> None:
        """Begins one unit after the other; results are taken in this order, when they are there.

        So the engine goes on while a judge still grades.
        """
        pending = self._pending
        for unit in step.units:
            while pending and (pending[0].results.done() or len(pending) >= _MOST_PENDING):
                self._take_first()
            pending.append(self._begin(unit))
            if pending[-1].stops_the_run:
                break  # no engine is there for the others
        while pending:
            self._take_first()

    def _begin(self, unit: Unit) -> _Begun:
        recipe: Recipe | None = None
        try:
            recipe = candidate_of(self._study.space, self._history, unit.label).recipe
            answers = self._kept_answers(unit, recipe)
            if answers is not None:
                return _Begun(unit, recipe, self._bench.grade(answers, unit.attempt))
            return _Begun(unit, recipe, self._bench.begin(recipe, unit.tasks, unit.attempt))
        except (CandidateError, RunError) as error:
            # What came before it is taken first.
            failed: Future[list[TaskResult]] = Future()
            failed.set_exception(error)
            return _Begun(unit, recipe, failed)

    def _kept_answers(self, unit: Unit, recipe: Recipe) -> Sequence[TaskResult] | None:
        """A unit's answers that a run before this one had and could not have graded, if any."""
        if (unit.label, unit.part, unit.attempt) not in self._history.answered:
            return None
        return self._log.kept_answers(self._key(unit, recipe), unit.tasks)

    def _take_first(self) -> None:
        """Logs what has become of the first unit on its way."""
        try:
            event = self._end_of(self._pending[0])
        except RunError as error:
            self._stop(str(error), [])
        begun = self._pending.popleft()
        self._log_end(event)
        self._tell(begun.unit, event)

    def _end_of(self, begun: _Begun) -> Event:
        """A unit's end, waited for. Raises RunError."""
        unit, recipe = begun.unit, begun.recipe
        try:
            results = begun.results.result()
            assert recipe is not None, "a unit that was answered has a recipe"
            return self._success(unit, recipe, results)
        except CandidateError as error:
            return events.failed(
                unit.label,
                unit.part,
                str(error),
                self._watch.take(),
                engine_died=isinstance(error, EngineKilledError),
                kept=self._answers_with(error, unit, recipe),
            )

    def _answers_with(
        self, error: EvomergeError, unit: Unit, recipe: Recipe | None
    ) -> tuple[UnitKey, Sequence[TaskResult]] | None:
        """The answers that a unit has without a score, if any."""
        if recipe is None or not isinstance(error, AnsweredError):
            return None
        return self._key(unit, recipe), error.answers

    def _tell(self, unit: Unit, event: Event) -> None:
        self._notice(unit)
        if unit.whole or event.kind == "failed":
            self._report(self._story(unit, event))

    def _keep_pending(self) -> None:
        """Logs what has become of the units on their way, and the answers of those without grades.

        The run ends: what is there need not be made again.
        """
        while self._pending:
            begun = self._pending.popleft()
            unit, recipe = begun.unit, begun.recipe
            try:
                event = self._end_of(begun)
            except AnsweredRunError as error:
                assert recipe is not None, "a unit that was answered has a recipe"
                key = self._key(unit, recipe)
                self._log.append(events.answered(unit.part, str(error), key, error.answers))
                continue
            except Exception:  # what ends the run is known already
                continue
            self._log.append(event)
            self._tell(unit, event)

    def _success(self, unit: Unit, recipe: Recipe, results: Sequence[TaskResult]) -> Event:
        """The event of a whole unit. Raises CandidateError where no answer could be graded."""
        assert tuple(result.task_id for result in results) == unit.tasks
        score = mean_grade(results)
        if score is None:
            words = f"none of its {len(results)} answers could be graded"
            raise AnsweredCandidateError(words, results)
        measurement = Measurement(
            score=score,
            tasks=len(results),
            unscored=sum(result.grade is None for result in results),
            cut=sum(result.finish_reason == "length" for result in results),
            recipe_digest=recipe_digest(recipe),
            seconds=self._watch.take(),
        )
        key = self._key(unit, recipe)
        return events.scored(unit.part, measurement, key, results, unit.answered)

    def _key(self, unit: Unit, recipe: Recipe) -> UnitKey:
        suite = self._study.suite_of(unit.part)
        digest = recipe_digest(recipe)
        return UnitKey(unit.label, unit.attempt, digest, suite.digest, suite.scorer_name)

    def _log_end(self, event: Event) -> None:
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

    def _killers_with(self, event: Event) -> list[tuple[str, Part]]:
        """Who killed the engine since the last score, if `event` says so of one more; else none."""
        if not event.payload.get("engine_died"):
            return []
        return [*self._history.engine_deaths, (event.payload["candidate"], event.payload["part"])]

    def _stop(self, reason: str, failures: Sequence[tuple[str, Part]], *last: Event) -> NoReturn:
        """Ends the run; `failures` are not the candidates' own and will be tried again.

        But for those of a generation that is told already: they stay what the sampler knows.
        """
        told = {(trial_label(number), "search") for number in told_numbers(self._history)}
        void = [key for key in failures if key not in told]
        self._note_the_end(reason, void, *last)
        raise RunError(
            f"study {self._study.name} stopped: {reason}; what failed so was not told to the "
            "sampler and is tried again when the study is resumed, once the cause is gone"
        ) from None

    def _note_the_end(
        self, reason: str, void: Sequence[tuple[str, Part]] = (), *last: Event
    ) -> None:
        """Logs that the run stops, after all that is on its way.

        Where nothing can be written any more, the error that ends the run is what counts.
        """
        self._has_stopped = True
        with suppress(EvomergeError):
            self._keep_pending()
        with suppress(EvomergeError):
            self._log.append(*last, events.stopped(reason, void))

    def _notice(self, unit: Unit) -> None:
        """Keeps the best trial so far up to date, as far as that is cheap.

        A candidate of other tasks than the best is compared when its generation is told.
        """
        score = self._history.score(unit.label)
        if unit.number is None or score is None or len(unit.tasks) < len(self._study.search_tasks):
            return
        if score > _height(self._best):
            self._best = Best("trial", unit.number, unit.label, score)
            self._write_best()

    def _look_for_the_best(self) -> None:
        before, self._best = self._best, best_trial(self._history)
        if self._best != before:
            self._write_best()

    def _write_best(self) -> None:
        if self._best is not None:
            with self._watch.measure("log"):
                recipe = candidate_of(self._study.space, self._history, self._best.label).recipe
                write_whole(self._study.directory / BEST_FILE, recipe.to_yaml())

    def _mirror(self) -> Mirror:
        space = self._study.space
        return Mirror(
            self._study.directory / _MIRROR_FILE,
            self._study.name,
            MirroredSpace(space.genes, space.low.tolist(), space.high.tolist()),
            self._mirrored_grades,
            lambda line: self._report(Said(line)),
        )

    def _mirrored_grades(self, labels: Sequence[str]) -> Mapping[str, Grades]:
        """candidate -> task -> grade of trials, on the tasks of their generations alone."""
        found = {}
        for label in labels:
            asked = self._history.tasks[trial_number(label) // self._study.population]
            row = self._history.grades.get((label, 0), {})
            tasks = [task.id for task in self._study.search_tasks] if asked is None else asked
            found[label] = {task: row[task] for task in tasks if task in row}
        return found

    def _mirrored_as_told(self, blocks: int) -> list[MirroredTrial]:
        """The trials of the first `blocks`, as the mirror would have been handed them then."""
        return [
            trial
            for block, history in islice(self._log.as_told(), blocks)
            for trial in self._mirrored(history, block)
        ]

    def _mirrored(self, history: History, block: int) -> list[MirroredTrial]:
        """The trials of a block that was told, by what `history` knows."""
        space = self._study.space
        scores = adjusted_trials(history, [task.id for task in self._study.search_tasks])
        found = []
        for number, _ in history.told[block]:
            genome, label = history.genomes[number], trial_label(number)
            stop = history.futile.get(label)
            trial = MirroredTrial(
                number=number,
                label=label,
                generation=number // self._study.population,
                clipped=space.clip(genome).tolist(),
                genome=genome,
                score=scores.get(number),
                reason=history.failures.get((label, "search"), stop["reason"] if stop else None),
                stopped=stop is not None,
            )
            found.append(trial)
        return found

    def _title(self, label: str) -> str:
        """A candidate's name for readers: a model's or a warm start's is as the study writes it."""
        config = self._study.config
        return candidate_titles(config.models, config.warm_start).get(label, label)

    def _story(self, unit: Unit, event: Event) -> Measured:
        """What happened with a trial in all its units, with others in this one."""
        history, ended, best = self._history, event.payload, self._best
        measurement = history.scores.get((unit.label, "search"))
        tasks: Sequence[str] = unit.tasks
        if unit.number is not None and measurement is not None and "score" in ended:
            ended = vars(measurement)
            tasks = list(history.grades[unit.label, unit.attempt])
        return Measured(
            candidate=unit.label,
            title=self._title(unit.label),
            part=unit.part,
            number=unit.number,
            generation=unit.block,
            score=ended.get("score"),
            reason=ended.get("reason"),
            tasks=ended.get("tasks", 0),
            unscored=ended.get("unscored", 0),
            cut=ended.get("cut", 0),
            limits=self._study.answer_limits(unit.part, tasks),
            seconds=ended["seconds"] if "score" in ended else {},
            best_score=best.score if best else None,
            best_number=best.number if best else None,
            done=history.trials_ended(),
            total=self._total,
        )


def _height(best: Best | None) -> float:
    return -math.inf if best is None or best.score is None else best.score
