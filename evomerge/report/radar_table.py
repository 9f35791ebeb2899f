"""The table behind a radar chart: a score for each model and category, with error bars or not."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import ConfigError

Interval = tuple[float, float]

# Names of columns, in any case; "Math se" and "math_se" are the errors of the category Math.
_MODEL = ("model", "name")
_CATEGORY = ("category",)
_SCORE = ("score", "mean", "grade")
_MEANS = ("avg_score", "average", "avg", "mean", "overall", "score", "total")
_ERROR, _LOW, _HIGH = "se", "low", "high"
# Half of a 95 % interval, in standard errors.
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class RadarLine:
    """One model's scores in the order of the table's categories; None where there is none.

    `intervals` are (low, high) in the scores' unit. `mean` is the table's own, else that of the
    categories there are.
    """

    model: str
    scores: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...]
    mean: float
    mean_interval: Interval | None = None


@dataclass(frozen=True)
class RadarTable:
    """What a radar chart shows: at least three categories, at least one model.

    `measure` says what the scores are, where that is known; `reach` is held by the rim, too.
    """

    categories: tuple[str, ...]
    lines: tuple[RadarLine, ...]
    measure: str = ""
    reach: float = 0.0

    def check(self, where: str) -> None:
        """Raises ConfigError, beginning with `where`, where no chart can be drawn of it."""
        if len(self.categories) < 3:
            found = ", ".join(self.categories) or "none"
            raise ConfigError(f"{where}: a radar chart needs 3 categories or more; found: {found}")
        if not self.lines:
            raise ConfigError(f"{where}: there is no model")


def read_radar_table(path: Path) -> RadarTable:
    """The table in a CSV file: a line for each model, or for each model and category.

    A line for each model has a column for each category, and may have `avg_score` and, for errors,
    columns such as `Math se`, or `Math low` and `Math high` (as `avg_score se` for the mean). A
    line for each model and category has the columns model, category and score, and may have se, or
    low and high. Low and high are the ends of a 95 % interval, for which a standard error stands
    with 1.96 of it either side. Columns of other texts are left out. Raises ConfigError that names
    file, line and column.
    """
    header, rows = _read(path)
    model = _column(header, _MODEL)
    if model is None:
        raise ConfigError(f"{path}: no column model; the columns are {', '.join(header)}")
    category, score = _column(header, _CATEGORY), _column(header, _SCORE)
    if category is not None and score is not None:
        table = _of_long(path, header, rows, (model, category, score))
    else:
        table = _of_wide(path, header, rows, model)
    table.check(str(path))
    return table


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and each line's number and cells without outer white space."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error
    repeated = [name for name in header if name and header.count(name) > 1]
    if repeated:
        raise ConfigError(f"{path}: the column {repeated[0]!r} is there twice")
    for number, row in lines:
        if len(row) != len(header):
            raise ConfigError(f"{path}:{number}: {len(row)} cells, but {len(header)} columns")
    return header, [
        (number, {name: cell.strip() for name, cell in zip(header, row, strict=True) if name})
        for number, row in lines
    ]


def _of_wide(
    path: Path, header: Sequence[str], rows: Sequence[tuple[int, dict[str, str]]], model: str
) -> RadarTable:
    numeric = [
        name
        for name in header
        if name and name != model and any(_is_number(row[name]) for _, row in rows)
    ]
    mean = _column(numeric, _MEANS)
    errors = {name for name in numeric if _split_error(name, numeric) is not None}
    categories = tuple(name for name in numeric if name not in errors and name != mean)
    lines = []
    for number, row in rows:
        where = f"{path}:{number}"
        values = {name: _number(row[name], name, where) for name in numeric}
        scores = tuple(values[name] for name in categories)
        intervals = tuple(_interval(values, f"{name} ", values[name], where) for name in categories)
        own = None if mean is None else values[mean]
        mean_interval = None if mean is None else _interval(values, f"{mean} ", own, where)
        lines.append(
            RadarLine(
                _name(row[model], where),
                scores,
                intervals,
                _mean(scores, row[model], where) if own is None else own,
                mean_interval,
            )
        )
    return RadarTable(categories, tuple(lines))


def _of_long(
    path: Path,
    header: Sequence[str],
    rows: Sequence[tuple[int, dict[str, str]]],
    columns: tuple[str, str, str],
) -> RadarTable:
    model, category, score = columns
    errors = [name for name in header if name.lower() in {_ERROR, _LOW, _HIGH}]
    categories = tuple(dict.fromkeys(row[category] for _, row in rows))
    found: dict[str, dict[str, tuple[float | None, Interval | None]]] = {}
    for number, row in rows:
        where = f"{path}:{number}"
        cells = found.setdefault(_name(row[model], where), {})
        if row[category] in cells:
            raise ConfigError(f"{where}: {row[model]} has {row[category]} a second time")
        value = _number(row[score], score, where)
        values = {name: _number(row[name], name, where) for name in errors}
        cells[row[category]] = value, _interval(values, "", value, where)
    lines = []
    for name, cells in found.items():
        pairs = [cells.get(one, (None, None)) for one in categories]
        scores, intervals = (tuple(part) for part in zip(*pairs, strict=True))
        lines.append(RadarLine(name, scores, intervals, _mean(scores, name, str(path))))
    return RadarTable(categories, tuple(lines))


def _name(model: str, where: str) -> str:
    if not model:
        raise ConfigError(f"{where}: the model has no name")
    return model


def _mean(scores: Sequence[float | None], model: str, where: str) -> float:
    known = [score for score in scores if score is not None]
    if not known:
        raise ConfigError(f"{where}: {model} has no score")
    return math.fsum(known) / len(known)


def _interval(
    values: Mapping[str, float | None], before: str, score: float | None, where: str
) -> Interval | None:
    """The interval around `score` in the columns `before`+se, or +low and +high; None without."""
    by_name = {_folded(name): value for name, value in values.items()}
    error, low, high = (by_name.get(_folded(before + end)) for end in (_ERROR, _LOW, _HIGH))
    if score is None:
        return None
    if low is not None and high is not None:
        if not low <= score <= high:
            raise ConfigError(f"{where}: {before}low {low}, high {high}: {score} is not between")
        return low, high
    if error is None:
        return None
    if error < 0:
        raise ConfigError(f"{where}: {before}se is {error}; an error is 0 or more")
    return score - _NORMAL_95 * error, score + _NORMAL_95 * error


def _split_error(name: str, columns: Sequence[str]) -> str | None:
    """The column whose error `name` is; None where it is a column of its own."""
    folded = _folded(name)
    for end in (_ERROR, _LOW, _HIGH):
        before = folded.removesuffix(f" {end}")
        if before != folded:
            return next((one for one in columns if _folded(one) == before), None)
    return None


def _folded(name: str) -> str:
    return name.lower().replace("_", " ").strip()


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of `names` that there is, in any case."""
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, column: str, where: str) -> float | None:
    if not text:
        return None
    if not _is_number(text):
        raise ConfigError(f"{where}: {column} is {text[:40]!r}; a number or nothing is needed")
    return float(text)
