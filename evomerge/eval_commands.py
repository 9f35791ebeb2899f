"""The commands that show, answer, evaluate and compare; heavy imports wait inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evomerge.terminal import JsonOption, OverwriteOption, StorageOption, say, storage_directory


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


def compare(
    first: Annotated[str, typer.Argument(metavar="STUDY_A", help="A study's name.")],
    second: Annotated[str, typer.Argument(metavar="STUDY_B", help="Another one's.")],
    *,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the winners of two studies, paired on the tasks that both answered."""
    from evomerge.search.compare import compare_studies

    found = compare_studies(storage_directory(storage), first, second)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from evomerge.report.comparison import comparison_lines, comparison_table, tasks_table

    console = Console()
    for table in (comparison_table(found), tasks_table(found)):
        if table is not None:
            console.print(table)
    print("\n".join(comparison_lines(found)))


COMMANDS = (radar, compare)
