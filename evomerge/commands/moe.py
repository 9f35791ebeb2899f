"""`evomerge moe`."""

from __future__ import annotations

import sys
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
from evomerge.commands.terminal import mistakes_of, say, stdout_for_results
from evomerge.resources import locate


def moe(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG.yaml|PRESET", help="Any mergekit-moe YAML, or a preset."),
    ],
    out: OutFolderArgument,
    *,
    seed: Annotated[int, typer.Option(metavar="N", help="For random gates and noise.")] = 0,
    max_shard_size: ShardSizeOption = "5GB",
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Warn of unknown keys and of equal experts, and go on."),
    ] = False,
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a mixture of experts from dense models.

    The output is a complete model folder, with tokenizer, chat template and card.
    """
    shard_bytes = parse_size(max_shard_size)
    from evomerge.merge.publishing import refuse_existing
    from evomerge.moe_config import mixture_text, read_moe_config
    from evomerge.report.merge_display import MergeDisplay
    from evomerge.report.moe import build_moe

    file = locate(config, "mixtures")
    wanted = read_moe_config(file, lenient=lenient, say=say)
    refuse_existing(out.absolute(), overwrite=overwrite)
    inputs = input_models(storage)
    with mistakes_of(file), stdout_for_results(), MergeDisplay(sys.stderr) as display:
        build_moe(
            wanted,
            out,
            inputs,
            verbatim=mixture_text(file.read_text(encoding="utf-8")),
            seed=seed,
            max_shard_size=shard_bytes,
            overwrite=overwrite,
            progress=display,
            say=say,
        )
    print(out)
