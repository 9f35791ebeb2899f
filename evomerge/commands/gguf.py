"""`evomerge gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import (
    ModelArgument,
    OverwriteOption,
    StorageOption,
    input_models,
    possible_output,
)
from evomerge.commands.terminal import refuse_input, say


def gguf(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT.gguf", help="The file to write.", callback=possible_output),
    ],
    *,
    kind: Annotated[
        str,
        typer.Option(
            "--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."
        ),
    ] = "f16",
    storage: StorageOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp.

    Tokenizer and chat template are in it.
    """
    from evomerge.merge.gguf import check_gguf_output, write_gguf

    refuse_input(out, model)
    check_gguf_output(out, kind, overwrite=overwrite)
    inputs = input_models(storage)
    name = Path(model).name.removesuffix(".gguf")
    for note in write_gguf(inputs.resolve(model), out, kind, overwrite=overwrite, name=name):
        say(f"note: {note}")
    print(out)
