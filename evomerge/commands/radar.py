"""`evomerge radar`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import OverwriteOption
from evomerge.commands.terminal import say


def radar(
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="Scores by category.")],
    out: Annotated[list[Path], typer.Argument(metavar="OUT.png", help="PNG, SVG or PDF files.")],
    *,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="What stands above.")] = None,
    low: Annotated[
        float | None, typer.Option("--min", metavar="X", help="The score in the middle.")
    ] = None,
    high: Annotated[
        float | None, typer.Option("--max", metavar="X", help="The score at the rim.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a radar chart of a table of scores.

    Models and categories are the table's, and error bars where it has them.
    """
    from evomerge.report.charts import check_charts
    from evomerge.report.radar import draw_radar
    from evomerge.report.radar_table import read_radar_table

    scores = read_radar_table(table)
    check_charts(out, overwrite=overwrite)
    for note in draw_radar(scores, out, title=title, bounds=(low, high)):
        say(f"note: {note}")
    for path in out:
        print(path)
