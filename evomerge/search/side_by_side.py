"""Models side by side: all answer the same tasks, and are compared task by task."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.database import Database, can_be_read, open_database
from evomerge.engine.base import Engine
from evomerge.engine.live_models import LiveModels, LiveSettings
from evomerge.errors import CandidateError, ConfigError, EvomergeError, RunError
from evomerge.evaluate.evaluation import Grading, evaluation_of
from evomerge.evaluate.graders import needs_judge, open_graders, shares_gpu
from evomerge.evaluate.judge_config import JudgeConfig
from evomerge.evaluate.ledger import UnitKey, mean_grade, record_evaluation
from evomerge.evaluate.ledger_query import LedgerRow, ledger_rows
from evomerge.evaluate.self_test import self_test, shown_prompt
from evomerge.evaluate.suite import JUDGE, Suite, check_prompt_lengths
from evomerge.evaluate.task import AnsweredError, Grader, Task, TaskResult
from evomerge.merge.checkpoint import Checkpoint
from evomerge.optimizer.selection import mean_interval, paired_interval, within

Interval = tuple[float, float]

# Fixed, so that a table made twice is the same.
_SEED = 0


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison: as the user named it, and the folder that it is."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Judging:
    """What a judge took for a model's grades, now or when they were given first.

    `reused` of the `grades` were there already: nothing was paid for them now. `cost` None where no
    prices are known.
    """

    grades: int
    reused: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Measured:
    """What one model made of the tasks, in their order; `reason` says why it made nothing.

    `known`: read from the ledger, not answered again. `unit` is what they stand under there.
    """

    model: str
    results: tuple[TaskResult, ...] = ()
    reason: str | None = None
    known: bool = False
    unit: UnitKey | None = None

    @property
    def score(self) -> float | None:
        """The mean grade; None where nothing could be graded."""
        return mean_grade(self.results)

    @property
    def unscored(self) -> int:
        return sum(result.grade is None for result in self.results)

    @property
    def cut(self) -> int:
        """How many answers were cut at their most tokens."""
        return sum(result.finish_reason == "length" for result in self.results)

    @property
    def gates(self) -> dict[str, int]:
        """How many answers each gate found something wrong with."""
        return dict(Counter(gate for result in self.results for gate in result.gates))

    @property
    def judging(self) -> Judging | None:
        """What the judge took; None where none was asked."""
        parts = [part for result in self.results for part in result.details]
        judged = [part for part in parts if part.scorer == JUDGE and part.reply is not None]
        usages = [part.usage for part in judged if part.usage is not None]
        if not judged:
            return None
        costs = [usage.cost for usage in usages if usage.cost is not None]
        return Judging(
            grades=len(judged),
            reused=len(judged) if self.known else len(judged) - len(usages),
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cost=math.fsum(costs) if costs else None,
        )

    @property
    def seconds(self) -> float:
        """What the engine took for all answers."""
        return math.fsum(result.seconds for result in self.results)


@dataclass(frozen=True)
class Difference:
    """The mean of the paired differences to another model, with its 95 % interval over tasks."""

    to: str
    mean: float
    interval: Interval


@dataclass(frozen=True)
class _Begun:
    """A model on its way: the results to come, of answers that the ledger had already, or not."""

    one: Contestant
    results: Future[list[TaskResult]]
    kept: Sequence[TaskResult] = ()


@dataclass
class SideBySide:
    """Evaluates models on the tasks of `suite`, one after another, and keeps all in `database`.

    `judged_by` says all of the graders that can change a grade. `fresh`: also what the ledger has
    already, of the very same model, engine, suite, judge and tasks, is answered again. `say` is
    told a line for each model.
    """

    suite: Suite
    live: LiveSettings
    database: Database
    graders: Mapping[str, Grader] = field(default_factory=dict)
    judged_by: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    say: Callable[[str], None] = lambda line: None

    def measure(self, contestants: Sequence[Contestant], tasks: Sequence[Task]) -> list[Measured]:
        """What each model made of the tasks; graders work while the engine is on the next one.

        A model that has no answers (its logits are NaN, too much of it cannot be graded) says why;
        what is not its own fault is raised: ConfigError, EngineDiedError, RunError. Answers without
        grades are kept then, and only graded when the same is measured again.
        """
        pending: dict[int, _Begun] = {}
        try:
            return self._measure(contestants, tasks, pending)
        except BaseException as error:
            for grader in self.graders.values():
                grader.stop()
            for begun in pending.values():
                with suppress(EvomergeError):
                    self._finish(begun)
            if pending and isinstance(error, RunError):
                self.say("what was answered and graded is kept: the same command goes on there")
            raise

    def _measure(
        self, contestants: Sequence[Contestant], tasks: Sequence[Task], pending: dict[int, _Begun]
    ) -> list[Measured]:
        """As `measure`; what is on its way is in `pending`, by its place."""
        found: dict[int, Measured] = {}
        for place, one in enumerate(contestants):
            kept = [] if self.fresh else self._kept(one, tasks)
            if kept and all(result.grade is not None for result in kept):
                found[place] = Measured(one.name, tuple(kept), known=True, unit=self._key(one))
                self.say(_line(one.name, found[place]) + ", in the ledger already")
            elif kept and self.suite.harness is None:  # which grades as it answers
                self.say(f"{one.name}: its {len(kept)} answers are in the ledger, not all graded")
                grading = Grading(self.suite, self.graders)
                pending[place] = _Begun(one, grading.grade(kept), kept)
        left = [place for place in range(len(contestants)) if place not in found | pending]
        shown: set[str] = set()
        models = LiveModels([contestants[place].folder for place in left], self.live, self.say)
        with models.opened() as each:
            for turn, engine in each:
                one = contestants[left[turn]]
                pending[left[turn]] = _Begun(one, self._begin(one, engine, tasks, shown))
                # At once what is graded by now: a kill loses no more than is in flight.
                for place in [place for place, begun in pending.items() if begun.results.done()]:
                    found[place] = self._finish(pending[place])
                    del pending[place]
        for place in list(pending):
            found[place] = self._finish(pending[place])
            del pending[place]
        return [found[place] for place in range(len(contestants))]

    def _begin(
        self,
        one: Contestant,
        engine: Engine | CandidateError,
        tasks: Sequence[Task],
        shown: set[str],
    ) -> Future[list[TaskResult]]:
        try:
            return self._answer(one, engine, tasks, shown)
        except (CandidateError, AnsweredError) as error:
            failed: Future[list[TaskResult]] = Future()
            failed.set_exception(error)
            return failed

    def _answer(
        self,
        one: Contestant,
        engine: Engine | CandidateError,
        tasks: Sequence[Task],
        shown: set[str],
    ) -> Future[list[TaskResult]]:
        if isinstance(engine, CandidateError):
            raise engine
        prompt = self_test(engine, self.suite)
        if prompt not in shown:
            shown.add(prompt)
            self.say(f"{one.name} reads the first task as\n{shown_prompt(prompt)}")
        check_prompt_lengths(engine, self.suite, tasks)
        evaluation = evaluation_of(engine, self.suite, self.graders)
        return evaluation.begin([task.id for task in tasks])

    def _finish(self, begun: _Begun) -> Measured:
        """What has become of a model, waited for and kept. Raises RunError."""
        name = begun.one.name
        try:
            results = begun.results.result()
        except (CandidateError, AnsweredError) as error:
            if isinstance(error, AnsweredError):
                self._record(begun, error.answers, counts=False)
            if not isinstance(error, CandidateError):
                raise
            self.say(f"{name} | failed: {error}")
            return Measured(name, reason=str(error))
        self._record(begun, results)
        measured = Measured(name, tuple(results), unit=self._key(begun.one))
        self.say(_line(name, measured))
        return measured

    def _record(self, begun: _Begun, results: Sequence[TaskResult], *, counts: bool = True) -> None:
        """Keeps what the ledger has not yet, with what was paid for it before."""
        graded = {result.task_id for result in begun.kept if result.grade is not None}
        new = _paid_first([*begun.kept, *results])[len(begun.kept) :]
        new = [result for result in new if result.task_id not in graded]
        record_evaluation(self.database, self._key(begun.one), new, counts=counts)

    def _kept(self, one: Contestant, tasks: Sequence[Task]) -> list[TaskResult]:
        """The ledger's answers of the same evaluation, in order; none unless it has all of them."""
        key = self._key(one)
        with can_be_read("the ledger"), self.database.begin() as connection:
            found = [
                row.to_result()
                for row in ledger_rows(connection, None, [one.name])
                if (row.recipe_digest, row.suite_digest) == (key.recipe_digest, key.suite_digest)
            ]
        # The last one with a grade, else the last one.
        found.sort(key=lambda result: result.grade is not None)
        results = {result.task_id: result for result in _paid_first(found)}
        whole = all(task.id in results for task in tasks)
        return [results[task.id] for task in tasks] if whole else []

    def _key(self, one: Contestant) -> UnitKey:
        return UnitKey(
            candidate=one.name,
            attempt=0,
            recipe_digest=_served_digest(one.folder, self.live),
            suite_digest=self._suite_digest,
            scorer=self.suite.scorer_name,
        )

    @property
    def _suite_digest(self) -> str:
        if not self.graders:
            return self.suite.digest
        text = json.dumps([self.suite.digest, dict(self.judged_by)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def measure_models(
    suite: Suite,
    tasks: Sequence[Task],
    contestants: Sequence[Contestant],
    *,
    live: LiveSettings,
    judge: JudgeConfig | None,
    storage: Path,
    folder: Path,
    environment: Mapping[str, str],
    fresh: bool = False,
    say: Callable[[str], None],
    trust_code: bool = False,
) -> list[Measured]:
    """What each model made of the tasks (`SideBySide.measure`), with everything opened for it.

    The judge is open before the first engine and after the last. `folder` is where a local judge's
    path starts, `environment` holds its key; `trust_code` is for `check_graders`. Raises
    ConfigError where a judge is to take turns with an engine, which searches alone do.
    """
    if shares_gpu(suite, judge):
        raise ConfigError(
            "judge: sleep: is for searches; models beside each other need a judge elsewhere, on "
            "another GPU (gpu: 1) or with its share of this one (options: {gpu_memory_utilization})"
        )
    database = open_database(storage)
    with open_graders(
        [suite],
        judge,
        open_database=lambda: database,
        payer=None,
        folder=folder,
        environment=environment,
        say=say,
        trust_code=trust_code,
    ) as (graders,):
        judged_by = {} if judge is None else judge.fingerprint(folder)
        together = SideBySide(suite, live, database, graders, judged_by, fresh=fresh, say=say)
        return together.measure(contestants, tasks)


def answer_rows(all_measured: Sequence[Measured]) -> list[LedgerRow]:
    """Every answer with its grades as a row of the ledger, model after model."""
    return [
        LedgerRow.of(one.unit, result)
        for one in all_measured
        if one.unit is not None
        for result in one.results
    ]


def own_interval(results: Sequence[TaskResult], grade_range: Interval) -> Interval | None:
    """The 95 % interval of the mean grade, over tasks; None for fewer than two graded ones.

    As far as it lies in the range of grades.
    """
    return mean_interval(_grades(results), grade_range, _SEED)


def difference(one: Measured, first: Measured, grade_range: Interval) -> Difference | None:
    """`one` less `first` on the tasks that both have a grade of; None for fewer than two.

    The interval as far as two grades of the range can differ.
    """
    pair = _grades(one.results), _grades(first.results)
    if pair[0].shape != pair[1].shape or np.isfinite(pair[0] - pair[1]).sum() < 2:
        return None
    mean, low, high = paired_interval(*pair, _SEED)
    widest = grade_range[1] - grade_range[0]
    return Difference(first.model, mean, within((low, high), (-widest, widest)))


def by_category(measured: Measured, suite: Suite) -> dict[str, tuple[TaskResult, ...]]:
    """The results of each category, in the order of the suite's tasks."""
    categories = {task.id: task.category for task in suite.tasks}
    found: dict[str, list[TaskResult]] = {}
    for result in measured.results:
        found.setdefault(categories[result.task_id], []).append(result)
    return {name: tuple(results) for name, results in found.items()}


def evaluation_json(
    name: str,
    suite: Suite,
    all_measured: Sequence[Measured],
    judge: JudgeConfig | None,
    *,
    judging: bool = True,
) -> dict[str, Any]:
    """The document of `evomerge eval --json`; scores in the suite's own range.

    `judging` False leaves out what the judge took, so that the same evaluation done again has the
    same document.
    """
    judges = judge.servers if judge is not None and needs_judge(suite) else ()
    first = all_measured[0]
    return {
        "suite": name,
        "scorer": suite.scorer_name,
        "judge": ", ".join(server.name for server in judges) or None,
        "models": [_model_json(one, first, suite, judging) for one in all_measured],
    }


def _model_json(one: Measured, first: Measured, suite: Suite, judging: bool) -> dict[str, Any]:
    parts, grades = by_category(one, suite), suite.grade_range
    against = None if one is first else difference(one, first, grades)
    took = {"judging": None if one.judging is None else asdict(one.judging)} if judging else {}
    return {
        "model": one.model,
        "score": one.score,
        "tasks": len(one.results),
        "unscored": one.unscored,
        "interval": own_interval(one.results, grades),
        "categories": {name: mean_grade(results) for name, results in parts.items()},
        "category_intervals": {
            name: own_interval(results, grades) for name, results in parts.items()
        },
        "difference": against
        and {"to": against.to, "mean": against.mean, "interval": against.interval},
        "cut": one.cut,
        "gates": one.gates,
        **took,
        "seconds": round(one.seconds, 3),
        "reason": one.reason,
    }


def _grades(results: Sequence[TaskResult]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(1, tasks), NaN for what is unscored."""
    return np.array([[math.nan if one.grade is None else one.grade for one in results]])


def _line(name: str, measured: Measured) -> str:
    score = "–" if measured.score is None else f"{measured.score:.3f}"
    parts = [f"{len(measured.results)} answers {measured.seconds:.1f} s"]
    if measured.cut:
        parts.append(f"{measured.cut} cut at max_tokens")
    if measured.unscored:
        parts.append(f"{measured.unscored} unscored")
    parts += [f"{count} by the gate {gate}" for gate, count in sorted(measured.gates.items())]
    return f"{name} | {', '.join(parts)} | score {score}"


def _paid_first(results: Sequence[TaskResult]) -> list[TaskResult]:
    """The results with what their judge took beside each grade, whichever of them paid for it.

    An answer that was given again reused the judge's reply: what it took is beside the first one.
    """
    paid = {
        (one.task_id, part.scorer, part.turn, part.reply): part.usage
        for one in results
        for part in one.details
        if part.usage is not None
    }
    return [
        replace(
            one,
            details=tuple(
                replace(part, usage=paid.get((one.task_id, part.scorer, part.turn, part.reply)))
                for part in one.details
            ),
        )
        for one in results
    ]


def _served_digest(folder: Path, live: LiveSettings) -> str:
    """Hex SHA-256 of a model and of what serves it: the same one gives the same answers."""
    context = live.options.get("max_model_len")
    served = [live.name, _version(live.name), live.dtype, context]
    text = json.dumps([Checkpoint.open(folder).fingerprint(), served])
    return hashlib.sha256(text.encode()).hexdigest()


def _version(engine: str) -> str | None:
    for package in (engine, f"{engine}-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
