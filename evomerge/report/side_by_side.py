"""What `evomerge eval` shows: tables for the terminal, Markdown, the table of a radar chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from evomerge.errors import ConfigError
from evomerge.report.radar_table import RadarLine, RadarTable
from evomerge.report.table import score_text


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """The document of `eval --json` as a table: a row for each model."""
    table = Table(title=f"Mean grade ({_graded_by(found)})", title_justify="left")
    for number, heading in enumerate(_headings(found)):
        # A model's name is told whole: hub names differ at their ends.
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(heading, justify=justify, overflow="ellipsis" if number else "fold")
    for row in _rows(found):
        table.add_row(*row)
    return table


def categories_table(found: Mapping[str, Any]) -> Table | None:
    """The mean grade of each category and model; None where there is one category."""
    categories = _categories(found)
    if len(categories) < 2:
        return None
    table = Table(title="By category", title_justify="left")
    table.add_column("category")
    for row in found["models"]:
        table.add_column(row["model"], justify="right")
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
    return f"Suite: {found['suite']} ({_graded_by(found)})\n\n{scores}{by_category}" + (
        f"{notes}\n" if notes else ""
    )


def evaluation_notes(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers has to know, a sentence each."""
    notes = [
        "In brackets: 95 % bootstrap intervals over the tasks; those of scores end where the "
        "suite's grades do."
    ]
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
            notes.append(f"{row['model']}: {row['cut']} answers were cut at max_tokens.")
        notes += [
            f"{row['model']}: {count} answers did not pass the gate {gate}."
            for gate, count in sorted(row["gates"].items())
        ]
    return notes


def _judging(took: Mapping[str, Any]) -> str:
    """What the judge took for a model's grades, and what of it was not paid now."""
    cost = "" if took["cost"] is None else f", {took['cost']:.4g} by its prices"
    words = (
        f"the judge took {took['prompt_tokens']} + {took['completion_tokens']} tokens{cost} for "
        f"{took['grades']} grades"
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
    table = RadarTable(categories, lines)
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


def _graded_by(found: Mapping[str, Any]) -> str:
    return str(found["scorer"]) + (f": {found['judge']}" if found["judge"] else "")


def _headings(found: Mapping[str, Any]) -> list[str]:
    first = found["models"][0]["model"]
    against = [f"less {first}, paired"] if len(found["models"]) > 1 else []
    return ["model", "score", *against, "tasks", "unscored"]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    return [_row(row, alone=len(found["models"]) == 1) for row in found["models"]]


def _row(row: Mapping[str, Any], *, alone: bool) -> list[str]:
    cells = [row["model"], _with_interval(score_text(row["score"]), row["interval"])]
    if not alone:
        against = row["difference"]
        cells.append(
            "–"
            if against is None
            else _with_interval(f"{against['mean']:+.3f}", against["interval"], sign="+")
        )
    return [*cells, str(row["tasks"]), str(row["unscored"])]


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
