"""What `evomerge compare` shows of two studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from evomerge.report.status import which
from evomerge.report.table import score_text

# As many of the tasks that differ most as a screen has room for beside the rest.
_TASKS_SHOWN = 10

_REASONS = {
    "only_first": "answered by {first} alone",
    "only_second": "answered by {second} alone",
    "other_prompt": "with another prompt",
    "unscored": "unscored",
}


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Means and paired difference on all shared tasks, held-out ones, each category."""
    first, second = (side["study"] for side in found["studies"])
    table = Table(title="Mean grade on shared tasks", title_justify="left")
    table.add_column("tasks")
    for heading in ("number", first, second, "difference", "95 % interval"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, row in _rows(found):
        table.add_row(name, *_cells(row))
    return table


def tasks_table(found: Mapping[str, Any]) -> Table | None:
    """The tasks that differ most; None where none does."""
    first, second = (side["study"] for side in found["studies"])
    differing = [task for task in found["tasks"] if task["difference"]]
    if not differing:
        return None
    table = Table(title="Tasks that differ most", title_justify="left")
    for heading in ("task", "category"):
        table.add_column(heading, overflow="fold")
    for heading in (first, second, "difference"):
        table.add_column(heading, justify="right", overflow="fold")
    for task in differing[:_TASKS_SHOWN]:
        scores = (score_text(task["first"]), score_text(task["second"]))
        table.add_row(task["task"], task["category"] or "–", *scores, _signed(task["difference"]))
    return table


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Who the winners are, what the comparison says, and what it leaves out, a sentence each."""
    return [*map(_winner, found["studies"]), _verdict(found), *_caveats(found)]


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if found["holdout"] and found["searched"]:
        yield "held out in both", found["holdout"]
        yield "searched on", found["searched"]
    if found["all"]:
        yield "all", found["all"]
    for name, row in found["categories"].items():
        yield f"  {name}", row


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = row["interval"]
    return [
        str(row["tasks"]),
        score_text(row["first"]),
        score_text(row["second"]),
        _signed(row["difference"]),
        f"[{_signed(interval[0])}, {_signed(interval[1])}]" if interval else "–",
    ]


def _winner(side: Mapping[str, Any]) -> str:
    winner = side["winner"]
    leads = "the winner is" if side["state"] == "finished" else "the best so far is"
    return f"{side['study']}: {leads} {which(winner['source'], winner['number'])}"


def _verdict(found: Mapping[str, Any]) -> str:
    """What the interval says, of the held-out tasks where there are some."""
    where = "holdout" if found["holdout"] else "all"
    row = found[where]
    tasks = f"{row['tasks']} tasks" + (" that both held out" if where == "holdout" else "")
    interval = row["interval"]
    first, second = (side["study"] for side in found["studies"])
    if interval and (interval[0] > 0 or interval[1] < 0):
        better, worse = (second, first) if interval[0] > 0 else (first, second)
        return f"{better} is better than {worse} on the {tasks}: the interval excludes 0"
    return f"no difference that the {tasks} could tell from chance: the interval includes 0"


def _caveats(found: Mapping[str, Any]) -> Iterator[str]:
    names = dict(
        zip(("first", "second"), (side["study"] for side in found["studies"]), strict=True)
    )
    left = [
        f"{count} {_REASONS[reason].format(**names)}"
        for reason, count in found["left_out"].items()
        if count
    ]
    if left:
        yield f"left out: {', '.join(left)}"
    yield from (f"differs: {line}" for line in found["differs"])
    if not found["holdout"]:
        yield "no task was held out by both: the searches saw these tasks, which flatters both"
    yield from (f"note: {note}" for note in found["notes"])


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0: no -0.000
