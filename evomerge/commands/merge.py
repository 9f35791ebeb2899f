"""`evomerge merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import (
    InputsOption,
    OutFolderArgument,
    OverwriteOption,
    ShardSizeOption,
    input_models,
    parse_size,
)
from evomerge.commands.terminal import mistakes_of, say


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Any mergekit YAML.")],
    out: OutFolderArgument,
    *,
    max_shard_size: ShardSizeOption = "5GB",
    seed: Annotated[
        int, typer.Option(metavar="N", help="For methods that draw at random (dare, della).")
    ] = 0,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Drop keys and parameters that nobody knows.")
    ] = False,
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Merge models as a mergekit YAML says.

    The output is a complete model folder, with tokenizer, chat template and card.
    """
    shard_bytes = parse_size(max_shard_size)
    from evomerge.recipe import read_recipe

    wanted = read_recipe(recipe, lenient=lenient, say=say)  # its mistakes need no torch
    from evomerge.merge.publishing import refuse_existing
    from evomerge.report.export import merge_recipe
    from evomerge.report.merge_display import MergeDisplay

    refuse_existing(out.absolute(), overwrite=overwrite)
    inputs = input_models(storage)
    with mistakes_of(recipe), MergeDisplay(sys.stderr) as display:
        merge_recipe(
            wanted,
            out,
            inputs,
            verbatim=recipe.read_text(encoding="utf-8"),
            max_shard_size=shard_bytes,
            overwrite=overwrite,
            seed=seed,
            progress=display,
        )
    print(out)
