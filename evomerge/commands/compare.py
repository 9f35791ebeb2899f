"""`evomerge compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from evomerge.commands.options import JsonOption, StorageOption, storage_directory
from evomerge.commands.terminal import print_json


def compare(
    first: Annotated[str, typer.Argument(metavar="STUDY_A", help="A study's name.")],
    second: Annotated[str, typer.Argument(metavar="STUDY_B", help="Another one's.")],
    *,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the winners of two studies.

    They are paired on the tasks that both answered.
    """
    from evomerge.search.compare import compare_studies

    found = compare_studies(storage_directory(storage), first, second)
    if as_json:
        print_json(found)
        return
    from evomerge.report.comparison import comparison_lines, comparison_table, tasks_table
    from evomerge.report.screen import Screen

    screen = Screen()
    screen.show(comparison_table(found), tasks_table(found))
    screen.tell(comparison_lines(found))
