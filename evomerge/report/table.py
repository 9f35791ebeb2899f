"""The table at the end of a search: every baseline and the winner, on both sets of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

HELD_OUT = "held out"


@dataclass(frozen=True)
class Row:
    """One model's scores; None where it was not scored (no held-out tasks, a failed model)."""

    model: str
    search: float | None
    holdout: float | None


def outcome_rows(status: Mapping[str, Any]) -> list[Row]:
    """The rows base, each model, uniform merges, evolved of a finished study's `status --json`."""
    search = status["outcome"]["search"]
    holdout = status["outcome"]["holdout"] or {}
    held_out_models = holdout.get("models", {})
    return [
        Row("base", search["base"], holdout.get("base")),
        *(Row(name, score, held_out_models.get(name)) for name, score in search["models"].items()),
        Row(candidate_words("uniform"), search["uniform"], holdout.get("uniform")),
        *_best_uniform(search, holdout),
        Row("evolved merge", search["evolved"], holdout.get("evolved")),
    ]


def _best_uniform(search: Mapping[str, Any], holdout: Mapping[str, Any]) -> list[Row]:
    """The best uniform merge of a sweep of scales, unless it is the plain one."""
    best = search.get("uniform_best")
    if best is None or best["score"] == search["uniform"]:
        return []
    name = candidate_words(f"uniform {best['scale']:g}")
    return [Row(name, best["score"], holdout.get("uniform_best", {}).get("score"))]


def candidate_words(label: str) -> str:
    """A uniform merge as tables call it; any other name as it is."""
    kind, _, scale = label.partition(" ")
    if kind != "uniform":
        return label
    return f"uniform merge, all {scale}" if scale else "uniform merge"


def task_counts(status: Mapping[str, Any]) -> tuple[int, int]:
    """How many tasks a finished study searched on, and how many it held out."""
    return status["tasks"]["search"], status["tasks"]["holdout"]


def held_out_words(status: Mapping[str, Any]) -> str:
    """What the held-out tasks are called: by their suite, where it is another one."""
    suite = status["tasks"]["holdout_suite"]
    return HELD_OUT if suite is None else f"{HELD_OUT}: {suite}"


def outcome_table(rows: Sequence[Row], tasks: tuple[int, int], held_out: str = HELD_OUT) -> Table:
    """The rows for a terminal; `tasks` are the numbers of search and of held-out tasks.

    `held_out` is what the latter are called.
    """
    table = Table(title="Mean grade", title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in _headings(tasks, held_out):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        style = "bold" if row is rows[-1] else None
        table.add_row(row.model, *_cells(row, tasks), style=style)
    return table


def outcome_markdown(rows: Sequence[Row], tasks: tuple[int, int], held_out: str = HELD_OUT) -> str:
    """The same table in Markdown."""
    headings = _headings(tasks, held_out)
    lines = [
        f"| model | {' | '.join(headings)} |",
        f"|---|{'---:|' * len(headings)}",
        *(f"| {row.model} | {' | '.join(_cells(row, tasks))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _headings(tasks: tuple[int, int], held_out: str) -> list[str]:
    search, holdout = tasks
    headings = [f"search ({search} tasks)", f"{held_out} ({holdout} tasks)"]
    return headings if holdout else headings[:1]


def _cells(row: Row, tasks: tuple[int, int]) -> list[str]:
    scores = [row.search, row.holdout] if tasks[1] else [row.search]
    return [score_text(score) for score in scores]


def score_text(score: float | None) -> str:
    """A score for readers; a dash where there is none."""
    return "–" if score is None else f"{score:.3f}"


def short_names(names: Sequence[str]) -> list[str]:
    """Each name's last parts between slashes, as few as tell all of them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts), default=0)):
        short = ["/".join(some[-count:]) for some in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)
