"""Suites: reading tasks, splitting them, and asking an engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from evomerge.engine.base import Completion, Each, Engine, GenerationSettings, Loaded
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.suite import (
    Suite,
    SuiteConfig,
    Task,
    TaskResult,
    check_prompt_lengths,
    load_suite,
    split_holdout,
)
from evomerge.recipe import Recipe
from evomerge.search.study import study_from_mapping


class EchoEngine(Engine):
    """Answers with the prompt's last word; counts words as tokens."""

    name = "echo"
    max_model_len = 8

    def __init__(self, chat_template: bool = False) -> None:
        self.chat_template = chat_template
        self.calls: list[tuple[list[str], object, bool]] = []

    def supports(self, recipe: Recipe) -> str | None:
        return None

    def load(self, recipe: Recipe) -> Loaded:
        return Loaded("v0", "live", 0.0)

    bos_token_id = None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        return "".join(f"<{message['role']}> {message['content']} " for message in messages)

    def has_chat_template(self) -> bool:
        return self.chat_template

    def encode(self, prompts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [[0] * add_special_tokens + [1 for _ in prompt.split()] for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        self.calls.append((list(prompts), settings, add_special_tokens))
        written = [Completion(prompt.split()[-1], (1,), "stop", 3, "v0") for prompt in prompts]
        for place, completion in enumerate(written):
            if each is not None:
                each(place, completion)
        return written

    def log_probabilities(
        self, prompts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[float]]:
        return [[0.0] for _ in prompts]

    def close(self) -> None: ...


def write_rows(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def suite_of(folder: Path, rows: Sequence[object], **settings: object) -> Suite:
    write_rows(folder, rows)
    return load_suite(SuiteConfig.model_validate({"data": "tasks.jsonl", **settings}), folder)


def evaluated(engine: Engine, suite: Suite, attempt: int = 0) -> list[TaskResult]:
    return Evaluation(engine, suite).begin([task.id for task in suite.tasks], attempt).result()


def make_tasks(sizes: Mapping[str, int]) -> list[Task]:
    return [
        Task(f"{name}-{number}", "in", "out", name, "in")
        for name, size in sizes.items()
        for number in range(size)
    ]


def test_tasks_are_read_with_their_columns(tmp_path: Path) -> None:
    rows = [{"n": 7, "q": "1+1", "a": 2, "kind": "sum", "more": []}]
    suite = suite_of(
        tmp_path, rows, id="n", input="q", reference="a", category="kind", prompt="{{ input }} ="
    )
    assert suite.tasks == (Task("7", "1+1", "2", "sum", "1+1 ="),)


def test_without_an_id_column_the_line_is_the_id(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(
        '{"input": "a", "output": "b"}\n\n{"input": "c", "output": "d\\u2028e"}\n', encoding="utf-8"
    )
    suite = load_suite(SuiteConfig(data="tasks.jsonl"), tmp_path)
    assert [(task.id, task.category) for task in suite.tasks] == [("1", "all"), ("3", "all")]


def test_a_line_separator_inside_a_text_does_not_break_the_line(tmp_path: Path) -> None:
    line = json.dumps({"input": "a\u2028b", "output": "c"}, ensure_ascii=False)
    (tmp_path / "tasks.jsonl").write_text(line, encoding="utf-8")
    assert load_suite(SuiteConfig(data="tasks.jsonl"), tmp_path).tasks[0].input == "a\u2028b"


def test_a_suite_file_finds_its_data_beside_it(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"input": "a", "output": "b"}])
    path = tmp_path / "suite.yaml"
    path.write_text("{scorer: exact, data: tasks.jsonl}")
    assert load_suite("suite.yaml", tmp_path).tasks[0].reference == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no task"),
        ('{"input": "a", "output": "b"}\n{"input"', "tasks.jsonl:2: not a JSON object"),
        ('"text"', "tasks.jsonl:1: '\"text\"' is not a JSON object"),
        (
            '{"inptu": "a", "output": "b"}',
            r"tasks.jsonl:1: no column 'input'.*did you mean 'inptu'",
        ),
        (
            '{"input": "a", "output": null}',
            "tasks.jsonl:1: 'output' .suite key reference. is 'null'",
        ),
        (
            '{"input": "a", "output": true}',
            "tasks.jsonl:1: 'output' .suite key reference. is 'true'",
        ),
        ('{"input": "a", "output": ""}', "tasks.jsonl:1: 'output' .* is empty; `reference: null`"),
        (
            '{"id": 1, "input": "a", "output": "b"}\n{"id": 1, "input": "c", "output": "d"}',
            "tasks.jsonl:2: id '1' stands in line 1",
        ),
        (
            '{"id": 1, "input": "a", "output": "b"}\n{"input": "c", "output": "d"}',
            "tasks.jsonl:2: no column 'id'",
        ),
    ],
)
def test_a_bad_task_file_is_refused_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "tasks.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_suite(SuiteConfig(data="tasks.jsonl"), tmp_path)


