"""The numbers of a recipe over the layers: weights and whatever else a search varies by slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.optimizer.history import History
from evomerge.report.charts import COLOURS, MARKERS, STYLES, broken
from evomerge.report.table import short_names
from evomerge.search.candidates import UNIFORM, genome_of, space_from_mapping
from evomerge.space import numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODEL_WIDTH = 40  # columns of the legend; a longer name is broken


@dataclass(frozen=True)
class LayerLine:
    """One number of a model (of all of them: "") over the layers: its values, slice by slice.

    `edges` are the first layer of each slice and the end of the last; where the recipe has a
    gradient, the values stand at the layers `anchors`, and between them on straight lines.
    """

    model: str
    values: tuple[float, ...]
    edges: tuple[int, ...]
    anchors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerPanel:
    """A number of the recipe ("weight"), for a group of tensors where there are several."""

    number: str
    group: str
    logarithmic: bool
    lines: tuple[LayerLine, ...]


def layer_panels(history: History, label: str) -> list[LayerPanel]:
    """The numbers that the study's candidate `label` has of its own for each slice of layers.

    Empty where there is one slice or no such number, and of inputs and uniform merges, in which
    nothing was searched.
    """
    assert history.begun is not None, "a candidate has a study"
    space = space_from_mapping(history.begun["space"])
    try:
        genome = space.clip(genome_of(history, label)).tolist()
    except KeyError:
        return []
    if label.partition(" ")[0] == UNIFORM:
        return []
    titles = _titles(history.begun["study"]["models"], space.models)
    found: dict[tuple[str, str, bool], dict[str, list[tuple[str, float]]]] = {}
    for gene, value in zip(space.form.genes, genome, strict=True):
        place = dict(gene.place)
        if "layers" in place and "number" in place:
            panel = found.setdefault((place["number"], place.get("group", ""), gene.log), {})
            model = titles.get(place.get("model", ""), "")
            panel.setdefault(model, []).append((place["layers"], value))
    smooth = space.config.smooth
    panels = [
        LayerPanel(*key, tuple(_line(model, parts, smooth) for model, parts in lines.items()))
        for key, lines in found.items()
    ]
    return panels if any(len(one.lines[0].values) > 1 for one in panels) else []


def _titles(written: Sequence[str], folders: Sequence[str]) -> Mapping[str, str]:
    """What genes call the models -> what a reader does."""
    return dict(zip(numbers.short_names(folders), short_names(written), strict=True))


def _line(model: str, parts: Sequence[tuple[str, float]], smooth: bool) -> LayerLine:
    ends = [[int(end) for end in layers.split("-")] for layers, _ in parts]
    edges = (ends[0][0], *(end for _, end in ends))
    values = tuple(value for _, value in parts)
    if not smooth or len(values) < 2:
        return LayerLine(model, values, edges)
    step = (edges[-1] - 1) / (len(values) - 1)
    return LayerLine(model, values, edges, tuple(step * index for index in range(len(values))))


def layers_figure(panels: Sequence[LayerPanel], title: str) -> Figure:
    """A panel below the other for each number and group, a line in it for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.1 + 2.5 * len(panels)), dpi=160)
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel)
    all_axes[-1].set_xlabel("layer")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=13)
    handles = {
        label: handle
        for axes in all_axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 3),
            frameon=False,
            handlelength=4,
        )
    return figure


def _draw_panel(axes: Any, panel: LayerPanel) -> None:
    for index, line in enumerate(panel.lines):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index % len(STYLES)],
            "linewidth": 2.0,
            "label": broken(line.model, _MODEL_WIDTH) or None,
        }
        if line.anchors:
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(line.anchors, line.values, marker=marker, markersize=5, **style)
        else:
            axes.stairs(line.values, line.edges, baseline=None, **style)
    axes.set_xlim(panel.lines[0].edges[0], panel.lines[0].edges[-1])
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        axes.axhline(0.0, color="#999999", linewidth=0.8, zorder=0.5)
        axes.margins(y=0.08)
    axes.set_ylabel(panel.number)
    if panel.group:
        axes.set_title(panel.group, fontsize=10, loc="left")
    axes.grid(color="#eeeeee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
