"""Radar charts: models around one circle of categories, with error bars, as PNG, SVG or PDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError
from evomerge.report.charts import COLOURS, MARKERS, STYLES, broken, write_charts
from evomerge.report.radar_table import RadarLine, RadarTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tops of scales that scores are usually on; above them, the next round number.
_TOPS = (1.0, 5.0, 10.0, 100.0)
# A category's name is broken there, so that the circle keeps its size; a model's in the legend.
_CATEGORY_WIDTH, _MODEL_WIDTH = 16, 48
# Where several models have error bars these stand side by side, this share of the radius apart.
_BESIDE = 0.022
_WIDEST_SHIFT = 0.2  # radians, near the middle
_ABOVE = 100  # of all lines
_MOST_FILLED = 2  # more areas on top of each other are mud


def draw_radar(
    table: RadarTable,
    paths: Sequence[Path],
    *,
    title: str | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
) -> list[str]:
    """Writes the chart of `table` to each path; what is worth knowing, a sentence each.

    `bounds` are the values in the middle and at the rim (None: as the scores have it). Raises
    ConfigError where a score lies outside of them or a file cannot be written.
    """
    low, high = _bounds(table, bounds)
    return write_charts(lambda: radar_figure(table, low, high, title), paths)


def _bounds(table: RadarTable, wanted: tuple[float | None, float | None]) -> tuple[float, float]:
    values = [score for line in table.lines for score in line.scores if score is not None]
    lowest, highest = min(values), max(values)
    # Of an evaluation intervals end where grades do: the rim holds them whole.
    furthest = max(highest, table.reach)
    low = wanted[0] if wanted[0] is not None else min(0.0, _round_up(-lowest) * -1.0)
    high = wanted[1] if wanted[1] is not None else _round_up(furthest)
    if not low <= lowest <= highest <= high or low == high:
        raise ConfigError(
            f"the chart goes from {low:g} to {high:g}, the scores from {lowest:g} to {highest:g}; "
            "--min and --max say where its middle and its rim are"
        )
    return low, high


def _round_up(value: float) -> float:
    """The first usual top of a scale that is not below `value`; 0 for what is not positive."""
    if value <= 0:
        return 0.0
    usual = [top for top in _TOPS if top >= value]
    digits = 10.0 ** math.floor(math.log10(value))
    return usual[0] if usual else math.ceil(value / digits) * digits


def radar_figure(table: RadarTable, low: float, high: float, title: str | None = None) -> Figure:
    """The chart as matplotlib's: middle `low`, rim `high`; each model's line comes back closed."""
    from matplotlib.figure import Figure

    rows = len(table.lines)
    figure = Figure(figsize=(7.0, 6.7 + 0.25 * rows), dpi=160)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.08)
    axes = figure.add_subplot(projection="polar")
    _draw_grid(axes, table.categories, low, high)
    for index, line in enumerate(table.lines):
        _draw_line(axes, line, index, rows)
    if title:
        figure.suptitle(title, fontsize=14)
    handles, labels = axes.get_legend_handles_labels()
    has_bars = any(interval for line in table.lines for interval in line.intervals)
    explained = [table.measure, "bars: 95 % intervals" if has_bars else ""]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        frameon=False,
        handlelength=4,
        title="; ".join(filter(None, explained)) or None,
    )
    return figure


def _draw_grid(axes: Any, categories: Sequence[str], low: float, high: float) -> None:
    """Spokes with their names around, rings with their numbers between the first two spokes."""
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(low, high)
    angles = _angles(len(categories))
    names = [broken(name, _CATEGORY_WIDTH) for name in categories]
    axes.set_xticks(angles, names, fontsize=11)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):
        side = math.sin(angle)
        label.set_horizontalalignment(
            "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        )
    rings = [low + (high - low) * step / 5 for step in range(1, 6)]
    axes.set_yticks(rings, [""] * len(rings))
    for ring in rings:  # above the lines, which would strike them through
        axes.annotate(
            f"{ring:g}",
            (angles[1] / 2, ring),
            ha="center",
            va="center",
            fontsize=8,
            color="#555555",
            zorder=_ABOVE,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        )
    axes.grid(color="#cccccc", linewidth=0.7)
    axes.spines["polar"].set_color("#999999")


def _draw_line(axes: Any, line: RadarLine, index: int, rows: int) -> None:
    colour = COLOURS[index % len(COLOURS)]
    style = STYLES[index % len(STYLES)]
    marker = MARKERS[index % len(MARKERS)]
    scores = [math.nan if score is None else score for score in line.scores]
    place = index - (rows - 1) / 2 if any(line.intervals) else 0.0
    angles = [
        angle + _shift(place, score, axes.get_ylim())
        for angle, score in zip(_angles(len(scores)), scores, strict=True)
    ]
    closed = [*angles, angles[0]], [*scores, scores[0]]
    axes.plot(
        *closed,
        color=colour,
        linestyle=style,
        linewidth=2.0,
        marker=marker,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=_label(line),
        zorder=3 + index,
        clip_on=False,
    )
    if rows <= _MOST_FILLED and not any(map(math.isnan, scores)):
        axes.fill(*closed, color=colour, alpha=0.08, linewidth=0, zorder=2)
    low, high = axes.get_ylim()
    for angle, interval in zip(angles, line.intervals, strict=True):
        if interval is not None:
            _draw_interval(axes, angle, [min(max(end, low), high) for end in interval], colour)


def _shift(place: float, score: float, ends: tuple[float, float]) -> float:
    """The angle that puts a point `place` steps beside its spoke, as far at every radius."""
    low, high = ends
    if math.isnan(score):
        return 0.0
    angle = place * _BESIDE * (high - low) / max(score - low, 1e-9)
    return min(max(angle, -_WIDEST_SHIFT), _WIDEST_SHIFT)


def _draw_interval(axes: Any, angle: float, ends: Sequence[float], colour: str) -> None:
    """A bar along the spoke from one end to the other, with a cap at each."""
    axes.plot([angle, angle], ends, color=colour, linewidth=1.4, alpha=0.9, zorder=2.5)
    bottom, top = axes.get_ylim()
    for end in ends:
        # Of the same length at every radius; angles get wider towards the middle.
        width = min(0.011 * (top - bottom) / max(end - bottom, 1e-9), 0.06)
        axes.plot(
            [angle - width, angle + width], [end, end], color=colour, linewidth=1.4, zorder=2.5
        )


def _label(line: RadarLine) -> str:
    text = f"{broken(line.model, _MODEL_WIDTH)}   mean {line.mean:.3f}"
    if line.mean_interval is None:
        return text
    low, high = line.mean_interval
    return f"{text} [{low:.2f}, {high:.2f}]"


def _angles(count: int) -> list[float]:
    return [2 * math.pi * index / count for index in range(count)]
