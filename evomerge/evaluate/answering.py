"""Tasks answered into a file, unit by unit: what a competition wants of a model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evomerge.engine.base import Engine, GenerationSettings
from evomerge.errors import ConfigError, OutputExistsError, RunError
from evomerge.evaluate.prompts import Chat, ask, render_template, uses_chat
from evomerge.evaluate.router import Route, Router
from evomerge.evaluate.task import Task

UNIT = 64
_NAMED_AT_MOST = 5
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class OpenTask:
    """A task without a right answer; `key` is its task_id as the file has it (a number, a text)."""

    key: int | str
    input: str

    @property
    def id(self) -> str:
        return str(self.key)


@dataclass(frozen=True)
class AnswerSettings:
    """How tasks are asked: through `chat`, each as `prompt` (Jinja: input, id) unless it is routed.

    `leave_one_out`: no task is compared with the router's example that it is itself.
    """

    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(max_tokens=512)
    )
    chat: Chat = field(default_factory=Chat)
    prompt: str = "{{ input }}"
    leave_one_out: bool = False


@dataclass(frozen=True)
class AskedTask:
    """A task as it is put to the model: `user` is its turn of the chat."""

    task: OpenTask
    user: str
    chat: Chat
    generation: GenerationSettings
    route: Route | None = None


def read_open_tasks(path: Path) -> list[OpenTask]:
    """The tasks of a file of {"task_id", "input"} objects, one after another, in its order.

    An object may go over several lines; further keys are ignored. Raises ConfigError that names
    file and line of what is none, has no task_id or input, or comes a second time.
    """
    tasks: list[OpenTask] = []
    first: dict[str, str] = {}
    for where, row in _objects(path):
        task = OpenTask(_key(row, where), _input(row, where))
        if task.id in first:
            raise ConfigError(f"{where}: task_id {task.key!r} stands at {first[task.id]} already")
        first[task.id] = where
        tasks.append(task)
    if not tasks:
        raise ConfigError(f'{path}: holds no task; one {{"task_id": 0, "input": "…"}} per line')
    return tasks


class Answers:
    """The file of answers to `tasks`, and what a run before left of it.

    `digest` is of all that decides the answers; units are appended to `OUT.partial`,
    which gives way to `OUT` at the end.
    """

    def __init__(self, out: Path, tasks: Sequence[OpenTask], digest: str) -> None:
        self._out = out
        self._partial = out.with_name(out.name + ".partial")
        self._tasks = tasks
        self._digest = digest
        self.done: dict[str, str] = {}

    def begin(self, *, overwrite: bool = False) -> None:
        """Looks at what is there. Raises ConfigError where that may not be gone on with."""
        if self._out.exists() and not overwrite:
            raise OutputExistsError(f"{self._out}: exists already; --overwrite replaces it")
        if not self._out.parent.is_dir():
            raise ConfigError(f"{self._out}: there is no folder {self._out.parent}")
        header, *lines = self._whole_lines() or [""]
        begun = _header(header)
        if begun == self._digest:
            self.done = {row["task_id"]: row["output"] for row in map(json.loads, lines)}
        elif self._partial.exists() and not overwrite:
            raise OutputExistsError(
                f"{self._partial}: was begun with another model, other tasks or settings; give "
                "those again, or --overwrite to begin anew"
            )

    def _whole_lines(self) -> list[str]:
        """The lines that are there; what a kill left of one more is cut off."""
        if not self._partial.exists():
            return []
        content = self._partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._partial, len(whole))
        return whole.decode("utf-8").split("\n")[:-1]

    def add(self, answers: Sequence[tuple[OpenTask, str]]) -> None:
        """Keeps a unit. Raises RunError where the disk does not take it."""
        rows = [{"task_id": task.id, "output": text} for task, text in answers]
        if not self.done:
            self._write(self._partial, _line({"evomerge": self._digest}), "w")
        self._write(self._partial, "".join(map(_line, rows)), "a")
        self.done.update({task.id: text for task, text in answers})

    def finish(self) -> Path:
        """The whole file, in the order of the tasks, in place of the partial one."""
        rows = [
            {"task_id": task.key, "input": task.input, "output": self.done[task.id]}
            for task in self._tasks
        ]
        whole = self._partial.with_name(self._partial.name + ".whole")
        self._write(whole, "".join(map(_line, rows)), "w")
        os.replace(whole, self._out)
        self._partial.unlink()
        return self._out

    def _write(self, path: Path, text: str, mode: str) -> None:
        try:
            with path.open(mode, encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def answer(
    engine: Engine,
    asked: Sequence[AskedTask],
    answers: Answers,
    *,
    unit: int = UNIT,
    told: Callable[[int, int], None] = lambda done, cut: None,
) -> None:
    """Answers all that `answers` has not yet, `unit` tasks in one call.

    `told` gets how many are done and how many of the last unit were cut at max_tokens. Raises
    ConfigError where a prompt does not fit the model's context, before anything is generated.
    """
    prompts = {one.task.id: ask(engine, one.chat, _task(one)) for one in asked}
    _check_lengths(engine, asked, prompts)
    # The same units whatever is done already: a batch's make-up has a say in its answers.
    for start in range(0, len(asked), unit):
        now = asked[start : start + unit]
        if all(one.task.id in answers.done for one in now):
            continue
        completions = engine.generate(
            [prompts[one.task.id] for one in now],
            [one.generation for one in now],
            add_special_tokens=not uses_chat(engine, now[0].chat),
        )
        answers.add([(one.task, each.text) for one, each in zip(now, completions, strict=True)])
        told(len(answers.done), sum(each.finish_reason == "length" for each in completions))


def ask_all(
    tasks: Sequence[OpenTask], settings: AnswerSettings, router: Router | None
) -> list[AskedTask]:
    """The tasks with their prompts and settings: those of their routes, where there is a router.

    Raises ConfigError where a template is faulty.
    """
    if router is None:
        return [_plain(task, settings) for task in tasks]
    pairs = [(task.id, task.input) for task in tasks]
    routes = router.route(pairs, leave_one_out=settings.leave_one_out)
    return [_routed(task, settings, route) for task, route in zip(tasks, routes, strict=True)]


def _plain(task: OpenTask, settings: AnswerSettings) -> AskedTask:
    known = {"input": task.input, "id": task.id}
    user = render_template(settings.prompt, known, "--prompt")
    return AskedTask(task, user, settings.chat, _seeded(settings.generation))


def _routed(task: OpenTask, settings: AnswerSettings, route: Route) -> AskedTask:
    plain = _plain(task, settings)
    row = route.row
    return replace(
        plain,
        user=plain.user if row.prompt is None else route.render(task.input, task.id),
        chat=settings.chat if row.system is None else replace(settings.chat, system=row.system),
        generation=_seeded(row.settings.over(settings.generation)),
        route=route,
    )


def _seeded(settings: GenerationSettings) -> GenerationSettings:
    """`settings` with their seed where answers are sampled; a greedy one has none."""
    return settings if settings.temperature else replace(settings, seed=None)


def _task(asked: AskedTask) -> Task:
    return Task(asked.task.id, asked.task.input, "", "all", asked.user)


def _check_lengths(engine: Engine, asked: Sequence[AskedTask], prompts: dict[str, str]) -> None:
    special = not uses_chat(engine, asked[0].chat)
    encoded = engine.encode([prompts[one.task.id] for one in asked], add_special_tokens=special)
    limit = engine.max_model_len
    too_long = [
        f"{one.task.id} ({len(ids)} + {one.generation.max_tokens})"
        for one, ids in zip(asked, encoded, strict=True)
        if len(ids) + one.generation.max_tokens > limit
    ]
    if too_long:
        more = f" and {len(too_long) - _NAMED_AT_MOST} more" * (len(too_long) > _NAMED_AT_MOST)
        raise ConfigError(
            f"{len(too_long)} of {len(asked)} tasks do not fit the context of {limit} tokens, "
            f"prompt and answer: tasks {', '.join(too_long[:_NAMED_AT_MOST])}{more}; lower "
            "--max-tokens (or max_tokens in the router's table), or raise --max-model-len"
        )


def answers_digest(asked: Sequence[AskedTask], *parts: Any) -> str:
    """Hex SHA-256 of what is asked, and of `parts`: plain values that decide the answers, too."""
    content = [
        [one.task.key, one.task.input, one.user, asdict(one.chat), asdict(one.generation)]
        for one in asked
    ]
    text = json.dumps([content, parts], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _line(row: dict[str, Any]) -> str:
    """A line of JSON; escaped where a half of a surrogate pair can be written no other way."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


