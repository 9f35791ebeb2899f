"""The commands that show, answer, evaluate and compare; heavy imports wait inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.terminal import OverwriteOption, say


def radar(
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="Scores by category.")],
    out: Annotated[
        list[Path], typer.Argument(metavar="OUT.png [OUT.svg]", help="PNG, SVG or PDF files.")
    ],
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
    """Draw a radar chart of a table: models, categories, error bars where the table has them."""
    from evomerge.report.radar import check_charts, draw_radar
    from evomerge.report.radar_table import read_radar_table

    scores = read_radar_table(table)
    check_charts(out, overwrite=overwrite)
    for note in draw_radar(scores, out, title=title, bounds=(low, high)):
        say(f"note: {note}")
    for path in out:
        print(path)


COMMANDS = (radar,)