def test_an_absent_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        load_suite(SuiteConfig(data="nowhere.jsonl"), tmp_path)


def test_a_suite_file_names_all_wrong_keys_at_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("{scorer: exakt, data: t.jsonl, max_token: 3}")
    with pytest.raises(ConfigError) as raised:
        load_suite(str(path), tmp_path)
    assert "did you mean 'exact'?" in str(raised.value)
    assert "max_token: " in str(raised.value)
    assert "did you mean 'max_tokens'?" in str(raised.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("gates: {lenght: 2}", "gates.lenght: unknown key; did you mean 'length'?"),
        ("gates: {japanese: 2}", "gates.japanese: unknown key; known are language, repetition, "),
        (
            "by_category: {math: {temprature: 1}}",
            "by_category.math.temprature: unknown key; did you mean 'temperature'?",
        ),
        ("data: {hub: a/b, fil: x.csv}", "data.fil: unknown key; did you mean 'file'?"),
        ("data: [a.csv]", "data: should be a table's file, or {hub: owner/name, file: NAME} (giv"),
        ("scorer: 3", "scorer: should be a scorer's name, or several with their weights: {judge"),
        ("scorer: {exact: 0}", "scorer.exact: should be above 0.0 (given: 0)"),
        ("rubric: {promt: x, low: 1, high: 2}", "rubric.promt: unknown key; did you mean 'prompt"),
        ("max_tokens: many", "max_tokens: should be a whole number (given: 'many')"),
        (
            "harness: {tasks: [{name: x, metrik: acc}]}",
            "harness.tasks.0.metrik: unknown key; did you mean 'metric'?",
        ),
    ],
)
def test_a_mistake_is_told_alike_in_a_suite_file_and_in_a_study(
    tmp_path: Path, written: str, message: str
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(written)
    with pytest.raises(ConfigError) as of_file:
        load_suite(str(path), tmp_path)
    study = {"study": "s", "base_model": "a", "models": ["b"], "budget": {"trials": 1}}
    study["suite"] = yaml.safe_load(written)
    with pytest.raises(ConfigError) as of_study:
        study_from_mapping(study, where="study.yaml", folder=tmp_path)
    mistakes = str(of_file.value).splitlines()
    assert any(line.startswith(f"{path}: {message}") for line in mistakes)
    assert str(of_study.value).splitlines() == [
        line.replace(f"{path}: ", "study.yaml: suite.") for line in mistakes
    ]


def test_max_tokens_must_be_positive() -> None:
    with pytest.raises(ValidationError):
        SuiteConfig(data="t.jsonl", max_tokens=0)


@pytest.mark.parametrize(
    "prompt", ["{{ output }}", "{{ input", "{{ input + 1 }}", "{{ input.__class__.__mro__ }}"]
)
def test_a_prompt_template_that_fails_or_leaves_the_sandbox_is_refused(
    tmp_path: Path, prompt: str
) -> None:
    with pytest.raises(ConfigError, match="prompt: "):
        suite_of(tmp_path, [{"input": "a", "output": "b"}], prompt=prompt)


def test_the_digest_changes_with_what_decides_grades_and_not_with_the_place(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b"}]
    digest = suite_of(tmp_path, rows).digest
    (tmp_path / "other").mkdir()
    assert suite_of(tmp_path / "other", rows).digest == digest
    assert suite_of(tmp_path, rows, max_tokens=3).digest != digest
    assert suite_of(tmp_path, rows, prompt="Q: {{ input }}").digest != digest
    assert suite_of(tmp_path, [{"input": "a", "output": "c"}]).digest != digest


@pytest.mark.parametrize(
    ("sizes", "share", "held_out"),
    [
        ({"a": 10, "b": 20}, 0.3, {"a": 3, "b": 6}),
        ({"a": 5, "b": 5}, 0.3, {"a": 2, "b": 1}),
        ({"a": 2}, 0.01, {"a": 1}),
        ({"a": 2}, 0.99, {"a": 1}),
        ({"a": 1, "b": 1, "c": 1}, 0.99, {"a": 1, "b": 1}),
    ],
)
def test_the_holdout_takes_its_share_of_each_category(
    sizes: dict[str, int], share: float, held_out: dict[str, int]
) -> None:
    tasks = make_tasks(sizes)
    search, rest = split_holdout(tasks, share)
    assert Counter(task.category for task in rest) == held_out
    assert sorted(search + rest, key=tasks.index) == tasks


def test_the_holdout_does_not_depend_on_the_order_of_the_file() -> None:
    tasks = make_tasks({"a": 9, "b": 7})
    assert set(split_holdout(tasks, 0.4)[1]) == set(split_holdout(tasks[::-1], 0.4)[1])


def test_the_holdout_is_a_shuffle_and_not_the_first_tasks() -> None:
    tasks = make_tasks({"a": 100})
    positions = [tasks.index(task) for task in split_holdout(tasks, 0.5)[1]]
    assert 15 <= sum(position < 50 for position in positions) <= 35


@pytest.mark.parametrize(("sizes", "share"), [({"a": 1}, 0.5), ({"a": 9}, 0.0), ({"a": 9}, 1.0)])
def test_a_holdout_that_cannot_be_made_is_refused(sizes: dict[str, int], share: float) -> None:
    with pytest.raises(ConfigError, match="holdout: "):
        split_holdout(make_tasks(sizes), share)


def test_all_tasks_are_asked_in_one_call_and_graded_in_order(tmp_path: Path) -> None:
    rows = [{"input": "say x", "output": "x"}, {"input": "say y", "output": "z"}]
    suite = suite_of(tmp_path, rows, max_tokens=4, stop=["\n"])
    engine = EchoEngine()
    results = evaluated(engine, suite)
    assert [(r.task_id, r.answer, r.grade, r.version) for r in results] == [
        ("1", "x", 1.0, "v0"),
        ("2", "y", 0.0, "v0"),
    ]
    settings = GenerationSettings(max_tokens=4, stop=("\n",))
    assert engine.calls == [(["say x", "say y"], settings, True)]


def test_sampled_answers_have_a_seed_that_follows_from_the_suite_and_the_attempt_alone(
    tmp_path: Path,
) -> None:
    rows = [{"input": "x", "output": "x"}]
    greedy, sampled = suite_of(tmp_path, rows), suite_of(tmp_path, rows, temperature=0.5)
    task = sampled.tasks[0]
    assert greedy.generation(task).seed is None
    assert sampled.generation(task).seed == int(sampled.digest[:8], 16)
    seeds = {sampled.generation(task, attempt).seed for attempt in range(20)}
    assert len(seeds) == 20
    (tmp_path / "other").mkdir()
    same = suite_of(tmp_path / "other", rows, temperature=0.5)
    assert same.generation(task, 3) == sampled.generation(task, 3)
    other = suite_of(tmp_path, [*rows, {"input": "y", "output": "y"}], temperature=0.5)
    assert other.generation(task).seed != sampled.generation(task).seed


def test_repetitions_of_greedy_answers_are_sampled_and_say_which_they_are(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, [{"input": "x", "output": "x"}], selection_temperature=0.4)
    engine = EchoEngine()
    results = [evaluated(engine, suite, attempt)[0] for attempt in (0, 1)]
    assert [result.attempt for result in results] == [0, 1]
    settings = [call[1] for call in engine.calls]
    assert [each.temperature for each in settings] == [0.0, 0.4]  # type: ignore[attr-defined]


def test_a_chat_template_is_used_where_there_is_one_and_adds_the_special_tokens(
    tmp_path: Path,
) -> None:
    suite = suite_of(tmp_path, [{"input": "hi", "output": "hi"}], system="Be brief.")
    engine = EchoEngine(chat_template=True)
    evaluated(engine, suite)
    prompts, _, add_special_tokens = engine.calls[0]
    assert prompts == ["<system> Be brief. <user> hi "]
    assert not add_special_tokens


def test_chat_false_leaves_the_template_alone(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, [{"input": "hi", "output": "hi"}], chat=False, system="Be brief.")
    engine = EchoEngine(chat_template=True)
    evaluated(engine, suite)
    assert engine.calls[0][0] == ["Be brief.\nhi"]
    assert engine.calls[0][2]


def test_chat_true_without_a_template_is_refused(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, [{"input": "hi", "output": "hi"}], chat=True)
    with pytest.raises(ConfigError, match="no chat template"):
        evaluated(EchoEngine(), suite)


def test_prompts_that_do_not_fit_with_their_answers_are_named(tmp_path: Path) -> None:
    rows = [{"input": "a b c", "output": "x"}, {"input": "a b c d e", "output": "x"}]
    suite = suite_of(tmp_path, rows, max_tokens=4)
    with pytest.raises(ConfigError, match=r"1 of 2 tasks .* 8 tokens.*: 2 \(2 too many\)"):
        check_prompt_lengths(EchoEngine(), suite, suite.tasks)
    check_prompt_lengths(EchoEngine(), suite, suite.tasks[:1])
    longer = suite_of(
        tmp_path, rows, max_tokens=4, category="input", by_category={"a b c": {"max_tokens": 6}}
    )
    with pytest.raises(ConfigError, match=r"2 of 2 .* with answers of max_tokens 4 or 6: 1 \(2"):
        check_prompt_lengths(EchoEngine(), longer, longer.tasks)
