"""The course of a search in one picture: candidates, best so far, inputs, the winner measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.report.charts import COLOURS, broken, columns_of
from evomerge.report.table import score_text
from evomerge.report.trajectory import Column, Kind, Reference, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CANDIDATE, _WINNER, _FAILED, _BEST = COLOURS[0], COLOURS[1], COLOURS[1], "#222222"
# Of base, models, uniform merges; direct labels tell them apart where colours do not.
_LINES = ("#009E73", "#CC79A7", "#E69F00", "#666666", "#56B4E9")
_DASHES: Sequence[Any] = ("--", "-.", ":", (0, (6, 1.5)), (0, (1, 3)), (0, (4, 1, 1, 1, 1, 1)))
_SHAPES: dict[Kind, tuple[str, bool]] = {
    "stopped": ("v", False),
    "part": ("o", False),
    "whole": ("o", True),
}
_NAME_WIDTH, _TITLE_WIDTH, _LEGEND_WIDTH = 24, 17, 40  # columns; a longer name is broken
_LABEL_SIZE = 8.5
# In inches: the candidates, a column of the end, a leader to a label, a letter of it, the margins.
_MAIN, _COLUMN, _LEADER, _LETTER, _LEFT, _RIGHT = 7.0, 1.2, 0.3, 0.072, 0.75, 0.1
_HEIGHT, _BOTTOM, _TOP = 5.4, 0.12, 0.87  # inches, shares
_MANY, _MOST_NUMBERS = 60, 12
# More dots are a picture in an SVG, not elements of their own.
_MOST_ELEMENTS = 1000


def course_figure(course: Trajectory) -> Figure:
    """The picture: the candidates, the names of the lines that they are held against, the end."""
    from matplotlib.figure import Figure

    labels = [_label(one, course.search_tasks) for one in course.references]
    names = _LEADER + _LETTER * max(map(columns_of, labels), default=0)
    widths = [_MAIN, names, *(_COLUMN for _ in course.columns)]
    width = _LEFT + sum(widths) + _RIGHT
    figure = Figure(figsize=(width, _HEIGHT), dpi=160)
    left, right = _LEFT / width, 1 - _RIGHT / width
    grid = figure.add_gridspec(
        1,
        len(widths),
        width_ratios=widths,
        wspace=0.0,
        left=left,
        right=right,
        bottom=_BOTTOM,
        top=_TOP,
    )
    main = figure.add_subplot(grid[0])
    low, high = _scale(course)
    main.set_ylim(low, high)
    _draw_axes(main, course)
    _draw_references(main, course.references)
    _draw_candidates(main, course)
    if labels:
        side = figure.add_subplot(grid[1], sharey=main)
        side.set_xlim(0, names)
        _write_labels(side, course.references, labels)
    for place, column in enumerate(course.columns, start=2):
        shared = None if column.apart else main
        axes = figure.add_subplot(grid[place], sharey=shared)
        _draw_column(axes, column, _winner(course) if place == len(widths) - 1 else None)
    state = "" if course.state == "finished" else f" ({course.state})"
    figure.suptitle(f"{course.study}{state}", fontsize=13, x=left, ha="left", y=0.985)
    figure.legend(
        handles=[handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _label(one: Reference, search_tasks: int) -> str:
    """A line's height and name; how much that rests on, where it is a part of the tasks."""
    partly = "" if one.tasks == search_tasks else f"\n({one.tasks} of {search_tasks} tasks)"
    return f"{score_text(one.score)}  {broken(one.title, _NAME_WIDTH)}{partly}"


def _scale(course: Trajectory) -> tuple[float, float]:
    """The ends of the scores' axis: all that is drawn on it, and some room."""
    scores = [point.score for point in course.points]
    scores += [one.score for one in course.references]
    for column in course.columns:
        if not column.apart:
            scores += [column.score, *column.references, *(column.interval or ())]
    return _with_room([score for score in scores if score is not None])


