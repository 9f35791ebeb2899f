"""The pictures of a study, in its folder: its course, and its best recipe over the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evomerge.report.charts import check_charts, write_charts
from evomerge.report.course_chart import course_figure
from evomerge.report.layers_chart import layer_panels, layers_figure
from evomerge.report.trajectory import trajectory_of
from evomerge.search.status import best_so_far, existing_log, status_of
from evomerge.search.study import study_directory

COURSE_CHARTS = ("course.png", "course.svg")
LAYERS_CHARTS = ("layers.png", "layers.svg")


def plot_study(storage: Path, name: str, say: Callable[[str], None]) -> list[Path]:
    """Draws study `name`, as far as it has come, into its folder; the files' paths.

    The layers are left out where the best candidate has no numbers of its own for each slice.
    Raises ConfigError where there is no such study or score, or no matplotlib.
    """
    log = existing_log(storage, name)
    try:
        course = trajectory_of(log.history, status_of(log, storage, name))
    finally:
        log.close()
    folder = study_directory(storage, name)
    charts = [folder / file for file in COURSE_CHARTS]
    check_charts(charts, overwrite=True)
    notes = write_charts(lambda: course_figure(course), charts)
    best = best_so_far(log.history)
    panels = [] if best is None else layer_panels(log.history, best.label)
    layers = [folder / file for file in LAYERS_CHARTS]
    if panels:
        title = f"{name}: {course.leader}"
        notes += write_charts(lambda: layers_figure(panels, title), layers)
    else:
        for file in layers:  # of a best candidate before
            file.unlink(missing_ok=True)
    for note in dict.fromkeys(notes):
        say(f"note: {note}")
    return [*charts, *(layers if panels else ())]
