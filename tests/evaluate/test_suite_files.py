"""Suite files and presets: tables of every kind, what ships, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from evomerge.errors import ConfigError
from evomerge.evaluate import suite as suite_module
from evomerge.evaluate import task_reading
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.evaluate.tables import read_rows
from evomerge.evaluate.task import GradeRequest
from evomerge.resources import preset_names
from tests.shared_data import shared_data

ROWS = [
    {"id": "a", "input": "1+1=", "output": "2", "kind": "sum"},
    {"id": "b", "input": '引用 "x", と\n改行\u2028', "output": "３", "kind": "text"},
]


def write_table(folder: Path, kind: str, rows: Sequence[Mapping[str, object]]) -> Path:
    path = folder / f"tasks{kind}"
    columns = list(rows[0])
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        from openpyxl import Workbook

        book = Workbook()
        book.active.append(columns)
        for row in rows:
            book.active.append([row[name] for name in columns])
        book.save(path)
    return path


def loaded(path: Path, **settings: object) -> Suite:
    config = {"data": path.name, **settings}
    context = {"folder": path.parent}
    return load_suite(SuiteConfig.model_validate(config, context=context), path.parent)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet", ".xlsx"])
def test_every_kind_of_table_gives_the_same_tasks(tmp_path: Path, kind: str) -> None:
    suite = loaded(write_table(tmp_path, kind, ROWS), category="kind")
    expected = load_suite(
        SuiteConfig(data=str(write_table(tmp_path, ".jsonl", ROWS)), category="kind"), tmp_path
    )
    assert suite.tasks == expected.tasks
    assert suite.digest == expected.digest


def test_numbers_of_a_sheet_are_what_the_sheet_shows(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"input": "1+1=", "output": 2.0},
        {"input": "½", "output": 0.5},
    ]
    suite = loaded(write_table(tmp_path, ".xlsx", rows))
    assert [task.reference for task in suite.tasks] == ["2", "0.5"]


def test_a_workbook_is_read_as_it_is_meant(tmp_path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    rows = [
        ["input", "output", "kind", None, "seen"],
        ["a_x000D_\nb", 1, "sum", "note", date(2024, 5, 1)],
        ["c", "=1+1", None, None, None],
        [None, None, None, None, None],
        ["d", "2", "text", None, None],
    ]
    for row in rows:
        book.active.append(row)
    book.active.merge_cells("C2:C3")
    book.save(tmp_path / "t.xlsx")
    read = {"category": "kind", "reference": None, "scorer": "judge"}
    tasks = loaded(tmp_path / "t.xlsx", **read).tasks
    assert [(task.id, task.input, task.category) for task in tasks] == [
        ("1", "a\nb", "sum"),
        ("2", "c", "sum"),
        ("4", "d", "text"),
    ]
    for needed, message in (
        ({"reference": "output"}, r"t\.xlsx, Sheet!B3: '=1\+1' is a formula without a result"),
        ({"fields": {"seen": "seen"}}, r"Sheet!E2: 2024-05-01 .* is a date or a time; .* as text"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(tmp_path / "t.xlsx", **read | needed)


def test_what_spreadsheets_and_pandas_add_to_csv_files_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeff,input,output\n0,a,b\n,,\n2,c,d\n,,\n", encoding="utf-8")
    assert [(one.id, one.input) for one in loaded(tmp_path / "t.csv").tasks] == [
        ("1", "a"),
        ("2", "c"),
    ]


def test_rows_of_tables_are_numbered_below_the_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('input,output\n"a\nb",1\nc,2\n')
    assert [task.id for task in loaded(tmp_path / "t.csv").tasks] == ["1", "2"]
    assert [row.where for row in read_rows(tmp_path / "t.csv")][1].endswith("t.csv:4")


def test_the_columns_task_id_and_question_id_are_ids_without_being_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("task_id,input,output\n7,a,b\n")
    assert loaded(tmp_path / "t.csv").tasks[0].id == "7"


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"input,output\na,b,c\n", {}, r"t\.csv:2: 3 cells under 2 columns"),
        (b'input,output\n"a,b\n', {}, r"t\.csv:2: not CSV"),
        (b"", {}, "holds no table"),
        (b"input,output\n", {}, "holds no task"),
        (b"input,input\na,b\n", {}, "'input' names two columns"),
        ("input,output\n日本,b\n".encode("utf-16"), {}, r"may be utf-16: iconv"),
        (
            "input,output\n日".encode() + b"\xff,b\n",
            {},
            r"t\.csv:2: not UTF-8 .*; save it as UTF-8",
        ),
        (b"input;output\na;b\n", {}, r"parted by ';'; right are commas"),
        (b'input,output\n"' + b"a" * 140_000, {}, "not CSV: .*limit.*a quote that is not closed"),
        ("input,output\n日本,b\n".encode("cp932"), {}, r"t\.csv:2: not UTF-8 .*cp932: iconv"),
        (b"input,output\na,\nb,c\nd,\n", {}, r"t\.csv:2, line 4: 'output' .*is empty; `reference"),
        (b"input,output\n ,x\n", {}, r"t\.csv:2: 'input' .*is empty$"),
        (b"input,output\na,b\n", {"fields": {"aspect": "eval_aspekt"}}, "no column 'eval_aspekt'"),
        (b"input,output\na,b\n", {"only": {"output": "c"}}, "output: no row has 'c'; known are b"),
        (b"input,output\na,b\nc,d\n", {"only": {"input": "a", "output": "d"}}, "none of 2 rows"),
        (b"input,output\na,b\n", {"by_category": {"x": {"top_p": 0.5}}}, "by_category: no task"),
        (b"id,input,output\n ,a,b\n", {}, r"t\.csv:2: the id \(suite key id\) is empty"),
        (b"input,output,t\na,b,\n", {"turns": "t"}, r"one of t \(suite key turns\) is empty"),
        (b"input\na\n", {"reference": None}, r"the reference is empty \(as `reference` or"),
        (b"id,input,output\n1,a,b\n1,c,d\n", {}, r"t\.csv:3: id '1' stands in line 2 too"),
    ],
)
def test_a_bad_table_is_refused_with_its_place(
    tmp_path: Path, content: bytes, settings: dict[str, object], message: str
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path / "t.csv", **settings)


@pytest.mark.parametrize("kind", [".parquet", ".xlsx"])
def test_a_file_that_is_not_what_its_suffix_says_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"t{kind}").write_text("no such thing")
    with pytest.raises(ConfigError, match="cannot be read as"):
        loaded(tmp_path / f"t{kind}")


def test_an_unknown_kind_of_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"\.json is no kind of table; right are \.jsonl"):
        loaded(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"input": "a\ud800", "output": "b"}', r"t\.jsonl:1: \\ud800 is half of a character"),
        ('{"input": "a", "output": ' + "[" * 100_000, r"t\.jsonl:1: .*: too deep"),
        ('{"input": "a", "output": NaN}', r"t\.jsonl:1: 'output' .* is nan; a text or a number"),
    ],
)
def test_json_that_nobody_can_ask_is_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(row)
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path / "t.jsonl")


def test_a_second_table_with_two_rows_for_a_task_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    (tmp_path / "more.csv").write_text("id,x\na,1\nb,2\na,3\n")
    with pytest.raises(ConfigError, match=r"more\.csv:4: id 'a' stands in line 2 too"):
        loaded(path, join={"file": "more.csv", "key": "id"})


def test_references_may_be_absent_where_the_suite_says_so(tmp_path: Path) -> None:
    rows = [{"input": "a", "kind": "free"}, {"input": "b", "kind": "math", "right": ["1"]}]
    path = write_table(tmp_path, ".jsonl", rows)
    judge = {"scorer": "judge", "rubric": {"prompt": "{{ answer }}", "low": 1, "high": 5}}
    assert [task.reference for task in loaded(path, reference=None, **judge).tasks] == ["", ""]
    suite = loaded(path, reference="right.0", reference_for=["math"], category="kind", **judge)
    assert [task.reference for task in suite.tasks] == ["", "1"]


def test_choices_are_columns_or_one_list(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "x", "c0": "x", "c1": "y", "both": ["x", "y"]}]
    path = write_table(tmp_path, ".jsonl", rows)
    assert loaded(path, choices=["c0", "c1"]).tasks[0].choices == ("x", "y")
    assert loaded(path, choices="both").tasks[0].choices == ("x", "y")
    with pytest.raises(ConfigError, match=r"'c0' .* is no list of texts"):
        loaded(path, choices="c0")


def test_a_category_has_its_own_settings_of_generation(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    own = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.2, "max_tokens": 9}
    suite = loaded(
        path,
        category="kind",
        top_p=0.9,
        stop=["###"],
        by_category={"text": {**own, "stop": ["。"]}},
    )
    first, second = (suite.generation(task) for task in suite.tasks)
    assert (first.temperature, first.top_p, first.seed, first.stop) == (0.0, 0.9, None, ("###",))
    assert (second.temperature, second.top_p, second.repetition_penalty) == (0.5, 0.8, 1.2)
    assert (second.max_tokens, second.stop) == (9, ("。",))
    assert second.seed is not None


def test_a_suite_is_like_a_preset_but_for_what_it_says(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    suite = loaded(path, like="jsonl-judge", rubric={"high": 10}, max_tokens=7)
    assert suite.rubric is not None
    assert (suite.rubric.low, suite.rubric.high, suite.rubric.empty) == (1, 10, 1)
    assert "You grade the answer" in suite.rubric.prompt
    assert suite.config.max_tokens == 7


def test_null_takes_back_what_the_other_suite_says(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    (tmp_path / "one.yaml").write_text(
        "{category: kind, by_category: {math: {top_p: 0.5}, text: {top_p: 0.6}}, stop: [x],"
        " fields: {a: kind, b: kind}, gates: {empty: 0}, only: {kind: text}}"
    )
    nothing = {"only": None, "gates": None, "stop": None, "fields": {"a": None}}
    with pytest.raises(ConfigError, match=r"category 'math'.*`by_category: null` leaves out"):
        loaded(path, like="one.yaml", only=None)
    one = loaded(path, like="one.yaml", by_category={"math": None}, **nothing)
    assert one.config.by_category.keys() == {"text"}
    assert (one.config.stop, one.config.gates, one.config.fields) == ((), {}, {"b": "kind"})
    assert len(one.tasks) == len(ROWS)
    (tmp_path / "two.yaml").write_text("{like: one.yaml, by_category: null, only: null}")
    three = loaded(path, like="two.yaml", by_category={"sum": {"top_p": 0.7}})
    assert three.config.by_category.keys() == {"sum"}


def test_a_suite_like_japanese_mt_bench_may_have_questions_of_other_categories(
    tmp_path: Path,
) -> None:
    rows = [{"question_id": 1, "turns": ["a"], "category": "law"}]
    path = write_table(tmp_path, ".jsonl", rows)
    like = {"like": "japanese-mt-bench", "reference_for": None, "reference": None, "join": None}
    with pytest.raises(ConfigError, match="by_category: no task is of category"):
        loaded(path, **like)
    assert loaded(path, by_category=None, **like).tasks[0].category == "law"


def test_a_suites_splits_are_named_rows(tmp_path: Path) -> None:
    rows = [
        {"input": name, "output": "x", "year": year, "gold": gold}
        for name, year, gold in (("a", 2023, True), ("b", 2024.0, False), ("c", 2025, True))
    ]
    write_table(tmp_path, ".jsonl", rows)
    (tmp_path / "mine.yaml").write_text(
        "{data: tasks.jsonl, only: {year: [2023, 2024, 2025]}, split: dev,"
        " splits: {dev: {year: [2023, 2024]}, test: {year: 2025}, gold: {gold: true}}}"
    )

    def asked(**settings: object) -> str:
        suite = loaded(tmp_path / "tasks.jsonl", like="mine.yaml", **settings)
        return "".join(task.input for task in suite.tasks)

    assert [asked(), asked(split="test"), asked(split="gold")] == ["ab", "c", "ac"]
    assert [asked(split=None), asked(split="b", splits={"b": {"input": "b"}})] == ["abc", "b"]
    assert [task.input for task in load_suite("mine.yaml", tmp_path, split="test").tasks] == ["c"]
    years = {2023: {"year": 2023}, 2025: {"year": 2025}}
    assert [asked(split=2025, splits=years), asked(split="2025", splits=years)] == ["c", "c"]
    with pytest.raises(ValueError, match=r"split: right is the name of one .*given: \['dev'\]"):
        asked(split=["dev"])
    with pytest.raises(ConfigError, match="split: there is no split 'tset'; did you mean 'test'"):
        load_suite("mine.yaml", tmp_path, split="tset")
    (tmp_path / "plain.yaml").write_text("data: tasks.jsonl")
    with pytest.raises(ConfigError, match=r"no split 'dev'; the suite has no `splits:`"):
        load_suite("plain.yaml", tmp_path, split="dev")


def test_a_split_is_the_same_suite_as_its_rows_said_by_hand(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".csv", ROWS)
    named = loaded(path, split="sums", splits={"sums": {"kind": "sum"}})
    assert named.digest == loaded(path, only={"kind": "sum"}).digest


def test_a_judge_without_a_rubric_is_told_what_jsonl_judge_tells_it(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    suite = loaded(path, scorer={"judge": 0.5, "exact": 0.5})
    assert suite.rubric is not None
    assert suite.config.rubric == load_suite("jsonl-judge", tmp_path, path).config.rubric


def test_tables_stay_beside_the_suite_that_names_them_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    write_table(tmp_path / "outer", ".jsonl", ROWS)
    (inner / "one.yaml").write_text("data: ../tasks.jsonl")
    (inner / "two.yaml").write_text("like: one.yaml")
    (inner.parent / "three.yaml").write_text("like: inner/two.yaml")
    monkeypatch.chdir(tmp_path)
    names = ("outer/inner/one.yaml", "outer/inner/two.yaml", "outer/three.yaml")
    suites = [load_suite(name, Path()) for name in names]
    assert len({suite.digest for suite in suites}) == 1
    assert len(suites[0].tasks) == len(ROWS)


def test_a_suite_that_is_like_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("like: two.yaml")
    (tmp_path / "two.yaml").write_text("like: one.yaml")
    with pytest.raises(ConfigError, match="is like itself"):
        load_suite("one.yaml", tmp_path)


def test_texts_may_stand_in_files_of_their_own(tmp_path: Path) -> None:
    write_table(tmp_path, ".jsonl", ROWS)
    (tmp_path / "p.jinja").write_text("Q: {{ input }}")
    (tmp_path / "suite.yaml").write_text("{data: tasks.jsonl, prompt: {file: p.jinja}}")
    assert load_suite("suite.yaml", tmp_path).tasks[0].user == "Q: 1+1="
    (tmp_path / "suite.yaml").write_text("{data: tasks.jsonl, prompt: {file: q.jinja}}")
    with pytest.raises(ConfigError, match=r"prompt: .*q\.jinja cannot be read: No such file"):
        load_suite("suite.yaml", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rubric": {"prompt": "x", "low": 5, "high": 1}}, "low 5 must be below high 1"),
        ({"rubric": {"prompt": "x", "low": 1, "high": 5, "empty": 0}}, "empty 0 is not in 1 to 5"),
        ({"rubric": {"prompt": "x", "low": 0, "high": 10**9}}, "at most 101 different ones"),
        ({"prompt": "Answer."}, "it says the same to every task"),
        ({"fields": {"answer": "a"}}, "'answer' cannot name a field"),
        ({"chat_template": "llm-jp"}, "did you mean 'llm-jp-3'?"),
        ({"chat": False, "chat_template": "llm-jp-3"}, "no use for chat_template"),
        ({"turn_references": ["a"]}, "1 columns for 0 further turns"),
        ({"data": {"file": "x.csv"}}, "hub .* or source"),
        ({"scorer": {"exact": math.inf}}, "finite number"),
        ({"temperature": math.inf}, "finite number"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        SuiteConfig.model_validate({"data": "tasks.jsonl", **settings})


def test_a_judges_prompt_that_no_task_can_fill_is_refused_at_once(tmp_path: Path) -> None:
    rubric = {"prompt": "{{ eval_aspect }}", "low": 1, "high": 5}
    with pytest.raises(ConfigError, match=r"judge: .*'eval_aspect' is undefined"):
        loaded(write_table(tmp_path, ".jsonl", ROWS), scorer="judge", rubric=rubric)


def test_a_judges_prompt_without_the_answer_is_refused_at_once(tmp_path: Path) -> None:
    rubric = {"prompt": "Grade the answer to {{ input }}.", "low": 1, "high": 5}
    path = write_table(tmp_path, ".jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"rubric\.prompt: it does not show the judge the answer"):
        loaded(path, scorer="judge", rubric=rubric)
    shown = rubric | {"prompt": "{{ turns[-1].answer }}"}
    assert loaded(path, scorer="judge", rubric=shown).rubric is not None


def test_presets_say_where_their_tasks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def unreachable(repository: str, revision: str | None, file: str) -> Path:
        raise ConfigError(f"{file} of {repository} cannot be fetched")

    monkeypatch.setattr(task_reading, "dataset_file", unreachable)
    for name in preset_names("evaluators"):
        with pytest.raises(ConfigError, match=rf"{name}.*--data \S+") as raised:
            load_suite(name, tmp_path)
        assert f"like: {name}, data: " in str(raised.value)


def test_a_hub_that_does_not_answer_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub's library reads its settings when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"datasets/elyza/ELYZA-tasks-100 at 1\.0\.0 cannot be"):
        load_suite("elyza-tasks-100", tmp_path)


def test_a_dataset_that_was_fetched_before_is_read_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "datasets--owner--tasks"
    (kept / "snapshots" / commit / "data").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "v1").write_text(commit)
    (kept / "snapshots" / commit / "data" / "test.csv").write_text("input,output\na,b\n")
    data = {"hub": "owner/tasks", "revision": "v1", "file": "data/test.csv"}
    suite = load_suite(SuiteConfig.model_validate({"data": data}), tmp_path)
    assert [(task.input, task.reference) for task in suite.tasks] == [("a", "b")]
    with pytest.raises(ConfigError, match=r"owner/tasks at v2 cannot be fetched.*`data: data/test"):
        load_suite(SuiteConfig.model_validate({"data": {**data, "revision": "v2"}}), tmp_path)


@pytest.mark.parametrize("name", ["jsonl-exact", "jsonl-judge"])
def test_the_presets_for_tasks_of_ones_own_take_any_table(tmp_path: Path, name: str) -> None:
    suite = load_suite(name, tmp_path, write_table(tmp_path, ".csv", ROWS))
    assert [task.id for task in suite.tasks] == ["a", "b"]
    assert suite.where == name


def test_the_real_elyza_tasks_are_read_with_their_points(tmp_path: Path) -> None:
    suite = load_suite("elyza-tasks-100", tmp_path, shared_data("elyza_tasks_100.csv"))
    assert len(suite.tasks) == 100
    assert suite.rubric is not None
    assert (suite.rubric.low, suite.rubric.high, suite.rubric.empty) == (1, 5, 1)
    task = suite.tasks[48]  # the one with braces
    question = suite.rubric.question(GradeRequest(task, "これは回答です。", 0))
    for text in (task.input, task.reference, task.fields["eval_aspect"], "これは回答です。"):
        assert text in question


@pytest.mark.parametrize("name", ["japanese-mt-bench", "japanese-mt-bench-two-turns"])
def test_the_real_japanese_mt_bench_is_read_with_both_turns(tmp_path: Path, name: str) -> None:
    questions = shared_data("japanese_mt_bench/question_full.jsonl")
    suite = load_suite(name, tmp_path, questions)
    assert set(Counter(task.category for task in suite.tasks).values()) == {10}
    assert len(suite.tasks) == 80
    turns = 2 if name.endswith("two-turns") else 1
    assert {1 + len(task.turns) for task in suite.tasks} == {turns}
    with_reference = {task.category for task in suite.tasks if task.reference}
    assert with_reference == {"math", "reasoning", "coding"}
    temperatures = {task.category: suite.generation(task).temperature for task in suite.tasks}
    assert temperatures["math"] == 0.1
    assert temperatures["roleplay"] == 0.5
    math = next(task for task in suite.tasks if task.category == "math")
    rubric = suite.rubric
    assert rubric is not None
    last = math.at_turn(turns - 1)
    question = rubric.question(GradeRequest(last, "答えその二", 0, ("答えその一",) * (turns - 1)))
    assert last.reference in question
    assert ("答えその一" in question) == (turns == 2)
    assert all(text in question for text in (math.user, *math.turns, "答えその二"))


def test_the_two_judge_prompts_are_no_copies_of_the_published_one(tmp_path: Path) -> None:
    published = shared_data("japanese_mt_bench/judge_ja_prompts.jsonl").read_text(encoding="utf-8")
    ours = suite_module.load_suite(
        "japanese-mt-bench", tmp_path, shared_data("japanese_mt_bench/question_full.jsonl")
    ).config.rubric
    assert ours is not None
    longest = 25
    pieces = (ours.prompt[at : at + longest] for at in range(len(ours.prompt) - longest))
    assert [piece for piece in pieces if piece in published] == []