def _with_room(scores: Sequence[float]) -> tuple[float, float]:
    low, high = min(scores), max(scores)
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - room, high + room


def _draw_axes(axes: Any, course: Trajectory) -> None:
    """Both axes, and a faint border where each generation begins, its number above."""
    places = [point.at for point in course.points]
    first = min([*course.borders.values(), *places])
    last = max(places)
    room = 0.015 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    axes.set_xlabel(course.unit)
    axes.set_ylabel(
        "mean grade, adjusted for the tasks' difficulty" if course.adjusted else "mean grade"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.7)
    axes.set_axisbelow(True)
    begun = {block: at for block, at in course.borders.items() if at <= last}
    numbered = list(begun)[:: _step(len(begun))]
    for block in begun if len(begun) <= _MANY else numbered:
        axes.axvline(begun[block], color="#dddddd", linewidth=0.7, zorder=0.5)
    ends = dict(zip(begun, [*list(begun.values())[1:], last + room], strict=True))
    middles = [(begun[block] + ends[block]) / 2 for block in numbered]
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles, [str(block) for block in numbered])
    top.tick_params(length=0, labelsize=8, colors="#777777", pad=2)
    top.spines["top"].set_visible(False)
    top.set_xlabel("generation", fontsize=8, color="#777777", labelpad=3)


def _step(number: int) -> int:
    """Every how manyth of `number` to write: 1, 2, 5, 10 …, so that few are."""
    step, factors = 1, itertools.cycle((2, 2.5, 2))
    while number > step * _MOST_NUMBERS:
        step = int(step * next(factors))
    return step


def _draw_candidates(axes: Any, course: Trajectory) -> None:
    number = len(course.points)
    size = min(max(6000 / number, 7.0), 34.0)
    for kind, (marker, filled) in _SHAPES.items():
        found = course.of_kind(kind)
        if found:
            axes.scatter(
                [point.at for point in found],
                [point.score for point in found],
                s=size * (0.7 if kind == "stopped" else 1.0),
                marker=marker,
                facecolor=_CANDIDATE if filled else "none",
                edgecolor="none" if filled else _CANDIDATE,
                linewidth=0.9,
                alpha=0.45,
                zorder=2,
                label=_explained(kind, [point.tasks for point in found], course.search_tasks),
                rasterized=number > _MOST_ELEMENTS,
            )
    failed = [point.at for point in course.of_kind("failed")]
    if failed:
        axes.plot(
            failed,
            [0.0] * len(failed),
            "x",
            color=_FAILED,
            markersize=6 if len(failed) <= _MANY else 4,
            markeredgewidth=1.4 if len(failed) <= _MANY else 0.7,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
            label=f"failed ({len(failed)})",
        )
    steps = course.best_so_far
    if steps:
        places, heights = zip(*steps, strict=True)
        axes.step(
            [*places, max(point.at for point in course.points)],
            [*heights, heights[-1]],
            where="post",
            color=_BEST,
            linewidth=1.8,
            zorder=3,
            label="best so far (as the luckiest, it flatters)",
        )
    leading = [point for point in course.points if point.number == course.leader_number]
    if leading:
        axes.plot(
            [leading[0].at],
            [leading[0].score],
            "D",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=_WINNER,
            markeredgewidth=1.8,
            zorder=6,
            label=f"{'winner' if course.state == 'finished' else 'best so far'}: {course.leader}",
        )


def _explained(kind: Kind, tasks: Sequence[int], search_tasks: int) -> str:
    """What a kind of dots is, on how many tasks, and how many there are."""
    fewest, most = min(tasks), max(tasks)
    some = f"{most}" if fewest == most else f"{fewest} to {most}"
    where = f"all {search_tasks}" if kind == "whole" else f"{some} of {search_tasks}"
    what = "stopped early, on" if kind == "stopped" else "candidate on"
    return f"{what} {where} tasks ({len(tasks)})"


