"""`evomerge export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import (
    NameArgument,
    OverwriteOption,
    StorageOption,
    storage_directory,
)
from evomerge.commands.terminal import refuse_existing_file, write_new


def export(
    name: NameArgument,
    *,
    storage: StorageOption = None,
    trial: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="A trial instead of the best.")
    ] = None,
    yaml: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write the model.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a study's best recipe, or its model.

    The recipe goes to stdout where neither is named.
    """
    from evomerge.merge.publishing import refuse_existing
    from evomerge.report.results import export_model
    from evomerge.search.status import trial_recipe

    directory = storage_directory(storage)
    recipe = trial_recipe(directory, name, trial)
    if yaml is not None:  # both places before either is written to
        refuse_existing_file(yaml, overwrite=overwrite)
    if model is not None:
        refuse_existing(model.absolute(), overwrite=overwrite)
    if yaml is not None:
        write_new(yaml, recipe.to_yaml(), overwrite=overwrite)
        print(yaml)
    if model is not None:
        print(export_model(directory, name, model, trial, overwrite=overwrite))
    if yaml is None and model is None:
        print(recipe.to_yaml(), end="")
