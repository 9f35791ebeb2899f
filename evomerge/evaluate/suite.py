"""A suite: named tasks, a prompt template, generation settings and a scorer."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evomerge.engine.base import Engine, GenerationSettings
from evomerge.errors import ConfigError
from evomerge.evaluate.prompts import Chat, ask, render_template, uses_chat
from evomerge.evaluate.scorers import SCORERS, Scorer
from evomerge.evaluate.task import ScorerGrade, Task, TaskResult
from evomerge.resources import is_bare_name, locate
from evomerge.strict_yaml import load_yaml

__all__ = ["ScorerGrade", "Suite", "SuiteConfig", "Task", "TaskResult"]

# The scorer that a language model behind a network stands for.
JUDGE = "judge"

_NAMED_AT_MOST = 5


class SuiteConfig(BaseModel):
    """What a suite file, or the key `suite:` of a study, says.

    `data` is a JSONL file; `id`, `input`, `reference` and `category` name its columns. Without
    `id` the column "id" is taken where there is one, else the line's number; without `category`
    all tasks are of one. `prompt` is a jinja template that may use input, id and category.
    `chat`: None means through the tokenizer's chat template if it has one. `scorer` is the name of
    one, or a mapping of several to their weights: each is then scaled to [0, 1] by its range, and
    the grade is their weighted mean. Repetitions of greedy answers are sampled with
    `selection_temperature`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scorer: str | Mapping[str, Annotated[float, Field(gt=0)]] = "exact"
    data: str
    id: str | None = None
    input: str = "input"
    reference: str = "output"
    category: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    prompt: str = "{{ input }}"
    system: str | None = None
    chat: bool | None = None
    stop: tuple[str, ...] = ()
    temperature: float = Field(default=0.0, ge=0.0)
    selection_temperature: float = Field(default=0.7, gt=0.0)

    @field_validator("scorer")
    @classmethod
    def _names_known_scorers(cls, scorer: str | Mapping[str, float]) -> str | Mapping[str, float]:
        names = [scorer] if isinstance(scorer, str) else list(scorer)
        if not names:
            raise ValueError("a mapping of scorers needs at least one: {exact: 1.0}")
        for name in names:
            if name not in SCORERS and name != JUDGE:
                raise ValueError(f"no scorer {name!r}{_nearest(name, [*SCORERS, JUDGE])}")
        return scorer


@dataclass(frozen=True)
class Suite:
    """Tasks with everything that decides their grades; ids are unique, the order is the file's."""

    config: SuiteConfig
    tasks: tuple[Task, ...]

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each scorer, by its name: one alone has the weight 1."""
        scorer = self.config.scorer
        return {scorer: 1.0} if isinstance(scorer, str) else scorer

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The scorers that need nothing but the answer, by name; others are graders (a judge)."""
        return {name: SCORERS[name] for name in self.weights if name in SCORERS}

    @property
    def scorer_name(self) -> str:
        """What grades are called that come from this suite: `exact`, `0.9 judge + 0.1 chrf`."""
        scorer = self.config.scorer
        if isinstance(scorer, str):
            return scorer
        return " + ".join(f"{weight:g} {name}" for name, weight in scorer.items())

    @property
    def chat(self) -> Chat:
        """How prompts become chats."""
        return Chat(self.config.chat, self.config.system)

    def generation(self, task: Task, attempt: int = 0) -> GenerationSettings:
        """How the answer to `task` is generated.

        Sampled ones with a seed that is a function of `digest` and `attempt` alone: so a resumed
        search draws what an unbroken one does, and candidates are compared with the same random
        numbers. Where answers are greedy, attempts above 0 (wanted repetitions) are sampled with
        `selection_temperature`.
        """
        config = self.config
        temperature = config.temperature
        if attempt and not temperature:
            temperature = config.selection_temperature
        return GenerationSettings(
            max_tokens=config.max_tokens,
            temperature=temperature,
            stop=config.stop,
            seed=_seed(self.digest, attempt) if temperature else None,
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that can change a grade; the place of the file is not."""
        settings = self.config.model_dump(mode="json", exclude={"data"})
        content = [settings, [asdict(task) for task in self.tasks]]
        text = json.dumps(content, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def select(self, task_ids: Sequence[str]) -> list[Task]:
        """The tasks of these ids, in the order of `task_ids`; KeyError for an unknown one."""
        by_id = {task.id: task for task in self.tasks}
        return [by_id[task_id] for task_id in task_ids]


def load_suite(suite: SuiteConfig | str, folder: Path) -> Suite:
    """The suite of a configuration, a preset's bare name or a suite file, with its tasks read.

    Paths are relative to `folder`, that of the study; `data` in a suite file to that file.
    Raises ConfigError naming file and line on whatever is wrong.
    """
    if isinstance(suite, SuiteConfig):
        return Suite(suite, read_tasks(suite, folder / suite.data))
    path = locate(suite if is_bare_name(suite) else str(folder / suite), "evaluators")
    config = read_suite_config(path)
    return Suite(config, read_tasks(config, path.parent / config.data))


def read_suite_config(path: Path) -> SuiteConfig:
    """The configuration in the YAML file `path`; ConfigError names every wrong key at once."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a suite is a mapping with the keys {_suite_keys()}")
    try:
        return SuiteConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _complaints(error))) from error


