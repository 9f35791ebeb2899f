"""The tasks of a suite, out of its tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from evomerge.errors import ConfigError, nearest
from evomerge.evaluate.hub import dataset_file, dataset_split, name_in_dataset
from evomerge.evaluate.prompts import render_template
from evomerge.evaluate.suite_config import DataSource, JoinConfig, SuiteConfig
from evomerge.evaluate.tables import Row, cell, read_rows, text_in
from evomerge.evaluate.task import Task

_ID_COLUMNS = ("id", "task_id", "question_id")
_NAMED_AT_MOST = 5


def find_tables(
    config: SuiteConfig, folder: Path, data: Path | None, where: str, key: str = "suite"
) -> list[Path]:
    """The local files of the suite's tasks: `data` where that is given, else those of its `data:`.

    Relative names start at `folder`; what a hub has is fetched. Raises ConfigError that says where
    to get what is not there, and how to name a local copy of it: in a study by `key`.
    """
    if data is not None:
        return [data]
    source = config.data
    if isinstance(source, str):
        return [folder / Path(source).expanduser()]
    if source is None:
        raise ConfigError(
            f"{where}: it has no tasks of its own; {_how_to_name('FILE', where, key)}"
        )
    tables = _brought(source, where, key)
    if config.join is not None and source.hub is not None:
        _bring_joined(config.join, source, tables[0], where)
    return tables


class Objector(Protocol):
    """A scorer, as far as reading tasks needs it."""

    def objection(self, task: Task) -> str | None:
        """Why `task` cannot be graded; None where it can."""


def read_tasks(
    config: SuiteConfig, tables: Sequence[Path], scorers: Mapping[str, Objector]
) -> tuple[Task, ...]:
    """The tasks in `tables`, in their order; ConfigError names file and line."""
    found = [row for path in tables for row in read_rows(path)]
    if len(tables) > 1:
        # A row's number is its id where it has no other.
        found = [replace(row, number=number) for number, row in enumerate(found, start=1)]
    if not found:
        names = ", ".join(map(str, tables))
        raise ConfigError(f"{names}: holds no task; one row (or JSON object per line) is needed")
    rows = _kept(config, found)
    if config.join is not None:
        rows = _joined(config.join, rows, tables[0])
    id_column = config.id or next((name for name in _ID_COLUMNS if name in rows[0].cells), None)
    tasks = [_task(config, id_column, row) for row in rows]
    _refuse_repeated_ids(tasks, rows)
    _refuse_empty(config, tasks, rows)
    _check_categories(config, tasks, tables[0])
    for task, row in zip(tasks, rows, strict=True):
        _check_scorable(config, scorers, task, row)
    return tuple(tasks)


def _brought(source: DataSource, where: str, key: str) -> list[Path]:
    name = source.file[0] if source.file else "FILE"
    if source.hub is None:
        raise ConfigError(
            f"{where}: its tasks do not ship; get {', '.join(source.file)} from {source.source}, "
            f"then {_how_to_name(name, where, key)}"
        )
    try:
        if source.split is not None:
            return dataset_split(source.hub, source.revision, source.config, source.split)
        return [dataset_file(source.hub, source.revision, file) for file in source.file]
    except ConfigError as error:
        raise ConfigError(
            f"{where}: {error}; with a copy of it, {_how_to_name(name, where, key)}"
        ) from error


def _bring_joined(join: JoinConfig, source: DataSource, table: Path, where: str) -> None:
    """Fetches the second table, where the dataset of the hub that `table` is of has it."""
    assert source.hub is not None
    absent: list[ConfigError] = []
    for place in _places(join, table):
        name = name_in_dataset(table, place)
        if not place.is_file() and name is not None:
            try:
                dataset_file(source.hub, source.revision, name)
            except ConfigError as error:
                absent.append(error)
        if place.is_file():
            return
    if absent:
        raise ConfigError(f"{where}: join: {absent[0]}") from absent[0]


def _how_to_name(file: str, where: str, key: str) -> str:
    if where == "suite":  # it stands in the study itself
        return f"name it there by `data: {file}`"
    in_study = f"`{key}: {{like: {where}, data: {file}}}`"
    if key != "suite":
        return f"name it by {in_study}"
    return f"name it by `--data {file}`, or in a study by {in_study}"


def _kept(config: SuiteConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows that `only:` keeps; ConfigError where none is left."""
    kept = list(rows)
    for column, some in config.only.items():
        wanted = some if isinstance(some, tuple) else (some,)
        found = [cell(row, column, "only") for row in rows]
        for value in wanted:
            if not any(_is(one, value) for one in found):
                known = dict.fromkeys(_written(one) for one in found)
                raise ConfigError(
                    f"{rows[0].where}: only: {column}: no row has {_written(value)!r}"
                    f"{nearest(_written(value), known)}"
                )
        kept = [
            row for row in kept if any(_is(cell(row, column, "only"), value) for value in wanted)
        ]
    if not kept:
        raise ConfigError(
            f"{rows[0].where}: only: {dict(config.only)} keeps none of {len(rows)} rows"
        )
    return kept


