"""The pictures of a study: what their lines and dots say, against logs, formulas and recipes."""

from __future__ import annotations

import itertools
import math
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from evomerge.errors import CandidateError, RunError
from evomerge.optimizer.history import History
from evomerge.recipe import Recipe
from evomerge.report import charts
from evomerge.report.charts import write_charts
from evomerge.report.course_chart import apart, course_figure
from evomerge.report.layers_chart import layer_panels, layers_figure
from evomerge.report.plots import plot_study
from evomerge.report.results import write_results
from evomerge.report.trajectory import (
    Column,
    Point,
    Reference,
    Trajectory,
    task_interval,
    trajectory_of,
)
from evomerge.search.candidates import space_from_mapping
from evomerge.search.log import begun_with
from evomerge.search.loop import run_search
from evomerge.search.status import existing_log, status_of, trial_recipe
from evomerge.search.study import StudyConfig, study_directory
from tests.search.formula import broken_above, formula_grade, opener, weights_of
from tests.search.test_course_versions import make_old
from tests.test_cli import run

Study = Callable[..., StudyConfig]
CHARTS = ["course.png", "course.svg", "layers.png", "layers.svg"]


def history_and_status(storage: Path, name: str = "formula") -> tuple[History, dict[str, Any]]:
    log = existing_log(storage, name)
    status = status_of(log, storage, name)
    log.close()
    return log.history, status


def drawn(storage: Path, name: str = "formula") -> tuple[dict[str, Any], Trajectory, list[Axes]]:
    """The status of a study, its course, and the axes of the picture, the candidates' first."""
    history, status = history_and_status(storage, name)
    course = trajectory_of(history, status)
    return status, course, course_figure(course).axes


def dots(axes: Axes, start: str) -> list[tuple[float, float]]:
    """Where the dots are whose name in the legend starts so, from the left."""
    (found,) = [one for one in axes.collections if str(one.get_label()).startswith(start)]
    return sorted((float(x), float(y)) for x, y in np.asarray(found.get_offsets()))


def line(axes: Axes, start: str) -> tuple[list[float], list[float]]:
    """x and y of the line whose name in the legend starts so."""
    (found,) = [one for one in axes.lines if str(one.get_label()).startswith(start)]
    return ends_of(found)


def ends_of(one: Line2D) -> tuple[list[float], list[float]]:
    x, y = one.get_data()
    return [float(value) for value in x], [float(value) for value in y]


def levels(axes: Axes) -> list[float]:
    """The heights of the lines from one side to the other."""
    return [y[0] for x, y in map(ends_of, axes.lines) if x == [0.0, 1.0] and y[0] == y[1]]


def borders(axes: Axes) -> list[float]:
    """Where the lines from top to bottom stand."""
    return [x[0] for x, y in map(ends_of, axes.lines) if y == [0.0, 1.0] and len(set(x)) == 1]


def noisy_grade(recipe: Recipe, task_id: str) -> float:
    """The formula's, on tasks of which some are much harder."""
    return formula_grade(recipe, task_id) * (1.0 - 0.09 * (int(task_id) % 10))


def test_candidates_best_so_far_and_inputs_stand_where_the_tables_have_them(
    study: Study, tmp_path: Path
) -> None:
    run_search(study(tasks_per_candidate=1.0), storage=tmp_path, open_evaluator=opener())
    status, course, (axes, *_) = drawn(tmp_path)
    whole = [(t["number"], t["score"]) for t in status["trials"] if t["state"] == "complete"]
    assert len(whole) == 24
    assert dots(axes, "candidate on all 7 tasks (24)") == whole
    x, y = line(axes, "best so far")
    best = list(itertools.accumulate((score for _, score in whole), max))
    steps = [n for n, score in enumerate(best) if n == 0 or score > best[n - 1]]
    assert x == [*steps, 23]
    assert y == [best[int(n)] for n in x]
    assert y[-1] == max(score for _, score in whole)
    (steps_line,) = [one for one in axes.lines if str(one.get_label()).startswith("best so far")]
    assert steps_line.get_drawstyle() == "steps-post"
    search = status["outcome"]["search"]
    assert levels(axes) == [search["base"], *search["models"].values(), search["uniform"]]
    assert [one.title for one in course.references] == ["base", "left", "right", "uniform merge"]
    assert borders(axes) == [-0.5, 5.5, 11.5, 17.5]
    winner = status["best"]
    assert line(axes, f"winner: trial {winner['number']}") == ([winner["number"]], [y[-1]])
    assert axes.get_ylabel() == "mean grade"
    assert axes.get_xlabel() == "trial"


