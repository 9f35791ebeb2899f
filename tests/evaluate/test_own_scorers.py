"""Scorers of a user's own: functions of a file or a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError, RunError
from evomerge.evaluate.suite import Suite, load_suite
from tests.evaluate.test_suite import write_rows

LENGTH = "def length(task, answer):\n    return len(answer)\n\nlength.high = 10\n"


def suite_of(folder: Path, scorer: str, code: str = LENGTH, *, trust_code: bool = True) -> Suite:
    write_rows(folder, [{"input": "a", "output": "b"}])
    (folder / "own.py").write_text(code)
    (folder / "suite.yaml").write_text(f"{{scorer: '{scorer}', data: tasks.jsonl}}")
    return load_suite("suite.yaml", folder, trust_code=trust_code)


def test_a_function_of_a_file_grades_in_its_own_range(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "own.py:length")
    scorer = suite.scorers["own.py:length"]
    assert (scorer.low, scorer.high) == (0, 10)
    assert scorer.grade(suite.tasks[0], "four") == 4


def test_a_module_that_is_installed_may_be_named(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "operator:eq")
    assert suite.scorers["operator:eq"].grade(suite.tasks[0], "x") == 0.0


def test_code_needs_trust(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"own\.py:length' runs code, which needs --trust-code"):
        suite_of(tmp_path, "own.py:length", trust_code=False)


def test_a_suite_that_is_like_one_of_another_folder_is_graded_by_that_one_s_code(
    tmp_path: Path,
) -> None:
    def read(root: Path) -> Suite:
        suites = root / "suites"
        (root / "mine").mkdir(parents=True)
        suites.mkdir()
        suite_of(suites, "own.py:length")
        (root / "mine" / "one.yaml").write_text("{like: ../suites/suite.yaml, max_tokens: 9}")
        (root / "mine.yaml").write_text("{like: mine/one.yaml}")
        with pytest.raises(ConfigError, match="needs --trust-code"):
            load_suite("mine.yaml", root)
        return load_suite("mine.yaml", root, trust_code=True)

    here, there = read(tmp_path / "here"), read(tmp_path / "there")
    assert [scorer.grade(here.tasks[0], "four") for scorer in here.scorers.values()] == [4]
    assert list(here.weights) == ["suites/own.py:length"]
    assert here.digest == there.digest


def test_the_code_belongs_to_the_digest(tmp_path: Path) -> None:
    before = suite_of(tmp_path, "own.py:length").digest
    assert suite_of(tmp_path, "own.py:length").digest == before
    assert suite_of(tmp_path, "own.py:length", LENGTH + "\n# other\n").digest != before


@pytest.mark.parametrize(
    ("scorer", "code", "message"),
    [
        ("own.py:breadth", LENGTH, "own.py has no 'breadth'"),
        ("nowhere.py:length", LENGTH, "nowhere.py is not there"),
        ("no_such_module:length", LENGTH, "No module named 'no_such_module'"),
        ("own.py:length", "1/0", "ZeroDivisionError"),
        ("own.py:length", "length = 3", "right is a function"),
        ("own.py:length", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("own.py:f", "def f(answer):\n    return 1", r"function of \(task, answer\).*too many pos"),
        ("own.py:F", "class F:\n    def __init__(self, x): ...", "missing 1 required"),
        ("own.py:f", "def f(task, answer): ...\nf.low = 'x'", "right is a function .*'x'"),
        ("own.py:f", "def f(task, answer): ...\nf.low = 1", "are 1 to 1; low must be below high"),
        ("own.py", LENGTH, "no scorer 'own.py'"),
    ],
)
def test_code_that_is_no_scorer_is_refused(
    tmp_path: Path, scorer: str, code: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(tmp_path, scorer, code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(task, answer):\n    return 2", "2 is not in 0 to 1"),
        ("def f(task, answer):\n    return '7'", "'7' is not in 0 to 1"),
        ("def f(task, answer):\n    return float('nan')", "nan is not in 0 to 1"),
        ("def f(task, answer):\n    raise KeyError('x')", "task 1: KeyError: 'x'"),
    ],
)
def test_a_function_that_fails_stops_the_run(tmp_path: Path, code: str, message: str) -> None:
    suite = suite_of(tmp_path, "own.py:f", code)
    with pytest.raises(RunError, match=message):
        suite.scorers["own.py:f"].grade(suite.tasks[0], "x")
