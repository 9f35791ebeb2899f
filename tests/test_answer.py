"""`evomerge answer`: tasks of a competition into a file of answers, whole or gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import Completion, Each, GenerationSettings
from evomerge.errors import ConfigError, OutputExistsError
from evomerge.evaluate.answering import (
    Answers,
    AnswerSettings,
    answer,
    answers_digest,
    ask_all,
    read_open_tasks,
)
from evomerge.evaluate.prompts import Chat
from evomerge.evaluate.router import read_router
from tests import tiny
from tests.evaluate.test_evaluation import CountingEngine
from tests.test_cli import run

TASKS = [{"task_id": number, "input": f"テスト{number}\u2028の「文」"} for number in (3, 1, 2)]
OPTIONS = ("--engine", "transformers", "--max-tokens", "4", "--threads", "1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.llama(tmp_path / "model", layers=2, dtype=torch.float32)
    write(tmp_path / "tasks.jsonl", TASKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: Sequence[object]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def outputs(model: Path, prompts: list[str], tokens: int) -> list[str]:
    config = EngineConfig(str(model), (str(model),), dtype="float32", threads=1)
    with open_engine("transformers", config) as engine:
        settings = GenerationSettings(max_tokens=tokens)
        done = engine.generate(prompts, settings, add_special_tokens=True)
    return [one.text for one in done]


def test_every_task_gets_its_answer_in_the_order_and_with_the_ids_of_the_file(here: Path) -> None:
    ran = run("answer", "model", "tasks.jsonl", "-o", "out.jsonl", *OPTIONS)
    assert (ran.status, ran.out) == (0, "out.jsonl\n")
    assert "3 of 3 tasks" in ran.err
    expected = outputs(here / "model", [str(task["input"]) for task in TASKS], 4)
    assert rows_of(here / "out.jsonl") == [
        {**task, "output": text} for task, text in zip(TASKS, expected, strict=True)
    ]
    assert "テスト" in (here / "out.jsonl").read_text("utf-8")
    assert [path.name for path in here.glob("out*")] == ["out.jsonl"]
    assert run("answer", "model", "tasks.jsonl", "-o", "out.jsonl", *OPTIONS).status == 2


def test_what_a_row_of_the_table_samples_is_drawn_with_the_seed(here: Path) -> None:
    write(here / "table.jsonl", [{"input": "テスト", "temperature": 1.0}])
    command = ("answer", "model", "tasks.jsonl", "--router", "table.jsonl", *OPTIONS)
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        ran = run(*command, "-o", f"{name}.jsonl", "--seed", seed)
        assert ran.status == 0, ran.err
    one, again, other = (rows_of(here / f"{name}.jsonl") for name in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_greedy_answers_have_no_seed_to_go_on_with(tmp_path: Path) -> None:
    write(tmp_path / "tasks.jsonl", TASKS)
    tasks = read_open_tasks(tmp_path / "tasks.jsonl")
    seeds = {
        temperature: ask_all(
            tasks, AnswerSettings(GenerationSettings(temperature=temperature, seed=7)), None
        )[0].generation.seed
        for temperature in (0.0, 0.5)
    }
    assert seeds == {0.0: None, 0.5: 7}


def test_a_workbook_of_examples_gives_each_task_its_prompt_and_settings(here: Path) -> None:
    book = openpyxl.Workbook()
    for row in [
        ["input", "category", "prompt", "max_tokens"],
        ["テスト9の「文」", "test", "T {{ category }}: {{ input }}", 2],
        [None, None, "D: {{ input }}", None],
    ]:
        book.worksheets[0].append(row)
    book.save("table.xlsx")
    write(
        here / "tasks.jsonl", [{"task_id": 0, "input": "テスト0の"}, {"task_id": 1, "input": "Q?"}]
    )
    command = ("answer", "model", "tasks.jsonl", "-o", "out.jsonl", "--router", "table.xlsx")
    ran = run(*command, "--routes", "routes.jsonl", *OPTIONS)
    assert ran.status == 0, ran.err
    assert "routes: 1 by example, 1 to the default prompt (test 1, default 1)" in ran.err
    assert [row["output"] for row in rows_of(here / "out.jsonl")] == [
        *outputs(here / "model", ["T test: テスト0の"], 2),
        *outputs(here / "model", ["D: Q?"], 4),
    ]
    routes = rows_of(here / "routes.jsonl")
    assert [(one["task_id"], one["how"], one["row"]) for one in routes] == [
        (0, "example", "table.xlsx, sheet row 2"),
        (1, "default", "table.xlsx, sheet row 3"),
    ]


def test_a_row_of_the_table_may_have_a_system_message_of_its_own(tmp_path: Path) -> None:
    rows = [{"input": "詩を書いて", "system": "詩人です", "prompt": "{{ input }}"}]
    write(tmp_path / "table.jsonl", rows)
    write(
        tmp_path / "t.jsonl", [{"task_id": 0, "input": "詩を書いて"}, {"task_id": 1, "input": "Hi"}]
    )
    tasks, engine = read_open_tasks(tmp_path / "t.jsonl"), CountingEngine(chat=True)
    settings = AnswerSettings(GenerationSettings(max_tokens=5), Chat(None, "usual"))
    asked = ask_all(tasks, settings, read_router(tmp_path / "table.jsonl"))
    answers = Answers(tmp_path / "o.jsonl", tasks, answers_digest(asked))
    answer(engine, asked, answers)
    [(prompts, _)] = engine.calls
    assert ["system:詩人です" in prompt for prompt in prompts] == [True, False]
    assert ["system:usual" in prompt for prompt in prompts] == [False, True]


class Interrupted(CountingEngine):
    """Is interrupted in its second call."""

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        if len(self.calls) == 1:
            raise KeyboardInterrupt
        return super().generate(prompts, settings, add_special_tokens=add_special_tokens, each=each)


def test_a_killed_run_goes_on_and_answers_again_only_the_unit_in_flight(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [{"task_id": n, "input": "a " * n} for n in range(1, 8)])
    tasks = read_open_tasks(tmp_path / "t.jsonl")
    asked = ask_all(tasks, AnswerSettings(GenerationSettings(max_tokens=5)), None)
    digest = answers_digest(asked)
    out = tmp_path / "out.jsonl"
    begun = Answers(out, tasks, digest)
    begun.begin()
    with pytest.raises(KeyboardInterrupt):
        answer(Interrupted(), asked, begun, unit=3)
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"task_id": "4", "out')  # what a kill leaves of a line
    assert not out.exists()

    with pytest.raises(OutputExistsError, match="another model, other tasks or settings"):
        Answers(out, tasks, answers_digest(asked, "another model")).begin()
    engine, resumed = CountingEngine(), Answers(out, tasks, digest)
    resumed.begin()
    told: list[tuple[int, int]] = []
    answer(engine, asked, resumed, unit=3, told=lambda *news: told.append(news))
    resumed.finish()
    assert [len(prompts) for prompts, _ in engine.calls] == [3, 1]
    assert told == [(6, 0), (7, 0)]
    assert [row["output"] for row in rows_of(out)] == [str(n) for n in range(1, 8)]
    assert not partial.exists()


def test_prompts_that_do_not_fit_are_told_before_anything_is_generated(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [{"task_id": n, "input": "a " * n} for n in (10, 96, 97)])
    tasks = read_open_tasks(tmp_path / "t.jsonl")
    asked = ask_all(tasks, AnswerSettings(GenerationSettings(max_tokens=4)), None)
    answers = Answers(tmp_path / "out.jsonl", tasks, "d")
    engine = CountingEngine()
    with pytest.raises(ConfigError, match=r"1 of 3 tasks do not fit .* 100 tokens.*97 \(97 \+ 4\)"):
        answer(engine, asked, answers)
    assert engine.calls == []


def test_tasks_may_go_over_lines_or_bear_ids_of_text(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(
        '\ufeff{"task_id": "a",\n "input": "one\ntwo"}\n\n{"task_id": 0, "input": "}", "x": []}',
        "utf-8",
    )
    assert [(task.key, task.input) for task in read_open_tasks(file)] == [
        ("a", "one\ntwo"),
        (0, "}"),
    ]


def test_a_half_of_a_surrogate_pair_is_written_escaped(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"task_id": 0, "input": "\\ud83d あ"}\n', "utf-8")
    tasks = read_open_tasks(file)
    answers = Answers(tmp_path / "o.jsonl", tasks, "d")
    answers.begin()
    answers.add([(tasks[0], "い")])
    assert rows_of(answers.finish()) == [{"task_id": 0, "input": "\ud83d あ", "output": "い"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"task_id": 0, "input": "a"}\n{"task_id": 0, "input": "b"}', ["t.jsonl:2", "stands at"]),
        ('{"task_id": 0}', ["t.jsonl:1", "input is none among task_id"]),
        ('{"task_id": 0, "input": " "}', ["t.jsonl:1", "a text is needed"]),
        ('{"input": "a"}', ["t.jsonl:1", "task_id is none among input"]),
        ('{"task_id": true, "input": "a"}', ["task_id is true"]),
        ('{"task_id": 0, "input": "a"}\nx', ["t.jsonl:2", "not a JSON object"]),
        ("[1]", ["t.jsonl:1", "not a JSON object"]),
        ("\n\n", ["holds no task"]),
    ],
)
def test_wrong_tasks_are_one_message_with_their_line(
    content: str, words: list[str], here: Path
) -> None:
    (here / "t.jsonl").write_text(content)
    ran = run("answer", "model", "t.jsonl", "-o", "out.jsonl", *OPTIONS)
    assert ran.status == 2
    assert all(word in ran.err for word in words), ran.err
    assert not list(here.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "llama.cpp"), ["--engine", "'llama.cpp'"]),
        (("--dtype", "int8"), ["--dtype", "'int8'"]),
        (("--threshold", "0.3"), ["--router"]),
        (("--router", "none.xlsx"), ["none.xlsx"]),
        (("--prompt", "{{ text }}"), ["--prompt", "text", "input"]),
        (("--chat",), ["no chat template"]),
        (("--max-tokens", "600"), ["context of 512 tokens"]),
    ],
)
def test_a_wrong_option_is_one_message(
    arguments: tuple[str, ...], words: list[str], here: Path
) -> None:
    ran = run("answer", "model", "tasks.jsonl", "-o", "out.jsonl", *OPTIONS, *arguments)
    assert ran.status == 2
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert not list(here.glob("out*"))
