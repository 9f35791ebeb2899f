"""Who may import whom, who may know which big library, and what must not stand in the files."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "evomerge"

# The house of the design: each room, and the rooms that it may import (itself, always).
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "strict_yaml": {"errors"},
    "wording": {"errors"},
    "merge_rules": set(),
    "resources": {"errors"},
    "schema": set(),
    "database": {"errors", "schema"},
    "settings": {"errors", "merge_rules"},
    "recipe": {"errors", "merge_rules", "settings", "strict_yaml", "wording"},
    "space": {"errors", "merge_rules", "recipe", "settings"},
    "moe_config": {"errors", "recipe", "settings", "strict_yaml", "wording"},
    "merge": {"errors", "merge_rules", "recipe", "settings", "moe_config"},
    "engine": {"errors", "recipe", "merge"},
    "evaluate": {
        *("errors", "strict_yaml", "wording", "resources", "database", "schema", "engine.base"),
    },
    # Knows no model, no engine and no database.
    "optimizer": {"errors", "space", "evaluate.ledger", "evaluate.task"},
    "search": {
        *("errors", "strict_yaml", "resources", "database", "schema", "recipe", "space"),
        *("merge", "engine", "evaluate", "optimizer"),
    },
    "report": {
        *("errors", "strict_yaml", "recipe", "moe_config", "space", "merge", "engine"),
        *("evaluate", "optimizer", "search"),
    },
    "commands": {
        *("errors", "resources", "recipe", "moe_config", "merge", "engine", "evaluate"),
        *("optimizer", "search", "report"),
    },
    "cli": {"errors", "commands"},
    "__main__": {"cli"},
}

# Each big library, and the files that may know it.
LIBRARIES: dict[str, set[str]] = {
    "cma": {"optimizer/evolution_samplers.py"},
    "cmaes": {"optimizer/evolution_samplers.py"},
    "gguf": {"merge/gguf.py", "merge/inputs.py"},
    "lm_eval": {"evaluate/harness.py"},
    "matplotlib": {
        *("report/charts.py", "report/course_chart.py", "report/layers_chart.py"),
        "report/radar.py",
    },
    "huggingface_hub": {"evaluate/hub.py", "merge/inputs.py"},
    "jinja2": {"evaluate/prompts.py", "merge/chat_template.py"},
    "openai": {"evaluate/judge_client.py"},
    "openpyxl": {"evaluate/tables.py"},
    "optuna": {"search/mirror.py", "optimizer/optuna_samplers.py"},
    "pandas": {"report/answers.py"},
    "peft": set(),
    "pyarrow": {"evaluate/tables.py"},
    "rich": {
        *("commands/search.py", "report/comparison.py", "report/importance.py", "report/screen.py"),
        *("report/bar.py", "report/merge_display.py", "report/progress.py", "report/table.py"),
        *("report/answers.py", "report/side_by_side.py", "report/charts.py"),
    },
    "sacrebleu": {"evaluate/scorers.py"},
    "safetensors": {"merge/checkpoint.py"},
    "scipy": {"optimizer/optuna_samplers.py"},
    "sklearn": {"evaluate/router.py"},
    "sqlalchemy": {
        *("database.py", "schema.py", "evaluate/ledger.py", "evaluate/ledger_query.py"),
        *("evaluate/replies.py", "search/log.py"),
    },
    "tenacity": {"evaluate/judge_client.py"},
    "torch": {
        *("merge/checkpoint.py", "merge/inputs.py", "merge/kernels.py", "merge/lora.py"),
        *("merge/methods.py", "merge/moe.py", "merge/plan.py"),
        *("merge/statistics.py", "merge/vocabulary.py", "engine/gates.py"),
        *("merge/blends.py", "merge/dtypes.py", "merge/extract.py", "merge/gguf.py"),
        *("merge/parts.py", "merge/recall.py"),
        *("engine/residency.py", "engine/transformers_engine.py", "evaluate/embedding.py"),
        *("engine/vllm_backend.py", "engine/vllm_engine.py", "engine/vllm_private.py"),
    },
    "transformers": {
        *("engine/gates.py", "engine/tokenizer.py", "engine/transformers_engine.py"),
        *("merge/inputs.py", "merge/tokenizer.py", "evaluate/embedding.py"),
        *("merge/gguf.py", "merge/gguf_vocabulary.py"),
    },
    "typer": {"cli.py", *(f"commands/{path.name}" for path in (PACKAGE / "commands").glob("*.py"))},
    "vllm": {
        *("engine/plugin.py", "engine/vllm_backend.py", "engine/vllm_engine.py"),
        "engine/vllm_private.py",
    },
}

TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".json", ""}
MACHINE_PATH = re.compile(r"(?<![\w./~${}-])/(work|farm|opt|root|home|tmp)/")
PACKAGE_INDEX = re.compile(r"https?://[^ ]*(?:py" + r"pi|npm" + r"js|deb" + r"ian)|index-" + "url")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache  # every library's test asks for every file
def imported(path: Path) -> tuple[str, ...]:
    """The dotted names that a file imports, wherever in it: `a.b` for `from a import b`, too."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_allowed(name: str, rooms: set[str]) -> bool:
    inside = name.removeprefix("evomerge.")
    return any(inside == allowed or inside.startswith(f"{allowed}.") for allowed in rooms)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_the_rooms_below_its_own(path: Path) -> None:
    inside = path.relative_to(ROOT).with_suffix("")
    if inside.parts[1] == "__init__":
        return
    own = inside.parts[1]
    ours = [name for name in imported(path) if name.startswith("evomerge.")]
    wrong = [name for name in ours if not is_allowed(name, ROOMS[own] | {own})]
    assert wrong == []


@pytest.mark.parametrize("name", ["methods", "statistics"])
def test_the_maths_of_merging_know_torch_numpy_and_nothing_else_of_ours(name: str) -> None:
    names = set(imported(PACKAGE / "merge" / f"{name}.py"))
    plain = {"__future__", "collections", "dataclasses", "functools", "hashlib", "math", "typing"}
    ours = {each for each in names if each.startswith("evomerge.")}
    known = ("evomerge.merge.blends", "evomerge.merge.statistics")
    assert all(each.startswith(known) for each in ours)
    assert {each.split(".")[0] for each in names - ours} <= plain | {"numpy", "torch"}


def test_every_room_stands_in_the_table() -> None:
    inside = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert inside - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_each_big_library_is_known_by_the_files_of_the_table(library: str) -> None:
    knowing = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert knowing <= LIBRARIES[library]


def test_no_file_pickles_or_loads_unsafe_yaml() -> None:
    forbidden = re.compile(r"\b(import pickle|torch\.load\(|yaml\.load\(|joblib|dill)\b")
    found = [path for path in modules() if forbidden.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_data_folders_hold_no_python() -> None:
    # One would break the editable install (hatchling).
    folders = ("search_spaces", "evaluators", "storage")
    assert [path for folder in folders for path in (ROOT / folder).rglob("*.py")] == []


def test_no_file_names_a_path_of_one_machine_or_a_package_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line) or PACKAGE_INDEX.search(line)
    ]
    assert found == []


def project_texts() -> Iterator[Path]:
    """The text files of the project: the folders that it is made of, and the top level's files."""
    folders = ("evomerge", "scripts", "tests", "docs", "search_spaces", "evaluators", "storage")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*inside, *ROOT.glob("*"), ROOT / ".ci" / "run"]:
        # A second work tree of the repository has a file .git with its place on this machine.
        if path.name == ".git":
            continue
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path != Path(__file__):
            yield path
