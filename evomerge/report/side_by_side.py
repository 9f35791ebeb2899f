"""What `evomerge eval` shows: tables for the terminal, Markdown, the table of a radar chart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from evomerge.errors import ConfigError
from evomerge.report.radar_table import RadarLine, RadarTable
from evomerge.report.table import score_text, short_names

# Of a column of scores: below it they would be broken.
_LEAST_WIDTH = len("0.000")


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """The document of `eval --json` as a table: a row for each model."""
    table = Table(title=_title(found), title_justify="left")
    for number, heading in enumerate(_headings(found)):
        # A model's name is told whole: hub names differ at their ends. A number is never broken.
        table.add_column(
            heading,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number > 0,
        )
    for row in _rows(found):
        table.add_row(*row)
    return table


def categories_table(found: Mapping[str, Any]) -> Table | None:
    """The mean grade of each category and model; None where there is one category."""
    categories = _categories(found)
    if len(categories) < 2:
        return None
    table = Table(title="By category", title_justify="left")
    table.add_column("category", overflow="fold")
    for name in short_names([row["model"] for row in found["models"]]):
        table.add_column(name, justify="right", overflow="fold", min_width=_LEAST_WIDTH)
    for name in categories:
        means = (score_text(row["categories"].get(name)) for row in found["models"])
        table.add_row(name, *means)
    return table


def evaluation_markdown(found: Mapping[str, Any]) -> str:
    """The same, for a README: the models, then their categories, then what is to be known."""
    scores = _markdown(_headings(found), _rows(found))
    categories = _categories(found)
    by_category = ""
    if len(categories) > 1:
        rows = (
            [row["model"], *(score_text(row["categories"].get(name)) for name in categories)]
            for row in found["models"]
        )
        by_category = f"\n{_markdown(['model', *categories], rows)}"
    notes = "".join(f"\n* {note}" for note in evaluation_notes(found))
    heading = f"Suite: {found['suite']}. {_title(found)}."
    return f"{heading}\n\n{scores}{by_category}{notes}\n"


def evaluation_notes(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers has to know, a sentence each."""
    notes = [
        "In brackets: 95 % bootstrap intervals over the tasks; those of scores end where the "
        "suite's grades do."
    ]
    if len(found["models"]) > 1:
        first = found["models"][0]["model"]
        notes.append(f"Differences are to {first}, paired task by task.")
    for row in found["models"]:
        if row["reason"] is not None:
            notes.append(f"{row['model']} failed: {row['reason']}")
        if row["unscored"]:
            notes.append(
                f"{row['model']}: {row['unscored']} of {row['tasks']} answers could not be graded "
                "and are left out of its means."
            )
        if row.get("judging"):
            notes.append(f"{row['model']}: {_judging(row['judging'])}")
        if row["cut"]:
            notes.append(
                f"{row['model']}: {row['cut']} of {row['tasks']} answers were cut at max_tokens."
            )
        notes += [
            f"{row['model']}: the gate {gate} closed for {count} of {row['tasks']} answers."
            for gate, count in sorted(row["gates"].items())
        ]
    return notes


def _judging(took: Mapping[str, Any]) -> str:
    """What the judge took for a model's grades, and what of it was not paid now."""
    if not took["prompt_tokens"] and took["reused"] == took["grades"]:
        return f"its {took['grades']} grades were there already, and cost nothing."
    cost = "" if took["cost"] is None else f", {took['cost']:.4g} by its prices"
    words = (
        f"the judge took {took['prompt_tokens']} tokens of prompts and "
        f"{took['completion_tokens']} of replies{cost} for {took['grades']} grades"
    )
    if not took["reused"]:
        return f"{words}."
    how_many = "all" if took["reused"] == took["grades"] else str(took["reused"])
    return f"{words}; {how_many} of them were there already, and cost nothing now."


def evaluation_radar(found: Mapping[str, Any]) -> RadarTable:
    """The models and categories for a radar chart. Raises ConfigError for fewer than three."""
    categories = tuple(_categories(found))
    lines = tuple(
        RadarLine(
            model=row["model"],
            scores=tuple(row["categories"].get(name) for name in categories),
            intervals=tuple(_pair(row["category_intervals"].get(name)) for name in categories),
            mean=row["score"],
            mean_interval=_pair(row["interval"]),
        )
        for row in found["models"]
        if row["score"] is not None
    )
    ends = (pair[1] for line in lines for pair in line.intervals if pair is not None)
    table = RadarTable(
        categories, lines, measure=f"mean grade ({_graded_by(found)})", reach=max(ends, default=0.0)
    )
    table.check("--radar")
    return table


def check_radar_categories(categories: Iterable[str]) -> None:
    """Raises ConfigError where tasks of these categories make no radar chart."""
    names = list(dict.fromkeys(categories))
    if len(names) < 3:
        raise ConfigError(
            f"--radar: needs tasks of 3 categories or more; the suite's are {', '.join(names)} "
            "(its key `category` names the column that has them)"
        )


def _title(found: Mapping[str, Any]) -> str:
    """What the scores are, and on how many tasks where all models have as many."""
    counts = {row["tasks"] for row in found["models"]}
    where = "" if _counts_differ(found) else f" on {counts.pop()} tasks"
    return f"Mean grade{where} ({_graded_by(found)})"


def _graded_by(found: Mapping[str, Any]) -> str:
    return str(found["scorer"]) + (f": {found['judge']}" if found["judge"] else "")


def _counts_differ(found: Mapping[str, Any]) -> bool:
    """Whether models have other numbers of tasks than each other, or unscored answers."""
    return len({(row["tasks"] - row["unscored"]) for row in found["models"]}) > 1 or any(
        row["unscored"] for row in found["models"]
    )


def _headings(found: Mapping[str, Any]) -> list[str]:
    against = ["difference"] if len(found["models"]) > 1 else []
    counts = ["tasks", "unscored"] if _counts_differ(found) else []
    return ["model", "score", *against, *counts]


def _rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    alone, counted = len(found["models"]) == 1, _counts_differ(found)
    for row in found["models"]:
        cells = [row["model"], _with_interval(score_text(row["score"]), row["interval"])]
        if not alone:
            cells.append(_difference(row["difference"]))
        yield [*cells, str(row["tasks"]), str(row["unscored"])] if counted else cells


def _difference(against: Mapping[str, Any] | None) -> str:
    if against is None:
        return "–"
    return _with_interval(f"{against['mean']:+.3f}", against["interval"], sign="+")


def _with_interval(number: str, interval: Sequence[float] | None, *, sign: str = "") -> str:
    """`3.400 [3.21, 3.59]`."""
    if interval is None:
        return number
    low, high = (format(end, f"{sign}.2f") for end in interval)
    return f"{number} [{low}, {high}]"


def _categories(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in found["models"] for name in row["categories"]))


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ")