def _header(line: str) -> str | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found.get("evomerge") if isinstance(found, dict) else None


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a file with its place; objects may go over lines, as some writers do."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the tasks cannot be read as UTF-8: {error}") from error
    decoder = json.JSONDecoder(strict=False)
    place, line = 0, 1
    while True:
        start = _blank_end(text, place)
        line += text.count("\n", place, start)
        place = start
        if place == len(text):
            return
        try:
            found, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{line}: not a JSON object: {error.msg}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}:{line}: {text[place : place + 40]!r} is not a JSON object")
        yield f"{path}:{line}", found
        line += text.count("\n", place, end)
        place = end


def _blank_end(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return found.end() if found else place


def _key(row: dict[str, Any], where: str) -> int | str:
    key = row.get("task_id")
    if isinstance(key, bool) or not isinstance(key, int | str) or key == "":
        found = f"{json.dumps(key)}" if "task_id" in row else f"none among {', '.join(row)}"
        raise ConfigError(f"{where}: task_id is {found}; a number or a text is needed")
    return key


def _input(row: dict[str, Any], where: str) -> str:
    text = row.get("input")
    if not isinstance(text, str) or not text.strip():
        found = json.dumps(text)[:40] if "input" in row else f"none among {', '.join(row)}"
        raise ConfigError(f"{where}: input is {found}; a text is needed")
    return text