def _is(found: object, wanted: str | float) -> bool:
    """Whether a cell has a value that `only:` names: 3 is 3.0 and "3", true is "True"."""
    numbers = [
        one for one in (found, wanted) if isinstance(one, int | float) and not isinstance(one, bool)
    ]
    if len(numbers) == 2:
        return numbers[0] == numbers[1]
    if isinstance(wanted, bool):
        return _written(found).lower() == _written(wanted)
    return _written(found) == _written(wanted)


def _written(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _joined(join: JoinConfig, rows: Sequence[Row], beside: Path) -> list[Row]:
    """Each row with the columns of the other table's row of the same `key`."""
    places = _places(join, beside)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{beside}: join: neither {' nor '.join(map(str, places))} is there; put it beside "
            "the tasks, or name it in the suite's join.file"
            if len(places) > 1
            else f"{beside}: join: {places[0]} is not there"
        )
    others: dict[str, Row] = {}
    for row in read_rows(path):
        value = text_in(row, join.key, "join.key")
        if value in others:
            raise ConfigError(
                f"{row.where}: {join.key} {value!r} stands in {_short(others[value].where)} too; "
                "a task is joined with one row"
            )
        others[value] = row
    return [_with_other(join, row, others, path) for row in rows]


def _places(join: JoinConfig, beside: Path) -> list[Path]:
    return [beside.parent / Path(name).expanduser() for name in join.file]


def _with_other(join: JoinConfig, row: Row, others: Mapping[str, Row], path: Path) -> Row:
    value = text_in(row, join.key, "join.key")
    if value not in others:
        raise ConfigError(f"{row.where}: {path} has no row with {join.key} {value!r}")
    return Row(row.where, row.number, {**others[value].cells, **row.cells})


def _task(config: SuiteConfig, id_column: str | None, row: Row) -> Task:
    known = {
        "id": str(row.number) if id_column is None else text_in(row, id_column, "suite key id"),
        "input": text_in(row, config.input, "suite key input"),
        "category": "all"
        if config.category is None
        else text_in(row, config.category, "suite key category"),
    }
    further = {
        name: _text_or_nothing(row, column, f"suite key fields.{name}")
        for name, column in config.fields.items()
    }
    has_reference = config.reference is not None and (
        config.reference_for is None or known["category"] in config.reference_for
    )
    later = config.turn_references if has_reference else ()
    choices = _choices(config, row)
    reference = ""
    if config.reference is not None and has_reference:
        reference = text_in(row, config.reference, "suite key reference")
    return Task(
        id=known["id"],
        input=known["input"],
        reference=_choice(choices, reference, row) if config.choice_index else reference,
        category=known["category"],
        user=render_template(config.prompt, {**further, **known}, row.where),
        fields=further,
        turns=tuple(text_in(row, column, "suite key turns") for column in config.turns),
        turn_references=tuple(text_in(row, column, "suite key turn_references") for column in later)
        or ("",) * len(config.turns),
        choices=choices,
    )