def read_tasks(config: SuiteConfig, path: Path) -> tuple[Task, ...]:
    """The tasks in the JSONL file `path`, in its order; ConfigError names file and line."""
    rows = list(_rows(path))
    if not rows:
        raise ConfigError(f"{path}: holds no task; one JSON object per line is needed")
    id_column = config.id or ("id" if "id" in rows[0][1] else None)
    tasks = tuple(_task(config, id_column, row, f"{path}:{line}", line) for line, row in rows)
    first_line: dict[str, int] = {}
    for task, (line, _) in zip(tasks, rows, strict=True):
        if task.id in first_line:
            raise ConfigError(f"{path}:{line}: id {task.id!r} stands in line {first_line[task.id]}")
        first_line[task.id] = line
    return tasks


def split_holdout(tasks: Sequence[Task], share: float) -> tuple[list[Task], list[Task]]:
    """(search tasks, held-out tasks), `share` of each category held out, both in the given order.

    Depends on ids and categories alone, not on a seed or the order of the file. Each category's
    number is rounded so that the whole is round(share · tasks), at least one task on each side.
    Raises ConfigError where that is not possible.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"holdout: {share} is not a share between 0 and 1")
    if len(tasks) < 2:
        raise ConfigError("holdout: one task cannot be split; at least 2 are needed")
    categories: dict[str, list[str]] = {}
    for task in tasks:
        categories.setdefault(task.category, []).append(task.id)
    numbers = _held_out_numbers({name: len(ids) for name, ids in categories.items()}, share)
    held_out: set[str] = set()
    for name, ids in categories.items():
        held_out.update(sorted(ids, key=_shuffle_key)[: numbers[name]])
    search = [task for task in tasks if task.id not in held_out]
    return search, [task for task in tasks if task.id in held_out]


def check_prompt_lengths(engine: Engine, suite: Suite, tasks: Sequence[Task]) -> None:
    """Raises ConfigError naming the tasks whose prompt and answer do not fit the context."""
    add_special_tokens = not uses_chat(engine, suite.chat)
    allowed = engine.max_model_len - suite.config.max_tokens
    prompts = {task.id: ask(engine, suite.chat, task) for task in tasks}
    too_long = [
        (task_id, count)
        for task_id, prompt in prompts.items()
        if (count := engine.count_tokens(prompt, add_special_tokens=add_special_tokens)) > allowed
    ]
    if too_long:
        named = ", ".join(f"{task_id} ({count})" for task_id, count in too_long[:_NAMED_AT_MOST])
        more = f" and {len(too_long) - _NAMED_AT_MOST} more" * (len(too_long) > _NAMED_AT_MOST)
        raise ConfigError(
            f"suite: {len(too_long)} of {len(tasks)} prompts are longer than {allowed} tokens "
            f"(max_model_len {engine.max_model_len} less max_tokens {suite.config.max_tokens}): "
            f"tasks {named}{more}; shorten them, lower max_tokens or raise engine.max_model_len"
        )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number from 1, object) of each line of a JSONL file that is not blank."""
    try:
        # Not splitlines(): it also breaks at U+2028 and others that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the task file cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: {line.strip()[:40]!r} is not a JSON object")
        yield number, row


def _task(
    config: SuiteConfig, id_column: str | None, row: Mapping[str, object], where: str, line: int
) -> Task:
    fields = {
        "id": str(line) if id_column is None else _text(row, id_column, "id", where),
        "input": _text(row, config.input, "input", where),
        "category": _text(row, config.category, "category", where) if config.category else "all",
    }
    reference = _text(row, config.reference, "reference", where)
    user = render_template(config.prompt, fields, where)
    task = Task(fields["id"], fields["input"], reference, fields["category"], user)
    names = [config.scorer] if isinstance(config.scorer, str) else config.scorer
    for name in names:
        if name in SCORERS and (objection := SCORERS[name].objection(task)):
            raise ConfigError(f"{where}: {config.reference}: scorer {name}: {objection}")
    return task


def _text(row: Mapping[str, object], column: str, key: str, where: str) -> str:
    """The value of a column that the suite's `key` names; numbers as JSON writes them."""
    if column not in row:
        raise ConfigError(
            f"{where}: no column {column!r} (suite key {key}); "
            f"this line has {', '.join(row) or 'none'}{_nearest(column, row)}"
        )
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise ConfigError(
        f"{where}: {column!r} is {json.dumps(value)[:40]}; a text or a number is needed"
    )


def _held_out_numbers(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """How many tasks of each category are held out: largest remainders, ties by name."""
    tasks = sum(sizes.values())
    wanted = min(max(round(share * tasks), 1), tasks - 1)
    numbers = {name: int(share * size) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (numbers[name] - share * sizes[name], name))
    while sum(numbers.values()) < wanted:
        for name in by_remainder[: wanted - sum(numbers.values())]:
            numbers[name] += numbers[name] < sizes[name]
    return numbers


def _seed(digest: str, attempt: int) -> int:
    """32 bits out of a suite's digest and the number of an attempt."""
    text = digest if attempt == 0 else hashlib.sha256(f"{digest} {attempt}".encode()).hexdigest()
    return int(text[:8], 16)


def _shuffle_key(task_id: str) -> str:
    return hashlib.sha256(task_id.encode()).hexdigest()


def _complaints(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
        + (_nearest(str(item["loc"][0]), SuiteConfig.model_fields))
        * (item["type"] == "extra_forbidden")
        for item in error.errors()
    ]


def _nearest(name: str, known: Iterable[str]) -> str:
    """A parenthesis that names the nearest known key, or all of them."""
    words = list(known)
    close = difflib.get_close_matches(name, words, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(words)})"


def _suite_keys() -> str:
    return ", ".join(SuiteConfig.model_fields)