def test_the_labels_beside_the_lines_are_their_scores_and_names(
    study: Study, tmp_path: Path
) -> None:
    run_search(study(tasks_per_candidate=1.0), storage=tmp_path, open_evaluator=opener(), trials=6)
    status, _, (axes, names, *_) = drawn(tmp_path)
    search = status["outcome"]["search"]
    assert [text.get_text() for text in names.texts] == [
        f"{search['base']:.3f}  base",
        *(f"{score:.3f}  {Path(name).name}" for name, score in search["models"].items()),
        f"{search['uniform']:.3f}  uniform merge",
    ]
    starts = [ends_of(one)[1][0] for one in names.lines]
    assert starts == levels(axes)


def test_parts_of_the_tasks_are_drawn_adjusted_and_told_apart_from_stops_and_failures(
    study: Study, tmp_path: Path
) -> None:
    config = study(
        tasks=60, holdout=False, tasks_per_candidate=0.6, budget={"trials": 36}, sweep=True
    )
    fails = broken_above(0.95)
    run_search(config, storage=tmp_path, open_evaluator=opener(grade=noisy_grade, fails=fails))
    status, course, (axes, *_) = drawn(tmp_path)
    states = Counter(trial["state"] for trial in status["trials"])
    assert min(states[state] for state in ("complete", "stopped", "failed")) > 0
    for state, start in (("complete", "candidate on 36 of 60"), ("stopped", "stopped early, on 9")):
        assert dots(axes, start) == [
            (t["number"], t["adjusted"]) for t in status["trials"] if t["state"] == state
        ]
        named = f"{start.partition(' of')[0]} of 60 tasks ({states[state]})"
        assert named in [one.get_label() for one in axes.collections]
    failed = [t["number"] for t in status["trials"] if t["state"] == "failed"]
    assert line(axes, f"failed ({len(failed)})") == (failed, [0.0] * len(failed))
    (crosses,) = [one for one in axes.lines if str(one.get_label()).startswith("failed")]
    # At the axis, whatever the scores: 0 of its height.
    assert crosses.get_transform() == axes.get_xaxis_transform()
    complete = [t["adjusted"] for t in status["trials"] if t["state"] == "complete"]
    raw = [t["score"] for t in status["trials"] if t["state"] == "complete"]
    assert max(abs(one - other) for one, other in zip(complete, raw, strict=True)) > 0.01
    assert line(axes, "best so far")[1][-1] == max(complete)
    assert axes.get_ylabel() == "mean grade, adjusted for the tasks' difficulty"
    # Adjusted scores stand beside those of the inputs, which have all tasks.
    assert [one.tasks for one in course.references] == [60] * len(course.references)
    swept = status["outcome"]["search"]["uniform_best"]
    last = course.references[-1]
    assert (last.title, last.score) == (f"uniform merge, all {swept['scale']:g}", swept["score"])