def _draw_references(axes: Any, references: Sequence[Reference]) -> None:
    for one, style in zip(references, _styles(len(references)), strict=True):
        axes.axhline(one.score, zorder=1.5, **style)


def _styles(number: int) -> Iterator[dict[str, Any]]:
    """How the lines of so many references look, each in its own way."""
    for index in range(number):
        colour, dashes = _LINES[index % len(_LINES)], _DASHES[index % len(_DASHES)]
        yield {"color": colour, "linestyle": dashes, "linewidth": 1.4}


def _write_labels(axes: Any, references: Sequence[Reference], labels: Sequence[str]) -> None:
    """The names of the lines at their right ends, moved apart where lines are close."""
    axes.axis("off")
    low, high = axes.get_ylim()
    line = (high - low) * _LABEL_SIZE * 1.35 / (72 * _HEIGHT * (_TOP - _BOTTOM))
    heights = [line * (text.count("\n") + 1) for text in labels]
    wanted = [one.score for one in references]
    for one, text, style, place in zip(
        references, labels, _styles(len(labels)), apart(wanted, heights), strict=True
    ):
        ends = [0.15 * _LEADER, 0.85 * _LEADER]
        axes.plot(ends, [one.score, place], color=style["color"], linewidth=0.8)
        axes.text(_LEADER, place, text, va="center", fontsize=_LABEL_SIZE)


def apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places as near as can be to the `wanted` ones for labels of these heights, none on another.

    Labels that touch form a group, which lies around the mean of what its labels want.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _top(groups[-2], wanted, heights) > (
            2 * _middle(groups[-1], wanted) - _top(groups[-1], wanted, heights)
        ):
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(wanted)
    for group in groups:
        place = 2 * _middle(group, wanted) - _top(group, wanted, heights)
        for index in group:
            places[index] = place + heights[index] / 2
            place += heights[index]
    return places


def _middle(group: Sequence[int], wanted: Sequence[float]) -> float:
    return sum(wanted[index] for index in group) / len(group)


def _top(group: Sequence[int], wanted: Sequence[float], heights: Sequence[float]) -> float:
    return _middle(group, wanted) + sum(heights[index] for index in group) / 2


def _winner(course: Trajectory) -> str:
    """What the legend calls the winner; who it is stands there once."""
    if course.leader_number is not None:
        return "the winner measured at the end, 95 % interval"
    return (
        f"{broken(f'winner: {course.leader}', _LEGEND_WIDTH)}\nmeasured at the end, 95 % interval"
    )


def _draw_column(axes: Any, column: Column, label: str | None) -> None:
    """The winner with its interval, and the references' scores of the same tasks as dashes.

    `label` is the winner's in the legend.
    """
    axes.set_xlim(-1, 1)
    axes.set_xticks([0], [broken(column.title, _TITLE_WIDTH)], fontsize=_LABEL_SIZE)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "left"]].set_visible(False)
    for score, style in zip(column.references, _styles(len(column.references)), strict=True):
        if score is not None:
            axes.plot([-0.85, 0.75], [score, score], zorder=1.5, **style)
    if column.interval is not None:
        axes.plot(
            [0, 0], column.interval, "_-", color=_WINNER, markersize=11, linewidth=1.8, zorder=4
        )
    axes.plot(
        [0],
        [column.score],
        "D",
        color=_WINNER,
        markersize=7,
        zorder=5,
        label=label,
    )
    axes.annotate(
        score_text(column.score),
        (0, column.score),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
    if column.apart:
        scores = [column.score, *column.references, *(column.interval or ())]
        axes.set_ylim(*_with_room([score for score in scores if score is not None]))
        axes.yaxis.tick_right()
    else:
        axes.tick_params(axis="y", left=False, labelleft=False)
        axes.spines["right"].set_visible(False)
        axes.grid(axis="y", color="#eeeeee", linewidth=0.7)
