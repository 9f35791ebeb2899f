"""`evomerge status`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.commands.options import JsonOption, StorageOption, storage_directory
from evomerge.commands.terminal import print_json
from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.report.table import Row


def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A study; else all.")] = None,
    *,
    importance: Annotated[
        bool, typer.Option("--importance", help="Which genes, slices and tensor groups matter.")
    ] = False,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """What studies there are, or how one of them stands."""
    from evomerge.report.certainty import certainty_lines
    from evomerge.report.status import status_text, studies_text
    from evomerge.report.table import held_out_words, outcome_rows, task_counts
    from evomerge.search.status import list_studies, study_status

    directory = storage_directory(storage)
    if importance:
        _show_importance(directory, name, as_json=as_json)
        return
    if name is None:
        studies = list_studies(directory)
        if as_json:
            print_json({"studies": studies})
        else:
            print(studies_text(studies))
        return
    found = study_status(directory, name)
    if as_json:
        print_json(found)
        return
    print(status_text(found))
    if found["outcome"] is not None:
        sentences = certainty_lines(found["outcome"])
        words = held_out_words(found)
        show_outcome(outcome_rows(found), task_counts(found), words, sentences)


def show_outcome(
    rows: Sequence[Row], tasks: tuple[int, int], held_out: str, certainty: Sequence[str]
) -> None:
    """The table of a finished study, and how sure it is."""
    from evomerge.report.screen import Screen
    from evomerge.report.table import outcome_table

    screen = Screen()
    screen.show(outcome_table(rows, tasks, held_out))
    screen.tell(certainty)


def _show_importance(storage: Path, name: str | None, *, as_json: bool) -> None:
    """`evomerge status NAME --importance`: the status with one key more, or its table."""
    if name is None:
        raise ConfigError("--importance is about one study: evomerge status NAME --importance")
    from evomerge.search.sensitivity import study_sensitivity

    found = study_sensitivity(storage, name)
    if as_json:
        from evomerge.search.status import study_status

        print_json({**study_status(storage, name), "importance": found})
        return
    from evomerge.report.importance import importance_lines, importance_table, sums_table
    from evomerge.report.screen import Screen

    screen = Screen()
    screen.show(importance_table(found), sums_table(found))
    screen.tell(importance_lines(found))
