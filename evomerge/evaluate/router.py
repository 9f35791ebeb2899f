"""The prompt router: each task gets the prompt and the settings of the example nearest to it."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.base import GenerationSettings
from evomerge.errors import ConfigError, nearest
from evomerge.evaluate.prompts import render_template
from evomerge.evaluate.text_table import TextRow, read_table

# Texts -> one row each, of length 1 (or 0), so that a product of two is their cosine.
Embedding = Callable[[Sequence[str]], NDArray[np.float32]]

# On ELYZA's tasks and their rewritten versions the median of the nearest example is 0.22.
TFIDF_THRESHOLD = 0.10

_INPUT = ("input", "example_input")
_OUTPUT = ("output", "example_output")
_PROMPT = ("prompt", "prompt_template")
_ID = ("id", "task_id")
_SETTINGS = ("settings", "gen_overrides")
_SHOTS = ("examples", "few_shot_k")
_OTHERS = ("category", "prompt_id", "regex", "priority", "system")


@dataclass(frozen=True)
class RoutedSettings:
    """What a row of the table changes of how an answer is generated; None: nothing."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What it changes, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, settings: GenerationSettings) -> GenerationSettings:
        """`settings` with what is said here in place of theirs."""
        return replace(settings, **self.said)


_SETTING_NAMES = tuple(one.name for one in fields(RoutedSettings))
_KNOWN = (*_INPUT, *_OUTPUT, *_PROMPT, *_ID, *_SETTINGS, *_SHOTS, *_OTHERS, *_SETTING_NAMES)


@dataclass(frozen=True)
class RouterRow:
    """A row of the table: an example task, or a rule, with the prompt of what is like it.

    `prompt` is a Jinja template (None: the default prompt); `shots` the number of examples that it
    is given as `examples`; `priority` orders rules, and decides between examples equally near.
    """

    where: str
    input: str = ""
    output: str = ""
    id: str = ""
    category: str = ""
    prompt_id: str = ""
    prompt: str | None = None
    system: str | None = None
    regex: re.Pattern[str] | None = None
    priority: float = 0.0
    shots: int = 0
    settings: RoutedSettings = RoutedSettings()

    @property
    def is_example(self) -> bool:
        """Whether tasks are compared with it: a rule's own example is none."""
        return bool(self.input) and self.regex is None


@dataclass(frozen=True)
class Route:
    """Where a task goes: `row`, by a rule, as the nearest example, or to the default.

    `similarity` is the cosine of the nearest example (None where there was none to compare with),
    `runner_up` the next one of another prompt or category, by its row, with its cosine.
    """

    row: RouterRow
    how: Literal["regex", "example", "default"]
    similarity: float | None = None
    runner_up: RouterRow | None = None
    runner_up_similarity: float | None = None
    shots: tuple[RouterRow, ...] = ()

    def render(self, task_input: str, task_id: str) -> str:
        """The user's turn for a task that goes this way: the row's template, or the input itself.

        Raises ConfigError where the template is faulty.
        """
        if self.row.prompt is None:
            return task_input
        known = {
            "input": task_input,
            "id": task_id,
            "category": self.row.category,
            "examples": [{"input": one.input, "output": one.output} for one in self.shots],
        }
        return render_template(self.row.prompt, known, self.row.where)

    def to_mapping(self) -> dict[str, Any]:
        """The route as a line of a log."""
        runner_up = self.runner_up
        return {
            "how": self.how,
            "row": self.row.where,
            "category": self.row.category,
            "prompt_id": self.row.prompt_id,
            "similarity": _rounded(self.similarity),
            "runner_up": runner_up.where if runner_up else None,
            "runner_up_similarity": _rounded(self.runner_up_similarity),
        }


