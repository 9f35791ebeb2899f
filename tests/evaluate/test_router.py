"""The prompt router: tables as people keep them, and where tasks go."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

from evomerge.engine.base import GenerationSettings
from evomerge.errors import ConfigError
from evomerge.evaluate.prompts import ask
from evomerge.evaluate.router import Router, RouterRow, read_router, summary
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.evaluate.text_table import read_table
from tests import tiny
from tests.evaluate.test_evaluation import CountingEngine
from tests.shared_data import shared_data

SUMS = {
    "input": "12 と 30 を足した数を答えてください。",
    "category": "math",
    "prompt": "計算: {{ input }}",
}
POEM = {
    "input": "春の海について短い詩を書いてください。",
    "category": "poem",
    "prompt": "詩: {{ input }}",
}
TABLE: list[dict[str, Any]] = [
    {**SUMS, "max_tokens": 32, "temperature": 0},
    {"input": "15 から 7 を引いた数を答えてください。", "category": "math"},
    {**POEM, "settings": {"temperature": 0.7, "stop": ["。\n"]}},
    {"regex": r"\bPython\b", "category": "code", "prompt": "code: {{ input }}", "priority": 5},
    {"prompt": "何でも: {{ input }}"},
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def workbook(path: Path, *rows: list[Any]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.worksheets[0].append(row)
    book.save(path)
    return path


def prompts(router: Router, *inputs: str, **options: bool) -> list[str]:
    routes = router.route([(str(place), text) for place, text in enumerate(inputs)], **options)
    return [route.render(text, "0") for route, text in zip(routes, inputs, strict=True)]


def test_a_task_gets_the_prompt_of_the_nearest_example_a_rule_or_the_default(
    tmp_path: Path,
) -> None:
    router = read_router(jsonl(tmp_path / "t.jsonl", TABLE))
    assert prompts(
        router,
        "22 と 5 を足した数を答えてください。",
        "秋の山について短い詩を書いてください。",
        "Python で 12 と 30 を足した数を答えてください。",
        "Wie spät ist es?",
    ) == [
        "計算: 22 と 5 を足した数を答えてください。",
        "詩: 秋の山について短い詩を書いてください。",
        "code: Python で 12 と 30 を足した数を答えてください。",
        "何でも: Wie spät ist es?",
    ]


def test_a_row_without_a_prompt_has_that_and_the_settings_of_its_category(tmp_path: Path) -> None:
    router = read_router(jsonl(tmp_path / "t.jsonl", TABLE))
    route = router.route([("a", "15 から 9 を引いた数を答えてください。")])[0]
    assert (route.how, route.row.where) == ("example", f"{tmp_path / 't.jsonl'}:2")
    assert route.row.prompt == SUMS["prompt"]
    usual = GenerationSettings(max_tokens=256, temperature=0.5)
    assert route.row.settings.over(usual) == GenerationSettings(max_tokens=32, temperature=0.0)
    assert route.runner_up is not None
    assert route.runner_up.category == "poem"


def test_left_out_is_the_task_itself_by_its_id_or_its_text(tmp_path: Path) -> None:
    rows = [
        {"id": "7", "input": "りんごは何色ですか", "category": "a", "prompt": "A"},
        {"id": 8, "input": "空は何色ですか", "category": "b", "prompt": "B"},
    ]
    router = read_router(jsonl(tmp_path / "t.jsonl", rows), threshold=0.0)
    asked = [("7", "りんごは何色ですか？！"), ("new", " 空は何色です か".replace(" か", "か"))]
    kept = [route.row.category for route in router.route(asked)]
    left = [route.row.category for route in router.route(asked, leave_one_out=True)]
    assert (kept, left) == (["a", "b"], ["b", "a"])


def test_examples_stand_in_the_prompt_the_most_similar_last(tmp_path: Path) -> None:
    rows = [
        {"input": "2+2は？", "output": "4", "category": "m", "few_shot_k": "2",
         "prompt": "{% for e in examples %}{{ e.input }}{{ e.output }} {% endfor %}{{ input }}"},
        {"input": "2+3は？", "output": "5", "category": "m"},
        {"input": "空の色は？", "output": "青", "category": "m"},
    ]  # fmt: skip
    router = read_router(jsonl(tmp_path / "t.jsonl", rows))
    assert prompts(router, "2+3は何？") == ["2+2は？4 2+3は？5 2+3は何？"]


def test_excel_csv_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    columns = ["input", "category", "prompt_id", "prompt"]
    rows = [
        ["=1+1 は？", "数", 3, "一行目\n{{ input }}"],
        ["詩を書いて", "詩", 4, "詩: {{ input }}"],
    ]
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in [columns, *rows]:
        sheet.append(row)
    sheet["A2"].data_type = "s"  # as Excel keeps a text that was typed with ' before it
    sheet["D2"] = "一行目_x000D_\n{{ input }}"
    sheet["B9"] = "   "  # blank rows at the end, and a column that somebody formatted
    sheet["H1"] = None
    book.save(tmp_path / "t.xlsx")
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([columns, [*rows[0][:3], "一行目\r\n{{ input }}"], rows[1], []])
    jsonl(tmp_path / "t.jsonl", [dict(zip(columns, row, strict=True)) for row in rows])
    found = [
        [row.cells for row in read_table(tmp_path / f"t.{kind}")]
        for kind in ("xlsx", "csv", "jsonl")
    ]
    expected = [
        {"input": "=1+1 は？", "category": "数", "prompt_id": "3", "prompt": "一行目\n{{ input }}"},
        {"input": "詩を書いて", "category": "詩", "prompt_id": "4", "prompt": "詩: {{ input }}"},
    ]
    assert found == [expected, expected, expected]


def test_a_prompt_in_a_text_file_keeps_the_line_break_that_it_ends_in(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl", [{"input": " a　", "prompt": "### 指示\n{{ input }}\n### 回答\n"}]
    )
    assert prompts(read_router(path), "a") == ["### 指示\na\n### 回答\n"]


def routed_suite(folder: Path, **router: object) -> Suite:
    """Two sums and a poem to be written, asked as examples of the very same tasks say."""
    rows = [
        {"id": "1", "input": "1 と 2 を足した数は?", "output": "3", "kind": "x"},
        {"id": "2", "input": "3 と 4 を足した数は?", "output": "7", "kind": "x"},
        {"id": "3", "input": "Hello", "output": "Hi", "kind": "y"},
    ]
    jsonl(folder / "tasks.jsonl", rows)
    table = [
        {"id": "1", "input": "1 と 2 を足した数は?", "prompt": "計算: {{ input }}",
         "system": "S", "settings": {"max_tokens": 9, "temperature": 0.5}},
        {"id": "2", "input": "3 と 4 を足した数は?", "prompt": "和: {{ input }}"},
        {"prompt": "何でも: {{ input }}", "stop": "。"},
    ]  # fmt: skip
    jsonl(folder / "table.jsonl", table)
    config = {"data": "tasks.jsonl", "category": "kind", "by_category": {"x": {"max_tokens": 5}}}
    config["router"] = {"table": "table.jsonl", **router} if router else "table.jsonl"
    return load_suite(SuiteConfig.model_validate(config), folder)


def test_a_suite_asks_each_task_as_its_nearest_example_but_itself_says(tmp_path: Path) -> None:
    suite = routed_suite(tmp_path)
    first, second, third = suite.tasks
    assert [task.user for task in suite.tasks] == [
        "和: 1 と 2 を足した数は?", "計算: 3 と 4 を足した数は?", "何でも: Hello",
    ]  # fmt: skip
    assert suite.generation(first) == GenerationSettings(max_tokens=5)
    given = suite.generation(second)
    assert (given.max_tokens, given.temperature) == (9, 0.5)
    assert suite.generation(third) == GenerationSettings(max_tokens=256, stop=("。",))
    asked = [ask(CountingEngine(chat=True), suite.chat, task) for task in suite.tasks]
    assert ["system:S" in prompt for prompt in asked] == [False, True, False]
    kept = routed_suite(tmp_path, leave_one_out=False)
    assert kept.tasks[0].user == "計算: 1 と 2 を足した数は?"
    assert kept.digest != suite.digest


def test_a_suites_embedding_may_be_a_model_of_the_hub(tmp_path: Path) -> None:
    folder = tiny.qwen3(tmp_path / "elsewhere", layers=2)
    asked: list[str] = []

    def find_model(name: str) -> Path:
        asked.append(name)
        if name != "owner/e5@v1":
            raise ConfigError(f"{name}: the hub has no such model")
        return folder

    beside = routed_suite(tmp_path, embedding="elsewhere")
    for place, embedding in (("a", "owner/e5@v1"), ("b", "owner/e6")):
        (tmp_path / place).mkdir()
        table = {"table": "../table.jsonl", "embedding": embedding}
        text = json.dumps({"data": "../tasks.jsonl", "category": "kind", "router": table})
        (tmp_path / place / "s.yaml").write_text(text)
        (tmp_path / f"{place}.yaml").write_text(f"like: {place}/s.yaml")
    found = load_suite("a.yaml", tmp_path, find_model=find_model)
    assert [task.user for task in found.tasks] == [task.user for task in beside.tasks]
    with pytest.raises(ConfigError, match=r"b\.yaml: router\.embedding: owner/e6: the hub has no"):
        load_suite("b.yaml", tmp_path, find_model=find_model)
    assert asked == ["owner/e5@v1", "owner/e6"]


def test_what_is_wrong_with_a_suites_router_is_told(tmp_path: Path) -> None:
    for router, words in (
        ({"tabel": "t"}, "unknown key 'tabel'|router"),
        ({"table": "none.xlsx"}, "none.xlsx"),
        ({"embedding": "nowhere"}, "router.embedding: .*nowhere"),
    ):
        with pytest.raises((ConfigError, ValueError), match=words):
            routed_suite(tmp_path, **router)


def test_a_cell_merged_over_rows_counts_for_each_of_them(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in [["category", "input"], ["数", "一"], [None, "二"]]:
        sheet.append(row)
    sheet.merge_cells("A2:A3")
    book.save(tmp_path / "t.xlsx")
    assert [row.cells["category"] for row in read_table(tmp_path / "t.xlsx")] == ["数", "数"]


def test_reading_a_workbook_changes_nothing_in_it(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", ["input", "prompt"], ["a", "b {{ input }}"])
    before = path.read_bytes()
    read_router(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["prompt"], ["x"]], ["no column input", "prompt"]),
        ([["input", "promt"], ["a", "x"]], ["'promt'", "did you mean 'prompt'"]),
        ([["input", "input"], ["a", "x"]], ["'input' names two columns"]),
        ([["input", "prompt"]], ["holds no row"]),
        ([[], []], ["holds no table"]),
        ([["input", "prompt"], ["a", "{{ inptu }}"]], ["sheet row 2", "inptu", "may use"]),
        ([["input", "prompt"], ["a", "{% for %}"]], ["sheet row 2", "prompt:"]),
        ([["input", "prompt"], ["a", "{{ ''.__class__ }}"]], ["sheet row 2", "prompt:"]),
        ([["input", "prompt_id"], ["a", 3]], ["sheet row 2", "no row has '3'"]),
        ([["input", "regex"], ["a", "("]], ["sheet row 2", "regex", "'('"]),
        ([["input", "settings"], ["a", "{"]], ["sheet row 2", "not JSON"]),
        ([["input", "settings"], ["a", '{"max_token": 3}']], ["did you mean 'max_tokens'"]),
        ([["input", "max_tokens"], ["a", 2.5]], ["sheet row 2", "max_tokens", "whole number"]),
        ([["input", "top_p"], ["a", 2]], ["sheet row 2", "top_p", "to 1"]),
        ([["input", "prompt"], [None, "x"], [None, "y"]], ["sheet row 3", "default already"]),
        ([["input", "prompt"], [None, "x"]], ["nothing to compare"]),
        ([["input", "prompt"], ["a", "=合計(1)"]], [", Sheet!B2", "formula without a result"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_workbook_is_told_with_its_place(
    rows: list[list[Any]], words: list[str], tmp_path: Path
) -> None:
    path = workbook(tmp_path / "t.xlsx", *rows)
    with pytest.raises(ConfigError) as caught:
        read_router(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_what_is_no_table_is_told(tmp_path: Path) -> None:
    for name, content, words in [
        ("a.xlsx", b"no zip", "Excel workbook"),
        ("b.csv", "input\n日本".encode("shift_jis"), "not UTF-8"),
        ("c.csv", b"input,prompt\na,b,c\n", "3 cells under 2 columns"),
        ("d.jsonl", b'{"input": "a"}\n[1]\n', "d.jsonl:2"),
        ("e.txt", b"", "right are .*.xlsx"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_router(tmp_path / name)
    with pytest.raises(ConfigError, match="nowhere"):
        read_router(tmp_path / "nowhere.xlsx")


def test_an_embedding_decides_in_place_of_the_letters() -> None:
    def by_length(texts: Any) -> Any:
        return np.array([[len(text) < 20, len(text) >= 20] for text in texts], dtype=np.float32)

    rows = [
        RouterRow("1", input="short", category="s"),
        RouterRow("2", input="l" * 50, category="l"),
    ]
    router = Router(rows, embedding=by_length)
    routes = router.route([("a", "l" * 5), ("b", "short " * 9)])
    assert [route.row.category for route in routes] == ["s", "l"]
    assert summary(routes) == "2 by example (s 1, l 1)"


def test_a_model_of_transformers_gives_vectors_of_length_1_whatever_the_batch(
    tmp_path: Path,
) -> None:
    from evomerge.evaluate.embedding import TransformersEmbedding

    folder = tiny.qwen3(tmp_path / "m", layers=2)
    embed = TransformersEmbedding(folder, prefix="query: ")
    texts = [f"文 {number} " + "あ" * (number % 7) for number in range(40)]
    vectors = embed(texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert np.allclose(vectors[[3]], embed(texts[3:4]), atol=1e-4)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    other = TransformersEmbedding(folder, prefix="query: ")(texts)
    assert not np.allclose(vectors, other, atol=1e-2)
    router = Router([RouterRow(text, input=text) for text in texts], embedding=embed)
    assert [one.row.where for one in router.route([("", text) for text in texts])] == texts


def test_real_examples_find_the_category_of_the_task_more_often_than_the_commonest_one() -> None:
    with shared_data("elyza_tasks_100_categories.csv").open(encoding="utf-8") as file:
        categories = {row["task_id"]: row["category"] for row in csv.DictReader(file)}
    rows = [
        RouterRow(row["task_id"], input=row["input"], id=row["task_id"],
                  category=categories[row["task_id"]])
        for row in _csv(shared_data("elyza_tasks_100.csv"))
    ]  # fmt: skip
    routes = Router(rows, threshold=0.0).route(
        [(one.id, one.input) for one in rows], leave_one_out=True
    )
    right = sum(route.row.category == row.category for route, row in zip(routes, rows, strict=True))
    print(f"ELYZA-tasks-100, leave one out: {right} of {len(rows)} of the nearest's category")
    assert all(route.row.id != row.id for route, row in zip(routes, rows, strict=True))
    assert right >= 30  # the commonest of the 9 categories has 22


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
