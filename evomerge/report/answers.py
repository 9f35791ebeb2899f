"""What `evomerge answers` shows: answers to a task beside each other, or a table of all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from evomerge.errors import ConfigError
from evomerge.evaluate.judge_reply import read_verdict
from evomerge.evaluate.ledger_query import LedgerRow
from evomerge.report.table import score_text

# More columns of text than these cannot be read beside each other.
_BESIDE = 3
_NAMES = 20  # the most columns of candidates' names: the answers are what is read
_ANY_GRADE = 10**9
_FORMATS = (".parquet", ".csv")


def answer_panels(rows: Sequence[LedgerRow], titles: Mapping[str, str]) -> Iterator[RenderableType]:
    """For each task what was asked, then what each candidate answered and got for it.

    `titles`: the candidates that a reader knows by another name.
    """
    by_task: dict[str, list[LedgerRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    for task, unordered in by_task.items():
        some = _by_candidate(unordered)
        prompts = dict.fromkeys(row.prompt for row in some)
        for prompt in prompts:
            yield Panel(Text(prompt.strip()), title=Text(f"task {task}"), title_align="left")
        names = [_name(row, titles) for row in some]
        yield _beside(some, names) if len(some) <= _BESIDE else _below(some, names)


def row_to_json(row: LedgerRow) -> dict[str, Any]:
    """A row as plain values; `trial` is the number where the candidate is one."""
    return {"trial": _trial(row), **dataclasses.asdict(row)}


def check_export(path: Path) -> None:
    """Raises ConfigError unless the file's ending says what it is to be."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: a table ends in {' or '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.absolute().parent} is not there")


def export_answers(rows: Sequence[LedgerRow], path: Path) -> None:
    """Writes the rows as a table of pandas, Parquet or CSV by the file's ending.

    What is no single value is JSON: `earlier`, `gates`, `parts` and `settings`. Raises ConfigError
    where the file cannot be written.
    """
    import pandas

    frame = pandas.DataFrame([_flat(row) for row in rows], columns=list(_COLUMN_TYPES))
    frame = frame.astype(_COLUMN_TYPES)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix.lower() == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            frame.to_csv(partial, index=False)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


_COLUMN_TYPES = {
    "candidate": "string",
    "trial": "Int64",
    "task": "string",
    "attempt": "int64",
    "prompt": "string",
    "answer": "string",
    "earlier": "string",
    "finish_reason": "string",
    "gates": "string",
    "scorer": "string",
    "grade": "Float64",
    "reason": "string",
    "parts": "string",
    "prompt_tokens": "Int64",
    "completion_tokens": "Int64",
    "cost": "Float64",
    "seconds": "float64",
    "settings": "string",
    "version": "string",
    "recipe_digest": "string",
    "suite_digest": "string",
}


def _flat(row: LedgerRow) -> dict[str, Any]:
    found = row_to_json(row)
    for key in ("earlier", "gates", "parts", "settings"):
        found[key] = json.dumps(found[key], ensure_ascii=False)
    for key in ("prompt_tokens", "completion_tokens", "cost"):
        paid = [value for part in row.parts if (value := getattr(part, key)) is not None]
        found[key] = sum(paid) if paid else None
    return found


def _trial(row: LedgerRow) -> int | None:
    word, _, number = row.candidate.partition(" ")
    return int(number) if word == "trial" else None


def _by_candidate(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Each candidate's attempts together and in order, the candidates as they first come."""
    first = {row.candidate: place for place, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: (first[row.candidate], row.attempt))


def _beside(rows: Sequence[LedgerRow], names: Sequence[str]) -> Table:
    table = Table(show_lines=True, expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(_answer(row) for row in rows))
    table.add_row(*(_grade(row) for row in rows))
    return table


def _below(rows: Sequence[LedgerRow], names: Sequence[str]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("candidate", overflow="fold", min_width=len("candidate"), max_width=_NAMES)
    table.add_column("answer", overflow="fold", ratio=4)
    has_words = any(part.reply for row in rows for part in row.parts)
    table.add_column("grade", overflow="fold", ratio=3 if has_words else None)
    for row, name in zip(rows, names, strict=True):
        table.add_row(Text(name), _answer(row), _grade(row))
    return table


def _name(row: LedgerRow, titles: Mapping[str, str]) -> str:
    name = titles.get(row.candidate, row.candidate)
    return f"{name}, attempt {row.attempt}" if row.attempt else name


def _answer(row: LedgerRow) -> Text:
    turns = [*row.earlier, row.answer]
    text = Text("\n\n".join(turn.strip() for turn in turns))
    if row.finish_reason == "length":
        text.append(" [cut]", style="dim")
    return text


def _grade(row: LedgerRow) -> Text:
    """The grade, what it is made of, what is wrong on its face, and the judge's words."""
    lines = [score_text(row.grade) if row.grade is not None else "unscored"]
    if row.reason is not None:
        lines = [f"no grade that counts: {row.reason}"]
    if len(row.parts) > 1 or row.reason is not None:
        several = ", ".join(f"{part.scorer} {score_text(part.grade)}" for part in row.parts)
        lines.append(several)
    if row.gates:
        lines.append(f"gates: {', '.join(row.gates)}")
    text = Text("\n".join(lines), style="bold")
    for part in row.parts:
        if part.reply:
            text.append(f"\n{_words(part.reply)}", style="not bold dim")
    return text


def _words(reply: str) -> str:
    """The reason in a judge's reply; all of it where it is in no form that is known."""
    verdict = read_verdict(reply, -_ANY_GRADE, _ANY_GRADE)
    return (verdict and verdict.reason.strip()) or reply.strip()