class Router:
    """Routes tasks by the rows of a table.

    First the rules (`regex`), those of high priority first; then the nearest example; under
    `threshold` (a cosine; None: 0.10 for TF-IDF, none for an embedding) the default row.
    `embedding` None compares by TF-IDF over the characters' 2- to 4-grams.
    """

    def __init__(
        self,
        rows: Sequence[RouterRow],
        *,
        embedding: Embedding | None = None,
        threshold: float | None = None,
    ) -> None:
        # Stable: of examples equally near, and of rules, the first in the table counts.
        ordered = sorted(rows, key=lambda row: -row.priority)
        self.examples = [row for row in ordered if row.is_example]
        self._rules = [row for row in ordered if row.regex is not None]
        self._default = next(row for row in [*rows, _PLAIN] if _is_default(row))
        self._embedding = embedding
        usual = TFIDF_THRESHOLD if embedding is None else -1.0
        self.threshold = usual if threshold is None else threshold

    def route(
        self, tasks: Sequence[tuple[str, str]], *, leave_one_out: bool = False
    ) -> list[Route]:
        """The route of each (id, input), in their order.

        `leave_one_out`: a task is not compared with examples of its own id or of its very input, so
        that examples may be the evaluation's tasks themselves.
        """
        similarities = self._similarities([text for _, text in tasks])
        routes = []
        for (task_id, text), cosines in zip(tasks, similarities, strict=True):
            own = self._own(task_id, text) if leave_one_out else np.zeros(len(cosines), bool)
            routes.append(self._route(text, np.where(own, -np.inf, cosines)))
        return routes

    def _route(self, text: str, similarities: NDArray[np.floating[Any]]) -> Route:
        order = np.argsort(-similarities, kind="stable")
        near = [(self.examples[place], float(similarities[place])) for place in order]
        near = [(row, similarity) for row, similarity in near if similarity > -math.inf]
        rule = next((row for row in self._rules if row.regex and row.regex.search(text)), None)
        how: Literal["regex", "example", "default"] = "default"
        row = self._default
        if rule is not None:
            row, how = rule, "regex"
        elif near and near[0][1] >= self.threshold:
            row, how = near[0][0], "example"
        others = [one for one in near[:1] if how != "example"] or [
            one for one in near[1:] if _kind(one[0]) != _kind(row)
        ]
        return Route(
            row=row,
            how=how,
            similarity=near[0][1] if near else None,
            runner_up=others[0][0] if others else None,
            runner_up_similarity=others[0][1] if others else None,
            # The most similar one stands last, next to the question.
            shots=tuple(
                one for one, _ in reversed([pair for pair in near if pair[0].output][: row.shots])
            ),
        )

    def _own(self, task_id: str, text: str) -> NDArray[np.bool_]:
        """Which examples are the task itself."""
        own = _normal(text)
        return np.array(
            [
                (bool(row.id) and row.id == task_id) or normal == own
                for row, normal in zip(self.examples, self._texts, strict=True)
            ],
            dtype=bool,
        )

    @cached_property
    def _texts(self) -> list[str]:
        return [_normal(row.input) for row in self.examples]

    def _similarities(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Cosines, a row for each text, a column for each example."""
        if not self.examples or not texts:
            return np.zeros((len(texts), len(self.examples)), np.float32)
        normal = [_normal(text) for text in texts]
        if self._embedding is not None:
            return self._embedding(normal) @ self._embedding(self._texts).T
        cosines: NDArray[np.float64] = (
            self._tfidf.transform(normal) @ self._tfidf.transform(self._texts).T
        ).toarray()
        return cosines

    @cached_property
    def _tfidf(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        # Of the n-grams tried on ELYZA's tasks and on japanese-mt-bench, leave-one-out, these find
        # an example of the same category most often: 34 of 100 (of 9), 56 of 80 (of 8 categories).
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), sublinear_tf=True)
        return vectorizer.fit(self._texts)


def read_router(
    path: Path, *, embedding: Embedding | None = None, threshold: float | None = None
) -> Router:
    """The router of a table: .xlsx, .csv, .tsv or .jsonl.

    Columns: `input` (an example task, or `example_input`), `output`, `id`, `category`, `prompt` (a
    Jinja template, or `prompt_template`), `prompt_id`, `system`, `examples` (how many the prompt
    is given, or `few_shot_k`), `regex`, `priority`, `settings` (a JSON object, or `gen_overrides`)
    and each setting of its own: max_tokens, temperature, top_p, repetition_penalty, stop. A row
    without a prompt has prompt and settings of the first row with its prompt_id that has one, else
    with its category. A row with neither example nor regex, category or prompt_id is the default.
    Raises ConfigError naming file, row, column and value of whatever is wrong.
    """
    table = read_table(path)
    _check_columns(path, table)
    rows = [_row(one) for one in table]
    for row in rows:
        if row.prompt is not None:
            _check_template(row)
    shared = _with_shared_prompts(rows)
    defaults = [row for row in shared if _is_default(row)]
    if len(defaults) > 1:
        raise ConfigError(
            f"{defaults[1].where}: a second row without input and regex; "
            f"{defaults[0].where} is the default already"
        )
    if not any(row.is_example or row.regex for row in shared):
        raise ConfigError(f"{path}: no row has an input or a regex: nothing to compare tasks with")
    return Router(shared, embedding=embedding, threshold=threshold)


def summary(routes: Sequence[Route]) -> str:
    """How many tasks went where, in one line."""
    ways: Counter[str] = Counter(route.how for route in routes)
    kinds = Counter(_kind(route.row) for route in routes)
    names = {"regex": "by rule", "example": "by example", "default": "to the default prompt"}
    counts = ", ".join(f"{ways[how]} {words}" for how, words in names.items() if ways[how])
    return f"{counts} ({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})"


_PLAIN = RouterRow("the default prompt")


def _is_default(row: RouterRow) -> bool:
    return not (row.input or row.regex or row.category or row.prompt_id)


def _kind(row: RouterRow) -> str:
    """What a row is of, for readers: its prompt's id, else its category."""
    return row.prompt_id or row.category or ("default" if _is_default(row) else row.where)


def _normal(text: str) -> str:
    """`text` as it is compared; blanks around, so that one of a single letter has 2-grams, too."""
    words = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return f" {words} "


def _check_columns(path: Path, table: Sequence[TextRow]) -> None:
    columns = list(dict.fromkeys(name for row in table for name in row.cells))
    wanted = (*_INPUT, "regex")
    if not any(name in columns for name in wanted):
        raise ConfigError(
            f"{path}: no column input (or regex); the columns are {', '.join(columns)}"
        )
    # Columns of the user's own are none of ours; a misspelt one of ours is a mistake.
    for name in columns:
        if name not in _KNOWN and "did you" in (hint := nearest(name, _KNOWN, cutoff=0.8)):
            raise ConfigError(f"{path}: unknown column {name!r}{hint}")


def _row(row: TextRow) -> RouterRow:
    return RouterRow(
        where=row.where,
        input=_first(row, _INPUT),
        output=_first(row, _OUTPUT),
        id=_first(row, _ID),
        category=row.cells.get("category", ""),
        prompt_id=row.cells.get("prompt_id", ""),
        prompt=_first(row, _PROMPT) or None,
        system=row.cells.get("system") or None,
        regex=_regex(row),
        priority=_number(row, "priority", row.cells.get("priority", ""), float) or 0.0,
        shots=_number(row, "examples", _first(row, _SHOTS), int, low=0) or 0,
        settings=_settings(row),
    )


def _first(row: TextRow, names: Sequence[str]) -> str:
    return next((row.cells[name] for name in names if row.cells.get(name)), "")


def _regex(row: TextRow) -> re.Pattern[str] | None:
    pattern = row.cells.get("regex", "")
    if not pattern:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{row.where}: regex: {pattern[:40]!r}: {error}") from error


def _settings(row: TextRow) -> RoutedSettings:
    """The settings of a row: its JSON object, and the columns of single ones, which win."""
    said = _first(row, _SETTINGS)
    try:
        found: Any = json.loads(said) if said else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{row.where}: settings: {said[:40]!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f'{row.where}: settings: {said[:40]!r} is not an object such as {{"max_tokens": 512}}'
        )
    for name in found:
        if name not in _SETTING_NAMES:
            raise ConfigError(
                f"{row.where}: settings: unknown key {name!r}{nearest(name, _SETTING_NAMES)}"
            )
    found |= {name: row.cells[name] for name in _SETTING_NAMES if row.cells.get(name)}
    texts = {name: _as_text(value) for name, value in found.items()}
    return RoutedSettings(
        max_tokens=_number(row, "max_tokens", texts.get("max_tokens", ""), int, low=1),
        temperature=_number(row, "temperature", texts.get("temperature", ""), float, low=0),
        top_p=_number(row, "top_p", texts.get("top_p", ""), float, low=0, high=1, open_low=True),
        repetition_penalty=_number(
            row,
            "repetition_penalty",
            texts.get("repetition_penalty", ""),
            float,
            low=0,
            open_low=True,
        ),
        stop=_stop(row, found.get("stop")),
    )


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _stop(row: TextRow, value: object) -> tuple[str, ...] | None:
    """A list of texts, as JSON or not; a text alone is one."""
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{row.where}: stop: {value!r} is not JSON: {error}") from error
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
        raise ConfigError(f"{row.where}: stop: {value!r} is not a text or a list of texts")
    return tuple(texts)


def _number(
    row: TextRow,
    name: str,
    text: str,
    kind: type[Any],
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> Any:
    """The number in a cell, None for an empty one."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    inside = low <= value <= high and not (open_low and value == low)
    if not math.isfinite(value) or not inside or (kind is int and not value.is_integer()):
        what = "a whole number" if kind is int else "a number"
        more = "" if low == -math.inf else f" {'above' if open_low else 'from'} {low:g}"
        most = "" if high == math.inf else f" to {high:g}"
        raise ConfigError(f"{row.where}: {name}: {text[:40]!r} is not {what}{more}{most}")
    return kind(value)


def _check_template(row: RouterRow) -> None:
    """Raises ConfigError where a row's template cannot be filled, before anything is asked."""
    Route(row, "default").render("?", "0")


def _with_shared_prompts(rows: Sequence[RouterRow]) -> list[RouterRow]:
    """The rows, those without a prompt with that of their prompt_id, else of their category."""
    by_id: dict[str, RouterRow] = {}
    by_category: dict[str, RouterRow] = {}
    for row in rows:
        if row.prompt is not None:
            by_id.setdefault(row.prompt_id, row)
            by_category.setdefault(row.category, row)
    found = []
    for row in rows:
        source = by_id.get(row.prompt_id) if row.prompt_id else None
        if row.prompt_id and row.prompt is None and source is None:
            known = ", ".join(sorted(filter(None, by_id))) or "none"
            raise ConfigError(
                f"{row.where}: prompt_id: no row has {row.prompt_id!r} and a prompt; "
                f"those that have: {known}"
            )
        if source is None and row.category:
            source = by_category.get(row.category)
        found.append(row if row.prompt is not None or source is None else _like(row, source))
    return found


def _like(row: RouterRow, source: RouterRow) -> RouterRow:
    """`row` with what `source` says and it does not."""
    return replace(
        row,
        prompt=source.prompt,
        system=row.system or source.system,
        shots=row.shots or source.shots,
        settings=replace(source.settings, **row.settings.said),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
