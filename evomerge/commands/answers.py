"""`evomerge answers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import (
    JsonOption,
    NameArgument,
    OverwriteOption,
    StorageOption,
    storage_directory,
)
from evomerge.commands.terminal import print_json, refuse_existing_file, say


def answers(
    name: NameArgument,
    *,
    storage: StorageOption = None,
    trial: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=0, help="Of this trial; may be said more than once."),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="T", help="To this task alone.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all of them to a .parquet or .csv file."),
    ] = None,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Show what a study's candidates answered.

    Answers stand side by side, with grades and the judge's words.

    Without --trial and --task: base and winner on the screen, all answers in JSON and files.
    """
    from evomerge.report.answers import answer_panels, check_export, export_answers, row_to_json
    from evomerge.search.answers import study_answers, study_titles

    if export is not None:
        check_export(export)
        refuse_existing_file(export, overwrite=overwrite)
    few = export is None and not as_json
    directory = storage_directory(storage)
    rows = study_answers(directory, name, trial or (), task, few=few)
    if export is not None:
        export_answers(rows, export)
        say(f"{len(rows)} answers")
        print(export)
    elif as_json:
        found = [row_to_json(row) for row in rows]
        print_json({"study": name, "answers": found})
    else:
        from evomerge.report.screen import Screen
        from evomerge.search.log import trial_label

        titles = study_titles(directory, name)
        Screen(page=True).show(*answer_panels(rows, titles))
        answered = {row.candidate for row in rows}
        for number in trial or ():
            if trial_label(number) not in answered:
                say(f"note: trial {number} was not asked {task or 'any task'}")