def _text_or_nothing(row: Row, column: str, key: str) -> str:
    return "" if cell(row, column, key) is None else text_in(row, column, key)


def _choices(config: SuiteConfig, row: Row) -> tuple[str, ...]:
    """The answers to choose from: of one column with a list, or of a column each."""
    if len(config.choices) != 1:
        return tuple(text_in(row, column, "suite key choices") for column in config.choices)
    column = config.choices[0]
    values: Any = cell(row, column, "suite key choices")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(
            f"{row.where}: {column!r} (suite key choices) is no list of texts; "
            "name a column for each choice, or one with a list"
        )
    return tuple(values)


def _choice(choices: Sequence[str], place: str, row: Row) -> str:
    """The choice at `place`, from 0."""
    if not place.isdecimal() or int(place) >= len(choices):
        raise ConfigError(
            f"{row.where}: choice_index: the reference {place!r} is no place from 0 to "
            f"{len(choices) - 1}"
        )
    return choices[int(place)]


def _refuse_repeated_ids(tasks: Sequence[Task], rows: Sequence[Row]) -> None:
    first: dict[str, Row] = {}
    for task, row in zip(tasks, rows, strict=True):
        if task.id in first:
            raise ConfigError(
                f"{row.where}: id {task.id!r} stands in {_short(first[task.id].where)} too"
            )
        first[task.id] = row


def _refuse_empty(config: SuiteConfig, tasks: Sequence[Task], rows: Sequence[Row]) -> None:
    """Raises ConfigError that names every task without words, or without a right answer."""
    no_id = [not task.id.strip() for task in tasks]
    no_input = [not task.input.strip() for task in tasks]
    no_turn = [not all(turn.strip() for turn in task.turns) for task in tasks]
    no_reference = [_has_reference(config, task) and not task.reference.strip() for task in tasks]
    for column, hint, empty in (
        ("the id (suite key id)", "", no_id),
        (f"{config.input!r} (suite key input)", "", no_input),
        (f"one of {', '.join(config.turns)} (suite key turns)", "", no_turn),
        (
            f"{config.reference!r} (suite key reference)",
            "; `reference: null` says that there are none",
            no_reference,
        ),
    ):
        places = [row.where for row, is_empty in zip(rows, empty, strict=True) if is_empty]
        if places:
            more = f" and {len(places) - _NAMED_AT_MOST} more" * (len(places) > _NAMED_AT_MOST)
            raise ConfigError(
                f"{', '.join([places[0], *map(_short, places[1:_NAMED_AT_MOST])])}{more}: "
                f"{column} is empty{hint}"
            )


def _has_reference(config: SuiteConfig, task: Task) -> bool:
    wanted = config.reference_for
    return config.reference is not None and (wanted is None or task.category in wanted)


def _check_scorable(
    config: SuiteConfig, scorers: Mapping[str, Objector], task: Task, row: Row
) -> None:
    for name, scorer in scorers.items():
        if objection := scorer.objection(task):
            why = (
                "" if _has_reference(config, task) else " (as `reference` or `reference_for` says)"
            )
            raise ConfigError(f"{row.where}: scorer {name}: {objection}{why}")


def _check_categories(config: SuiteConfig, tasks: Iterable[Task], path: Path) -> None:
    """Raises ConfigError where the suite speaks of a category that no task has."""
    known = sorted({task.category for task in tasks})
    for key, names in (
        ("by_category", config.by_category),
        ("reference_for", config.reference_for or ()),
    ):
        unknown = [name for name in names if name not in known]
        # `only:` may have left out the rest, on purpose.
        if unknown and not config.only:
            raise ConfigError(
                f"{path}: {key}: no task is of category {unknown[0]!r}; there are "
                f"{', '.join(known)} (`{key}: null` leaves out what a suite has of another)"
            )


def _short(where: str) -> str:
    """`line 3` of `tasks.jsonl:3`, `sheet row 3` of `tasks.xlsx, sheet row 3`."""
    _, comma, rest = where.rpartition(", ")
    return rest if comma else f"line {where.rpartition(':')[2]}"
