"""What `evomerge status --importance` shows: which genes matter, and where the best ones lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

_BAR = 12
_TITLES = {"layers": "layers", "model": "model", "group": "tensor group"}


def importance_table(found: Mapping[str, Any]) -> Table:
    """A row per gene, in the order of the genome."""
    table = Table(title="What the genes do", title_justify="left")
    table.add_column("gene", overflow="fold")
    for heading in ("importance", "effect", "best quarter", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    for gene in found["genes"]:
        table.add_row(
            gene["gene"],
            f"{gene['importance']:.1%}",
            f"{gene['effect']:+.3f}",
            _spread(gene["best"]),
            _spread(gene["all"]),
            style="bold" if gene["importance"] > found["chance"] else None,
        )
    return table


def sums_table(found: Mapping[str, Any]) -> Table | None:
    """The importances of slices, models and tensor groups; None where there is one of each."""
    sums = {key: by_name for key, by_name in found["sums"].items() if by_name}
    if not sums:
        return None
    table = Table(title="Importance together", title_justify="left")
    table.add_column("genes of", overflow="fold")
    table.add_column("importance", no_wrap=True)
    for key, by_name in sums.items():
        for name, share in by_name.items():
            table.add_row(f"{_TITLES[key]} {name}", _bar(share, max(by_name.values())))
        table.add_section()  # slices, models and groups each are all of the genes
    return table


def importance_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers rest on and how to read them, a sentence each."""
    yield (
        f"from {found['candidates']} scored trials; importance by {found['method']}: how "
        f"differently the best {found['best_quarter']} are spread from all; shares sum to 100 %"
    )
    yield (
        "effect: change of the score per standard deviation of the gene, in a linear model that "
        f"explains {max(found['explained_linearly'], 0.0):.0%} of the variance of left-out trials"
    )
    yield "best quarter, all: mean ± standard deviation of the gene, the better ranks weighing more"
    standing = [gene["gene"] for gene in found["genes"] if gene["importance"] > found["chance"]]
    mark = f"{found['chance']:.0%}, which shuffled scores reach"
    yield (
        f"bold: genes above {mark}"
        if standing
        else f"no gene stands out: none is above {mark}; take this table for chance"
    )


def _bar(share: float, largest: float) -> str:
    filled = round(_BAR * share / largest) if largest > 0 else 0
    return f"{share:6.1%} {'█' * filled}"


def _spread(part: Mapping[str, float]) -> str:
    """`0.276 ± 0.099`: two digits of the spread that count, and as many places of the mean."""
    spread = part["spread"]
    places = max(1 - math.floor(math.log10(spread)), 0) if spread > 0 else 3
    return f"{part['mean']:.{places}f} ± {spread:.{places}f}"
