"""Mutated recipes: each becomes a model or one clear error, never a traceback or a leftover.

500 of them by default; EVOMERGE_FUZZ=10000 runs as many as it says. A failure prints the number of
the recipe and its file: `mutations.mutated(number)` makes it again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.inputs import InputModels
from evomerge.recipe import read_recipe
from evomerge.report.export import merge_recipe
from tests.golden.inputs import write_inputs
from tests.merge import mutations

COUNT = int(os.environ.get("EVOMERGE_FUZZ", "500"))
BATCH = 100
SECONDS = 5
LONGEST_LINE = 2_000


class TooSlowError(Exception):
    """A recipe took longer than SECONDS."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> InputModels:
    """The models that recipes name, and a hub that does not answer."""
    folder = tmp_path_factory.mktemp("models")
    write_inputs(folder)
    storage = tmp_path_factory.mktemp("storage")
    return InputModels(storage, folder=folder, hub_seconds=0.01)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise TooSlowError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(content: bytes, inputs: InputModels, folder: Path, *, lenient: bool) -> str | None:
    """What is said of a recipe; None where it becomes a model. All other errors pass through."""
    file, out = folder / "recipe.yaml", folder / "out"
    file.write_bytes(content)
    try:
        with within(SECONDS):
            recipe = read_recipe(file, lenient=lenient, say=lambda line: None)
            merge_recipe(recipe, out, inputs, verbatim=file.read_text(encoding="utf-8"))
    except (ConfigError, CandidateError) as error:
        return str(error)
    shutil.rmtree(out)
    return None


@pytest.mark.parametrize("first", range(0, COUNT, BATCH))
def test_a_mutated_recipe_is_merged_or_refused(
    first: int, inputs: InputModels, tmp_path: Path
) -> None:
    for case in range(first, min(first + BATCH, COUNT)):
        content = mutations.mutated(case)
        try:
            said = outcome(content, inputs, tmp_path, lenient=case % 5 == 0)
        except Exception as error:
            pytest.fail(f"recipe {case}: {type(error).__name__}: {error}\n{content!r}")
        left = [path.name for path in tmp_path.iterdir() if path.name != "recipe.yaml"]
        assert left == [], f"recipe {case}"
        if said is not None:
            longest = max(map(len, said.encode().splitlines()), default=0)
            assert 0 < longest <= LONGEST_LINE, f"recipe {case}: {said}"


def test_the_recipes_that_are_mutated_are_right(inputs: InputModels, tmp_path: Path) -> None:
    for recipe in mutations.seeds():
        said = outcome(mutations.written(recipe), inputs, tmp_path, lenient=False)
        assert said is None, f"{recipe}: {said}"


def test_the_command_line_says_it_in_a_line_and_leaves_nothing(
    inputs: InputModels, tmp_path: Path
) -> None:
    refused = [
        content
        for content in map(mutations.mutated, range(60))
        if outcome(content, inputs, tmp_path, lenient=False) is not None
    ]
    work = tmp_path / "work"
    work.mkdir()
    for content in refused[: max(6, min(20, COUNT // 500))]:
        (tmp_path / "recipe.yaml").write_bytes(content)
        ran = subprocess.run(
            [sys.executable, "-m", "evomerge", "merge", str(tmp_path / "recipe.yaml"), "out"],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert ran.returncode == 2, (content, ran)
        assert "Traceback" not in ran.stderr, (content, ran.stderr)
        assert str(tmp_path / "recipe.yaml") in ran.stderr.replace("\n", ""), ran.stderr
        assert ran.stdout == ""
        assert list(work.iterdir()) == []
