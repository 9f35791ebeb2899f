"""`evomerge extract-lora`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.commands.options import (
    InputsOption,
    JsonOption,
    OverwriteOption,
    input_models,
    possible_output,
)
from evomerge.commands.terminal import print_json, refuse_input, say

if TYPE_CHECKING:
    from evomerge.merge.extract import Extraction


def extract(
    fine: Annotated[
        str, typer.Argument(metavar="FINE", help="The fine-tuned model, as MODEL of `gguf`.")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was fine-tuned from.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The adapter's folder to write.", callback=possible_output
        ),
    ],
    *,
    rank: Annotated[int, typer.Option(metavar="R", help="The rank of each module, at most.")],
    explained: Annotated[
        float, typer.Option(metavar="SHARE", help="Stop each module's rank at this share.")
    ] = 1.0,
    save_others: Annotated[
        bool, typer.Option("--save-others", help="Norms, biases, embeddings that differ, whole.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write what fine-tuning changed as a LoRA adapter.

    The adapter is PEFT's; how much of the change it explains is told.
    """
    from evomerge.merge.extract import check_extraction, extract_lora

    refuse_input(out, fine, base)
    settings: dict[str, Any] = {"explained": explained, "dtype": dtype, "overwrite": overwrite}
    check_extraction(out, rank, **settings)
    inputs = input_models(storage)
    models = inputs.resolve(fine), inputs.resolve(base)
    found = extract_lora(
        *models,
        out,
        rank,
        save_others=save_others,
        base_name=base,
        report=_say_every(10.0, "modules"),
        **settings,
    )
    for note in found.notes:
        say(f"note: {note}")
    if as_json:
        print_json(_extraction_json(out, found))
    else:
        print(_extraction_text(out, found))


def _extraction_json(out: Path, found: Extraction) -> dict[str, Any]:
    return {
        "adapter": str(out),
        "explained": found.total,
        "groups": found.explained,
        "ranks": dict(found.ranks),
        "saved": list(found.saved),
        "lost": list(found.lost),
    }


def _extraction_text(out: Path, found: Extraction) -> str:
    counts = Counter(module.rpartition(".")[2] for module in found.ranks)
    lines = [
        f"{group:<20} {counts[group]:>5} modules  {share:8.3%}"
        for group, share in found.explained.items()
    ]
    lines.append(f"{'explained':<20} {len(found.ranks):>5} modules  {found.total:8.3%}")
    if found.saved:
        lines.append(f"{'saved whole':<20} {len(found.saved):>5} tensors")
    return "\n".join([*lines, f"adapter {out}"])


def _say_every(seconds: float, what: str) -> Callable[[int, int], None]:
    """Tells how many of how many are done, now and then."""
    told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > seconds:
            told = time.monotonic()
            say(f"{done} of {total} {what}")

    return report