def test_a_budget_of_tasks_is_the_axis_of_the_picture(study: Study, tmp_path: Path) -> None:
    asked: list[tuple[float, ...]] = []

    def counted(recipe: Recipe, task_id: str) -> float:
        asked.append(tuple(weights_of(recipe)))
        return noisy_grade(recipe, task_id)

    config = study(tasks=60, budget={"task_evaluations": 1000}, sweep=True)
    run_search(config, storage=tmp_path, open_evaluator=opener(grade=counted))
    status, course, (axes, *_) = drawn(tmp_path)
    assert axes.get_xlabel() == "tasks answered"
    assert status["budget"]["spent"] == len(asked)
    log = existing_log(tmp_path, "formula")
    log.close()
    space = space_from_mapping(begun_with(log)["space"])
    winner = status["best"]["number"]
    ends = {
        trial["number"]: max(
            place
            for place, weights in enumerate(asked, start=1)
            if weights == tuple(space.clip(trial["genome"]))
        )
        for trial in status["trials"]
    }
    drawn_at = {point.number: point.at for point in course.points}
    drawn_at.pop(winner, None)  # it answers more at the end
    assert len(drawn_at) > 10
    assert all(drawn_at[number] == ends[number] for number in drawn_at)
    firsts = [
        min(
            place
            for place, weights in enumerate(asked)
            if weights == tuple(space.clip(status["trials"][number]["genome"]))
        )
        for number in range(0, len(status["trials"]), 6)
    ]
    assert list(course.borders.values()) == firsts
    told = [(point.at, point.score) for point in course.points if point.kind == "part"]
    assert dots(axes, "candidate on") == told


def test_the_winner_measured_afresh_and_held_out_stands_at_the_end(
    study: Study, tmp_path: Path
) -> None:
    source = np.random.RandomState(0)

    def shaky(recipe: Recipe, task_id: str) -> float:
        return min(1.0, noisy_grade(recipe, task_id) + 0.1 * source.rand())

    config = study(tasks=60, holdout=0.4, selection={"attempts": 3})
    run_search(config, storage=tmp_path, open_evaluator=opener(grade=shaky))
    status, course, (_, _, fresh, held_out) = drawn(tmp_path)
    outcome = status["outcome"]
    assert outcome["fresh"]["low"] < outcome["fresh"]["score"] < outcome["fresh"]["high"]
    scores = ("base", "uniform")
    for axes, score, of in (
        (fresh, outcome["fresh"]["score"], outcome["search"]),
        (held_out, outcome["holdout"]["evolved"], outcome["holdout"]),
    ):
        heights = {y[0] for x, y in map(ends_of, axes.lines) if len(x) == 2 and y[0] == y[1]}
        assert heights == {*(of[key] for key in scores), *of["models"].values()}
        assert ([0.0], [score]) in [ends_of(one) for one in axes.lines]
        assert [text.get_text() for text in axes.texts] == [f"{score:.3f}"]
    bar = [outcome["fresh"]["low"], outcome["fresh"]["high"]]
    assert ([0.0, 0.0], bar) in [ends_of(one) for one in fresh.lines]
    # The interval over tasks, by the normal distribution.
    history, _ = history_and_status(tmp_path)
    assert history.begun is not None
    assert history.finished is not None
    own = history.grades[history.finished["winner"]["candidate"], 0]
    grades = [own[task] for task in history.begun["holdout_tasks"]]
    half = 1.96 * float(np.std(grades, ddof=1)) / math.sqrt(len(grades))
    (interval,) = [y for x, y in map(ends_of, held_out.lines) if x == [0.0, 0.0]]
    assert interval == pytest.approx(
        [outcome["holdout"]["evolved"] - half, outcome["holdout"]["evolved"] + half], abs=half / 6
    )
    assert [column.apart for column in course.columns] == [False, False]
    assert fresh.get_ylim() == held_out.get_ylim()


def test_an_interval_does_not_leave_the_grades() -> None:
    """63 of 64 right answers: no score lies above 1."""
    history = History()
    tasks = [str(number) for number in range(64)]
    history.note_grades("trial 0", 0, {task: float(task != "5") for task in tasks})
    found = task_interval(history, "trial 0", tasks)
    assert found is not None
    assert 0.9 < found[0] < 63 / 64 < found[1] <= 1.0
    assert task_interval(history, "trial 0", tasks[:1]) is None


