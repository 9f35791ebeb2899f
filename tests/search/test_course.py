"""The whole course of a study: sweep, fresh tasks, stops, fresh selection, what is said of it."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateError, ConfigError, EngineDiedError, RunError
from evomerge.evaluate.task import TaskResult
from evomerge.optimizer.selection import repetition_interval
from evomerge.recipe import Recipe
from evomerge.report.results import write_results
from evomerge.search.evaluator import TimeSplit
from evomerge.search.loop import Outcome, run_search
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.status import study_status
from evomerge.search.storage import open_log
from evomerge.search.story import Measured, Said, Story
from evomerge.search.study import StudyConfig
from tests.search.formula import FormulaEvaluator, formula_grade, opener, weights_of

Study = Callable[..., StudyConfig]
FULL: dict[str, Any] = {
    "tasks": 60,
    "sweep": True,
    "selection": {"attempts": 3},
    "sampler": {"population": 8, "seed": 3},
    "budget": {"trials": 32},
}


def noisy_grade(recipe: Recipe, task: str) -> float:
    """`formula_grade`, and something of this recipe on this task alone, at most 1."""
    key = f"{weights_of(recipe)} {task}"
    return formula_grade(recipe, task) - 0.1 + 0.1 * math.sin(sum(map(ord, key)) * 12.9898)


@pytest.fixture
def full(study: Study) -> Study:
    """A study with all that a search does by default, with other values for some keys."""
    return lambda **changes: study(**{**FULL, **changes})


def search(config: StudyConfig, storage: Path, **options: Any) -> Outcome:
    options.setdefault("open_evaluator", opener(grade=noisy_grade))
    return run_search(config, storage=storage, **options)


def history_of(storage: Path) -> Any:
    log = open_log(storage, "formula")
    assert log is not None
    log.close()
    return log.history


def test_the_search_starts_from_the_best_uniform_merge_of_a_sweep(
    full: Study, tmp_path: Path
) -> None:
    status = search(full(), tmp_path).status
    history = history_of(tmp_path)
    # The best weights are about 0.9: of 0.5, 0.75, 1 and 1.25 it is 1.
    assert history.start == {"candidate": "uniform 1", "genome": [1.0] * 4}
    swept = [label for label in history.named if label.startswith("uniform")]
    assert swept == ["uniform", "uniform 0.75", "uniform 1", "uniform 1.25"]
    search_part = status["outcome"]["search"]
    assert search_part["uniform_best"]["scale"] == 1.0
    assert search_part["uniform_best"]["score"] > search_part["uniform"]
    off = search(full(sweep=False), tmp_path / "off").status
    assert "uniform_best" not in off["outcome"]["search"]


def test_scales_that_change_nothing_are_not_swept(full: Study, tmp_path: Path) -> None:
    # A linear merge divides by the sum of its weights.
    space = {"merge_method": "linear", "layer_granularity": 2}
    search(full(search_space=space), tmp_path)
    assert next(iter(history_of(tmp_path).named)) == "uniform"
    assert not any(label.startswith("uniform ") for label in history_of(tmp_path).named)


def test_each_generation_has_fresh_tasks_and_adjusted_scores_make_them_comparable(
    full: Study, tmp_path: Path
) -> None:
    def grade(recipe: Recipe, task: str) -> float:
        return formula_grade(recipe, "2") + (0.01 * int(task))  # tasks differ by difficulty alone

    config = full(smoothing=False, futility_stop=False)
    status = search(config, tmp_path, open_evaluator=opener(grade=grade)).status
    history = history_of(tmp_path)
    drawn = [tuple(tasks) for tasks in history.tasks.values()]
    assert [len(tasks) for tasks in drawn] == [10, 10, 10, 10]  # a quarter of 42, rounded
    assert len(set(drawn)) == 4
    ids = history.begun["search_tasks"]
    difficulty = sum(0.01 * int(task) for task in ids) / len(ids)
    log_recipes = {trial["number"]: trial for trial in status["trials"]}
    for trial in log_recipes.values():
        assert trial["tasks"] == 10
        genes = [min(max(gene, -0.5), 2.0) for gene in trial["genome"]]
        value = math.exp(-math.fsum((gene - 0.9) ** 2 for gene in genes) / len(genes))
        assert trial["adjusted"] == pytest.approx(value + difficulty, abs=1e-6)
        assert abs(trial["score"] - trial["adjusted"]) > 1e-6


def test_who_may_win_is_measured_afresh_on_all_search_tasks(full: Study, tmp_path: Path) -> None:
    attempts: list[tuple[int, int]] = []

    class Counting(FormulaEvaluator):
        def begin(
            self, recipe: Recipe, task_ids: Sequence[str], attempt: int
        ) -> Future[list[TaskResult]]:
            attempts.append((attempt, len(task_ids)))
            return super().begin(recipe, task_ids, attempt)

    @contextmanager
    def opened(study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
        yield Counting(split=split, grade=noisy_grade)

    status = search(full(), tmp_path, open_evaluator=opened).status
    history = history_of(tmp_path)
    fresh = [size for attempt, size in attempts if attempt]
    assert set(fresh) == {42}
    assert {attempt for attempt, _ in attempts} == {0, 1, 2, 3}
    pool = history.pools[4]
    assert pool["incumbent"] in ("peak 32", "mean 32")
    assert {"mean of means 32", "uniform 1", "uniform", "model 0", "model 1"} <= set(
        pool["challengers"]
    )
    winner = history.choices[4]["candidate"]
    assert [len(history.grades[winner, attempt]) for attempt in (1, 2, 3)] == [42] * 3
    assert status["best"]["source"] in ("mean", "peak", "trial")
    assert status["outcome"]["search"]["evolved"] == status["best"]["score"]
    outcome = status["outcome"]
    assert outcome["fresh"]["low"] <= outcome["fresh"]["score"] <= outcome["fresh"]["high"]
    left, right = full().models
    against = [one["model"] for one in outcome["differences"]]
    assert against == ["base", left, right, "uniform 1"]
    assert all(one["tasks"] == 18 for one in outcome["differences"])
    assert outcome["verdict"].startswith("The winner beats the best input, ")
    assert outcome["optimism"]["observed"] >= max(
        trial["adjusted"] for trial in status["trials"] if trial["state"] == "complete"
    )


def test_where_an_input_is_best_the_result_says_that_nothing_beats_it(
    full: Study, tmp_path: Path
) -> None:
    def grade(recipe: Recipe, task: str) -> float:
        plain = recipe.models is not None and "right" in recipe.models[0].model
        return 1.0 if plain else 0.5 * noisy_grade(recipe, task)

    status = search(full(), tmp_path, open_evaluator=opener(grade=grade)).status
    assert (status["best"]["source"], status["best"]["number"]) == ("model", None)
    right = full().models[1]
    assert status["outcome"]["verdict"] == (
        f"No merge was found that is better than an input: the winner is {right}."
    )


def test_where_no_difference_can_be_seen_the_result_says_so(full: Study, tmp_path: Path) -> None:
    def grade(recipe: Recipe, task: str) -> float:
        key = f"{weights_of(recipe)} {task}"
        return 0.5 + 0.01 * math.sin(sum(map(ord, key)) * 12.9898) + 0.01 * int(task)

    outcome = search(full(), tmp_path, open_evaluator=opener(grade=grade)).status["outcome"]
    assert outcome["verdict"].startswith("Nothing beats the best input, ")
    report = write_results(tmp_path, "formula", lambda line: None).report.read_text()
    assert outcome["verdict"] in report
    assert "| the winner less | on held-out tasks | 95 % interval | tasks |" in report


def test_the_report_and_the_table_show_the_best_uniform_merge(full: Study, tmp_path: Path) -> None:
    status = search(full(), tmp_path).status
    results = write_results(tmp_path, "formula", lambda line: None)
    names = [row.model for row in results.rows]
    assert names[-3:] == ["uniform merge", "uniform merge, all 1", "evolved merge"]
    assert results.certainty[0] == status["outcome"]["verdict"]
    assert "Measured afresh on the search tasks, 3 times with sampling" in results.certainty[1]
    card = (results.model / "README.md").read_text(encoding="utf-8")
    assert status["outcome"]["verdict"] in card


def test_a_budget_of_task_evaluations_counts_all_that_is_paid(full: Study, tmp_path: Path) -> None:
    answers: list[int] = []

    def grade(recipe: Recipe, task: str) -> float:
        answers.append(1)
        return noisy_grade(recipe, task)

    config = full(budget={"task_evaluations": 1500})
    status = search(config, tmp_path, open_evaluator=opener(grade=grade)).status
    asked = {"trials": None, "task_evaluations": 1500, "population": 8}
    assert status["budget"] == {**asked, "spent": len(answers)}
    assert 1200 < len(answers) <= 1500
    assert len(status["trials"]) >= 8
    more = full(budget={"task_evaluations": 2600})
    raised = search(more, tmp_path, open_evaluator=opener(grade=grade)).status
    assert len(raised["trials"]) > len(status["trials"])
    assert raised["budget"]["spent"] == len(answers) <= 2600


def test_a_budget_of_too_few_task_evaluations_is_refused_with_what_is_needed(
    full: Study, tmp_path: Path
) -> None:
    config = full(budget={"task_evaluations": 500})
    with pytest.raises(ConfigError, match=r"task_evaluations: 500 is less than one generation: at"):
        search(config, tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def hopeless_above(limit: float) -> Callable[[Recipe, str], float]:
    """Grades of almost nothing where the first weight of a merge is above the limit."""

    def grade(recipe: Recipe, task: str) -> float:
        bad = recipe.models is None and weights_of(recipe)[0] > limit
        return 0.01 * int(task) / 60 if bad else noisy_grade(recipe, task)

    return grade


def test_a_hopeless_candidate_is_stopped_and_the_status_says_why(
    full: Study, tmp_path: Path
) -> None:
    stories: list[Story] = []
    config = full(tasks_per_candidate=32, sampler={"population": 8, "seed": 3, "sigma0": 0.3})
    evaluator = opener(grade=hopeless_above(1.2))
    status = search(config, tmp_path, open_evaluator=evaluator, report=stories.append).status
    stopped = [trial for trial in status["trials"] if trial["state"] == "stopped"]
    assert stopped
    for trial in stopped:
        assert trial["tasks"] == 8
        assert trial["reason"].startswith("stopped after 8 of 32 tasks: on shared tasks ")
        assert f"trial {trial['number']} {trial['reason']}" in [
            story.line for story in stories if isinstance(story, Said)
        ]
    measured = [story.number for story in stories if isinstance(story, Measured)]
    numbers = [number for number in measured if number is not None]
    assert sorted(numbers + [trial["number"] for trial in stopped]) == list(range(32))
    off = full(tasks_per_candidate=32, futility_stop=False)
    states = search(off, tmp_path / "off", open_evaluator=evaluator).status["trials"]
    assert {trial["state"] for trial in states} == {"complete"}


class Grading(FormulaEvaluator):
    """Grades in another thread; each grade waits until the next candidate was begun."""

    def __init__(self, split: TimeSplit, pool: ThreadPoolExecutor) -> None:
        super().__init__(split=split, grade=noisy_grade)
        self.pool = pool
        self.begun = 0
        self.ahead = 0
        self.open = 0
        self.lock = threading.Lock()

    def begin(
        self, recipe: Recipe, task_ids: Sequence[str], attempt: int
    ) -> Future[list[TaskResult]]:
        with self.lock:
            self.ahead += self.open > 0
            self.open += 1
        results = super().begin(recipe, task_ids, attempt).result()
        return self.pool.submit(self._graded, results)

    def _graded(self, results: list[TaskResult]) -> list[TaskResult]:
        threading.Event().wait(0.01)
        with self.lock:
            self.open -= 1
        return results


def test_the_next_candidate_is_begun_while_grades_are_pending(full: Study, tmp_path: Path) -> None:
    made: list[Grading] = []

    @contextmanager
    def opened(study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
        with ThreadPoolExecutor(4) as pool:
            made.append(Grading(split, pool))
            yield made[-1]

    status = search(full(), tmp_path / "ahead", open_evaluator=opened).status
    assert made[0].ahead > 20
    plain = search(full(), tmp_path / "plain").status
    for found in (status, plain):
        for trial in found["trials"]:
            del trial["seconds"]
    assert status["trials"] == plain["trials"]
    assert status["outcome"] == plain["outcome"]


def test_an_engine_that_does_not_come_back_ends_the_run_with_what_was_answered_kept(
    full: Study, tmp_path: Path
) -> None:
    dead, opened = threading.Event(), [0]

    class Dying(FormulaEvaluator):
        begun = 0

        def begin(
            self, recipe: Recipe, task_ids: Sequence[str], attempt: int
        ) -> Future[list[TaskResult]]:
            self.begun += 1
            if self.begun == 10:  # the third trial; the grades of the first two are pending
                dead.set()
                raise EngineDiedError("no heartbeat")
            results = super().begin(recipe, task_ids, attempt).result()
            return graders.submit(self._graded, results, self.begun > 7)

        def _graded(self, results: list[TaskResult], late: bool) -> list[TaskResult]:
            if late:
                dead.wait(10)
                threading.Event().wait(0.2)
            return results

    @contextmanager
    def once(study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
        opened[0] += 1
        if opened[0] > 1:
            raise RunError("the device is gone")
        yield Dying(split=split, grade=noisy_grade)

    with (
        ThreadPoolExecutor(4) as graders,
        pytest.raises(RunError, match="did not start again: the device is gone"),
    ):
        search(full(), tmp_path, open_evaluator=once)
    history = history_of(tmp_path)
    assert [label for label, _ in history.scores if label.startswith("trial")] == [
        "trial 0",
        "trial 1",
    ]
    assert history.failures == {}
    search(full(), tmp_path)
    search(full(), tmp_path / "unbroken")
    assert history_of(tmp_path).told == history_of(tmp_path / "unbroken").told


def test_a_generation_that_is_gone_on_with_stops_whom_an_unbroken_one_stops(
    full: Study, tmp_path: Path
) -> None:
    changes = {"tasks_per_candidate": 32, "budget": {"trials": 8}}
    search(full(**changes), tmp_path / "probe")
    genomes = history_of(tmp_path / "probe").genomes
    firsts = sorted(min(max(genomes[number][0], -0.5), 2.0) for number in range(8))
    # Three are better than the other five: too few to stop any of those.
    limit, poor = (firsts[4] + firsts[5]) / 2, firsts[0]

    class Failing(FormulaEvaluator):
        full_disk_after = math.inf
        rests = 0

        def begin(
            self, recipe: Recipe, task_ids: Sequence[str], attempt: int
        ) -> Future[list[TaskResult]]:
            if len(task_ids) == 24 and not attempt:  # the rest of a trial's tasks
                self.rests += 1
                if self.rests > self.full_disk_after:
                    raise RunError("the disk is full")
                if weights_of(recipe)[0] == poor:
                    raise CandidateError("overflows")
            return super().begin(recipe, task_ids, attempt)

    def grade(recipe: Recipe, task: str) -> float:
        return 0.0 if recipe.models is None and weights_of(recipe)[0] < limit else 1.0

    def opens(full_disk_after: float) -> Any:
        @contextmanager
        def opened(study: ResolvedStudy, split: TimeSplit) -> Iterator[FormulaEvaluator]:
            evaluator = Failing(split=split, grade=grade)
            evaluator.full_disk_after = full_disk_after
            yield evaluator

        return opened

    search(full(**changes), tmp_path / "unbroken", open_evaluator=opens(math.inf))
    unbroken = history_of(tmp_path / "unbroken")
    assert list(unbroken.failures.values()) == ["overflows"]
    ((failed, _),) = unbroken.failures
    seen = int(failed.removeprefix("trial ")) + 1
    with pytest.raises(RunError, match="the disk is full"):
        search(full(**changes), tmp_path, open_evaluator=opens(seen))
    status = study_status(tmp_path, "formula")
    # Trials with their first tasks alone are still under way.
    assert [trial["number"] for trial in status["trials"]] == list(range(seen))
    assert {trial["tasks"] for trial in status["trials"]} <= {8, 32}
    assert status["best"] is None or status["best"]["number"] < seen
    search(full(**changes), tmp_path, open_evaluator=opens(math.inf))
    again = history_of(tmp_path)
    assert again.futile == unbroken.futile
    assert again.told == unbroken.told


def test_a_study_that_a_newer_evomerge_began_is_refused(full: Study, tmp_path: Path) -> None:
    search(full(), tmp_path, trials=8)
    with sqlite3.connect(tmp_path / "evomerge.db") as database:
        query = "SELECT id, payload FROM events WHERE kind = 'begun'"
        ((row, text),) = database.execute(query).fetchall()
        begun = json.dumps({**json.loads(text), "course": 99})
        database.execute("UPDATE events SET payload = ? WHERE id = ?", (begun, row))
    with pytest.raises(ConfigError, match="begun by a newer evomerge"):
        search(full(), tmp_path, trials=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"trials": 8, "task_evaluations": 9}}, "budget: is either"),
        ({"budget": {}}, "budget: is either"),
        ({"tasks_per_candidate": 1.5}, "1.5 is neither a share up to 1 nor a number of tasks"),
        ({"tasks_per_candidate": 0}, "tasks_per_candidate"),
        ({"sweep": [0.5, -1]}, "sweep"),
        ({"selection": {"attempts": -1}}, "selection.attempts"),
        ({"selection": {"attemps": 1}}, "selection.attemps: unknown key; did you mean 'attempts'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    full: Study, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        full(**changes)
    assert message in str(caught.value)


def test_all_grades_alike_end_in_a_winner_of_that_score(full: Study, tmp_path: Path) -> None:
    status = search(full(), tmp_path, open_evaluator=opener(grade=lambda *_: 0.5)).status
    assert status["best"]["score"] == 0.5
    assert status["outcome"]["fresh"] == {"score": 0.5, "low": 0.5, "high": 0.5, "attempts": 3}
    assert status["outcome"]["verdict"].startswith("Nothing beats the best input, ")


def test_the_interval_of_the_winners_score_ends_at_the_best_grade(
    full: Study, tmp_path: Path
) -> None:
    calls = count()
    grade = opener(grade=lambda *_: 0.6 if next(calls) % 50 == 0 else 1.0)
    status = search(full(), tmp_path, open_evaluator=grade, trials=8).status
    history = history_of(tmp_path)
    winner = history.choices[1]["candidate"]
    grades = np.array([list(history.grades[winner, attempt].values()) for attempt in (1, 2, 3)])
    low, high = repetition_interval(grades)
    assert high > 1
    fresh = status["outcome"]["fresh"]
    assert (fresh["low"], fresh["high"]) == (pytest.approx(low), 1.0)


def test_where_a_switch_is_dear_every_candidate_answers_all_tasks(
    full: Study, tmp_path: Path
) -> None:
    engine = {"name": "transformers", "load": "disk"}
    status = search(full(engine=engine), tmp_path, trials=8).status
    assert {trial["tasks"] for trial in status["trials"]} == {42}
    asked = full(engine=engine, tasks_per_candidate=0.5)
    status = search(asked, tmp_path / "asked", trials=8).status
    assert {trial["tasks"] for trial in status["trials"]} == {21}


def test_a_category_that_is_held_out_whole_is_said(study: Study, tmp_path: Path) -> None:
    rows = [
        {"input": "?", "output": "!", "kind": "rare" if n == 0 else f"k{n % 2}"} for n in range(9)
    ]
    (tmp_path / "kinds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = {"scorer": "exact", "data": "kinds.jsonl", "category": "kind"}
    stories: list[Story] = []
    search(study(suite=suite, holdout=0.8), tmp_path / "s", trials=6, report=stories.append)
    assert [story.line for story in stories if isinstance(story, Said)] == [
        "holdout: all tasks of the category rare are held out; the search does not see it"
    ]
