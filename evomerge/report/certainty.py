"""How sure the result of a search is, in sentences and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.report.table import candidate_words


def certainty_lines(outcome: Mapping[str, Any]) -> list[str]:
    """What a terminal shows below the table: the verdict, and the winner's fresh score.

    Nothing of a study whose version did not measure anything afresh.
    """
    lines = [outcome["verdict"]] if outcome.get("verdict") else []
    fresh = outcome.get("fresh")
    if fresh is not None:
        lines.append(_fresh(fresh))
    return lines


def certainty_markdown(outcome: Mapping[str, Any]) -> str:
    """The report's section on it; "" where nothing is known."""
    if not outcome.get("verdict"):
        return ""
    parts = ["## How sure that is\n", f"**{outcome['verdict']}**\n"]
    if outcome["differences"]:
        parts += [_differences(outcome["differences"], outcome["part"])]
    if outcome["fresh"] is not None:
        parts += [_fresh(outcome["fresh"]) + "\n"]
    if outcome["optimism"] is not None:
        parts += [_optimism(outcome["optimism"]) + "\n"]
    return "\n".join(parts)


def _differences(differences: Sequence[Mapping[str, Any]], part: str) -> str:
    where = "held-out" if part == "holdout" else "search"
    rows = [
        f"| {candidate_words(one['model'])} | {one['difference']:+.3f} | {_bound(one['low'])} to "
        f"{_bound(one['high'])} | {one['tasks']} |"
        for one in differences
    ]
    note = (
        "Each task counts by the difference of its two grades; the interval is a bootstrap over "
        "tasks: where the lead would lie on other tasks of this kind.\n"
    )
    heading = (
        f"| the winner less | on {where} tasks | 95 % interval | tasks |\n|---|---:|---:|---:|"
    )
    return "\n".join([heading, *rows, "", note])


def _fresh(fresh: Mapping[str, Any]) -> str:
    words = (
        f"Measured afresh on the search tasks, {fresh['attempts']} times with sampling, the winner "
        f"scores {fresh['score']:.3f}"
    )
    if fresh["low"] is None:
        return words + "."
    return (
        f"{words} (95 % interval of this score on these tasks under repetition: "
        f"{fresh['low']:.3f} to {fresh['high']:.3f})."
    )


def _optimism(found: Mapping[str, Any]) -> str:
    return (
        f"The best value that the search saw was {found['observed']:.3f} ({found['candidate']}); "
        f"measured afresh that candidate scores {found['fresh']:.3f}. The difference, "
        f"{found['difference']:+.3f}, is the luck of the best of many, and what sampling changes: "
        "the search's answers are greedy."
    )


def _bound(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