def test_a_second_suite_has_a_scale_of_its_own(study: Study, tmp_path: Path) -> None:
    rows = "\n".join(f'{{"id": "{n}", "input": "{n}+1", "output": "7"}}' for n in range(8))
    (tmp_path / "second.jsonl").write_text(rows + "\n")

    def grade(recipe: Recipe, task_id: str) -> float:
        number = task_id.removeprefix("holdout/")
        return formula_grade(recipe, number) * (1.0 if number == task_id else 100.0)

    config = study(holdout={"scorer": "numeric", "data": "second.jsonl"})
    run_search(config, storage=tmp_path, open_evaluator=opener(grade=grade), trials=6)
    status, course, (axes, _, held_out) = drawn(tmp_path)
    assert axes.get_ylim()[1] < 2 < held_out.get_ylim()[0] < held_out.get_ylim()[1]
    assert course.columns[0].apart
    assert ([0.0], [status["outcome"]["holdout"]["evolved"]]) in map(ends_of, held_out.lines)
    assert held_out.get_xticklabels()[0].get_text().replace("\n", " ") == "held out: another suite"


def test_a_study_of_the_first_version_which_measured_nothing_afresh_is_drawn(
    study: Study, tmp_path: Path
) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    make_old(tmp_path)
    with sqlite3.connect(tmp_path / "evomerge.db") as database:
        without = "UPDATE events SET payload = json_remove(payload, '$.summary')"
        changed = database.execute(f"{without} WHERE kind = 'finished'")
        assert changed.rowcount == 1
    ran = run("plot", "formula", "--storage", tmp_path)
    assert (ran.status, ran.err) == (0, "")
    status, course, _ = drawn(tmp_path)
    assert [(one.title, one.score) for one in course.columns] == [
        ("held out", status["outcome"]["holdout"]["evolved"])
    ]


def stops_after(units: int) -> Callable[[Recipe], Exception | None]:
    """Ctrl-C at a unit."""
    left = itertools.count(-units)

    def fails(recipe: Recipe) -> Exception | None:
        del recipe
        if next(left) >= 0:
            raise KeyboardInterrupt
        return None

    return fails


@pytest.mark.parametrize("ended", [1, 9])
def test_an_interrupted_study_is_drawn_as_far_as_it_came_and_then_to_its_end(
    ended: int, study: Study, tmp_path: Path
) -> None:
    config = study(tasks_per_candidate=1.0)
    with pytest.raises(KeyboardInterrupt):
        # Base, two models, the uniform merge, and as many trials; one more is on its way.
        run_search(
            config, storage=tmp_path, open_evaluator=opener(fails=stops_after(4 + ended + 1))
        )
    ran = run("plot", "formula", "--storage", tmp_path)
    folder = study_directory(tmp_path, "formula")
    files = "".join(f"{folder / name}\n" for name in CHARTS)
    assert (ran.status, ran.out, ran.err) == (0, files, "")
    assert all((folder / name).stat().st_size > 10_000 for name in CHARTS)
    status, course, all_axes = drawn(tmp_path)
    assert status["state"] == "interrupted"
    assert len(course.points) in (ended, ended + 1)
    before = dots(all_axes[0], "candidate on all 7 tasks")
    assert len(all_axes) == 2  # nothing was measured at the end
    assert all_axes[0].figure.get_suptitle() == "formula (interrupted)"
    best = status["best"]["number"]
    assert line(all_axes[0], f"best so far: trial {best}") == ([best], [status["best"]["score"]])
    run_search(config, storage=tmp_path, open_evaluator=opener())
    _, _, (axes, *_) = drawn(tmp_path)
    assert dots(axes, "candidate on all 7 tasks (24)")[: len(before)] == before
    assert axes.figure.get_suptitle() == "formula"


def test_a_study_without_a_score_gives_one_line_and_no_picture(
    study: Study, tmp_path: Path
) -> None:
    def fails(recipe: Recipe) -> Exception | None:
        return CandidateError("NaN") if len(set(weights_of(recipe))) > 2 else None

    with pytest.raises(RunError):
        run_search(study(), storage=tmp_path, open_evaluator=opener(fails=fails))
    ran = run("plot", "formula", "--storage", tmp_path)
    assert (ran.status, ran.out, ran.err) == (
        2,
        "",
        "error: study formula has no scored trial yet; it stopped: no candidate of a whole "
        "generation could be scored: NaN\n",
    )
    assert not [
        path for path in study_directory(tmp_path, "formula").iterdir() if path.suffix == ".png"
    ]


def test_the_layers_are_those_of_the_winners_recipe(study: Study, tmp_path: Path) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    history, status = history_and_status(tmp_path)
    label = f"trial {status['best']['number']}"
    (panel,) = layer_panels(history, label)
    assert (panel.number, panel.group, panel.logarithmic) == ("weight", "", False)
    recipe = trial_recipe(tmp_path, "formula")
    weights: dict[str, list[float]] = {}
    for part in recipe.slices or ():
        for source in part.sources:
            if "weight" in source.parameters:
                weight = source.parameters["weight"]
                assert isinstance(weight, float)
                weights.setdefault(Path(source.model).name, []).append(weight)
    assert {one.model: list(one.values) for one in panel.lines} == weights
    (axes,) = layers_figure([panel], "title").axes
    for patch, name in zip(axes.patches, weights, strict=True):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        assert (list(values), list(edges)) == (weights[name], [0, 2, 4])
        assert patch.get_label() == name
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["left", "right"]


def test_every_number_and_group_that_has_slices_has_a_panel(study: Study, tmp_path: Path) -> None:
    space = {
        "merge_method": "dare_ties",
        "layer_granularity": 2,
        "filters": ["mlp"],
        "density": {"low": 0.1, "high": 1.0, "log": True},
    }
    run_search(study(search_space=space), storage=tmp_path, open_evaluator=opener(), trials=6)
    history, _ = history_and_status(tmp_path)
    panels = layer_panels(history, "trial 0")
    assert [(one.number, one.group, one.logarithmic) for one in panels] == [
        ("weight", "mlp", False),
        ("density", "mlp", True),
        ("weight", "rest", False),
        ("density", "rest", True),
    ]
    begun = history.begun
    assert begun is not None
    clipped = space_from_mapping(begun["space"]).clip(history.genomes[0])
    # The genome's order: slices, models, groups, numbers.
    genome_SMGN = clipped.reshape(2, 2, 2, 2)
    for place, panel in enumerate(panels):
        for model, one in enumerate(panel.lines):
            assert list(one.values) == genome_SMGN[:, model, place // 2, place % 2].tolist()
    scales = [axes.get_yscale() for axes in layers_figure(panels, "title").axes]
    assert scales == ["linear", "log", "linear", "log"]


def test_a_gradients_anchors_lie_evenly_from_the_first_layer_to_the_last(
    study: Study, tmp_path: Path
) -> None:
    space = {"layer_granularity": 1, "smooth": True}
    run_search(study(search_space=space), storage=tmp_path, open_evaluator=opener(), trials=6)
    history, _ = history_and_status(tmp_path)
    (panel,) = layer_panels(history, "trial 0")
    (axes,) = layers_figure([panel], "title").axes
    gradients = [
        source.parameters["weight"]
        for source in (trial_recipe(tmp_path, "formula", 0).models or ())[:2]
    ]
    assert [ends_of(one) for one in axes.lines[:2]] == [
        ([0.0, 1.0, 2.0, 3.0], gradient) for gradient in gradients
    ]


@pytest.mark.parametrize("label", ["uniform", "base", "model 0"])
def test_what_nothing_was_searched_in_has_no_layers(
    label: str, study: Study, tmp_path: Path
) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    history, _ = history_and_status(tmp_path)
    assert layer_panels(history, label) == []


def test_one_slice_has_no_layers_and_those_of_before_go(study: Study, tmp_path: Path) -> None:
    config = study(search_space={"layer_granularity": 4})
    run_search(config, storage=tmp_path, open_evaluator=opener(), trials=6)
    stale = study_directory(tmp_path, "formula") / "layers.png"
    stale.write_bytes(b"of another best trial")
    assert [path.name for path in plot_study(tmp_path, "formula", print)] == CHARTS[:2]
    assert not stale.exists()


def test_the_report_shows_the_pictures_that_lie_beside_it(study: Study, tmp_path: Path) -> None:
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    results = write_results(tmp_path, "formula", print)
    assert [path.name for path in results.charts] == CHARTS
    report = results.report.read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert shown == ["course.png", "layers.png"]
    assert all((results.report.parent / name).stat().st_size > 10_000 for name in CHARTS)
    assert "`course.png`, `course.svg`, `layers.png`, `layers.svg`" in report
    first = {path: path.read_bytes() for path in results.charts}
    write_results(tmp_path, "formula", print)
    assert {path: path.read_bytes() for path in results.charts} == first


def test_without_matplotlib_a_study_ends_without_pictures_and_says_so(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    run_search(study(), storage=tmp_path, open_evaluator=opener(), trials=6)
    said: list[str] = []
    results = write_results(tmp_path, "formula", said.append)
    assert "no charts: charts need matplotlib: pip install 'evomerge[plots]'" in said
    report = results.report.read_text()
    assert (results.charts, "png" in report, "## Course" in report) == ((), False, False)


def test_matplotlib_is_loaded_where_something_is_drawn_and_not_before() -> None:
    script = (
        "import sys\n"
        "import evomerge.commands.plot, evomerge.commands.search, evomerge.report.plots\n"
        "import evomerge.report.results\n"
        "print('matplotlib' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def course_of(*points: Point, **more: Any) -> Trajectory:
    """A finished study of these trials, as its picture needs it."""
    plain: dict[str, Any] = {
        "study": "日本語",
        "state": "finished",
        "unit": "trial",
        "borders": {block: 24 * block - 0.5 for block in range(-(-len(points) // 24))},
        "references": (Reference("base $x$", 0.0, 100),),
        "columns": (Column("held out", 0.5, (0.4, 0.6), (0.1,)),),
        "search_tasks": 100,
        "adjusted": True,
        "leader": "trial 0",
        "leader_number": 0,
    }
    return Trajectory(points=points, **(plain | more))


def test_the_best_so_far_is_none_that_was_stopped_or_failed_and_goes_by_the_spending() -> None:
    course = course_of(
        Point(0, 90, 0.5, "part", 25),
        Point(1, 40, 0.9, "stopped", 6),
        Point(2, 60, 0.3, "whole", 100),
        Point(3, 95, None, "failed", 0),
        Point(4, 99, 0.5, "part", 25),
        unit="tasks answered",
        borders={0: 10.0},
    )
    assert course.best_so_far == [(60, 0.3), (90, 0.5)]
    axes = course_figure(course).axes[0]
    assert line(axes, "best so far") == ([60, 90, 99], [0.3, 0.5, 0.5])
    assert line(axes, "failed (1)")[0] == [95]


@pytest.mark.parametrize("number", [1, 5000])
def test_any_number_of_candidates_makes_a_picture_of_ordinary_size(
    number: int, tmp_path: Path
) -> None:
    source = np.random.RandomState(0)
    course = course_of(*(Point(n, n, float(source.normal()), "part", 25) for n in range(number)))
    paths = [tmp_path / "a.png", tmp_path / "a.svg", tmp_path / "b.png", tmp_path / "b.svg"]
    assert write_charts(lambda: course_figure(course), paths[:2]) == []
    write_charts(lambda: course_figure(course), paths[2:])
    assert paths[0].read_bytes() == paths[2].read_bytes()
    assert paths[1].read_bytes() == paths[3].read_bytes()
    assert all(10_000 < path.stat().st_size < 1_500_000 for path in paths)
    axes = course_figure(course).axes[0]
    assert len(dots(axes, "candidate on 25 of 100 tasks")) == number
    assert borders(axes) == ([-0.5] if number == 1 else [480.0 * step - 0.5 for step in range(11)])


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([3.0, 1.0], [3.0, 1.0]),
        ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]),
        ([1.0, 1.5, 9.0], [0.75, 1.75, 9.0]),
        ([0.9, 0.0, 1.7], [0.0 + 13 / 15, -2 / 15, 28 / 15]),
    ],
)
def test_labels_are_moved_apart_and_no_further(
    wanted: Sequence[float], places: Sequence[float]
) -> None:
    assert apart(wanted, [1.0] * len(wanted)) == pytest.approx(places)


def test_labels_of_two_lines_take_their_room() -> None:
    low, high = apart([0.0, 0.1], [2.0, 1.0])
    assert high - low == pytest.approx(1.5)
