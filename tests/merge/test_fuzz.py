"""Mutated recipes and mixtures: a model or one clear error, never a traceback or a leftover.

500 of them by default; EVOMERGE_FUZZ=10000 runs as many as it says. A failure prints the number of
the recipe and its file: `mutations.mutated(number, mutations.seeds())` makes it again.
"""

from __future__ import annotations

import json
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
import yaml
from transformers import AutoTokenizer

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.inputs import InputModels
from evomerge.merge.plan import make_plan, open_checkpoints
from evomerge.moe_config import read_moe_config
from evomerge.recipe import parse_recipe, read_recipe
from evomerge.report.export import merge_recipe
from evomerge.report.moe import build_moe
from tests.golden.moe_cases import write_moe_inputs
from tests.merge import decoders, mutations

COUNT = int(os.environ.get("EVOMERGE_FUZZ", "500"))
BATCH = 100
SECONDS = 5
LONGEST_LINE = 2_000


class TooSlow(BaseException):
    """A recipe took longer than SECONDS."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> InputModels:
    """The models that recipes name, and a hub that does not answer."""
    folder = tmp_path_factory.mktemp("models")
    write_moe_inputs(folder)
    AutoTokenizer.from_pretrained(folder / "base")  # imports much, which is no recipe's fault
    storage = tmp_path_factory.mktemp("storage")
    return InputModels(storage, folder=folder, hub_seconds=0.01)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise TooSlow(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def merge_file(file: Path, out: Path, inputs: InputModels, *, lenient: bool) -> None:
    recipe = read_recipe(file, lenient=lenient, say=lambda line: None)
    merge_recipe(recipe, out, inputs, verbatim=file.read_text(encoding="utf-8"))


def build_file(file: Path, out: Path, inputs: InputModels, *, lenient: bool) -> None:
    config = read_moe_config(file, lenient=lenient, say=lambda line: None)
    build_moe(config, out, inputs, verbatim=file.read_text(encoding="utf-8"))


MAKE = {"recipe": (mutations.seeds, merge_file), "mixture": (mutations.mixtures, build_file)}
CASES = [
    *(("recipe", first, min(first + BATCH, COUNT)) for first in range(0, COUNT, BATCH)),
    ("mixture", 0, COUNT // 10),
]


def outcome(
    kind: str, content: bytes, inputs: InputModels, folder: Path, *, lenient: bool = False
) -> str | None:
    """What is said of a file; None where it becomes a model. All other errors pass through."""
    file, out = folder / "file.yaml", folder / "out"
    file.write_bytes(content)
    _, make = MAKE[kind]
    try:
        with within(SECONDS):
            make(file, out, inputs, lenient=lenient)
    except (ConfigError, CandidateError) as error:
        return str(error)
    shutil.rmtree(out)
    return None


@pytest.mark.parametrize(("kind", "first", "stop"), CASES)
def test_a_mutated_file_is_merged_or_refused(
    kind: str, first: int, stop: int, inputs: InputModels, tmp_path: Path
) -> None:
    corpus = MAKE[kind][0]()
    for case in range(first, stop):
        content = mutations.mutated(case, corpus)
        try:
            said = outcome(kind, content, inputs, tmp_path, lenient=case % 5 == 0)
        except (Exception, TooSlow) as error:
            pytest.fail(f"{kind} {case}: {type(error).__name__}: {error}\n{content!r}")
        left = [path.name for path in tmp_path.iterdir() if path.name != "file.yaml"]
        assert left == [], f"{kind} {case}"
        if said is not None:
            longest = max(map(len, said.encode().splitlines()), default=0)
            assert 0 < longest <= LONGEST_LINE, f"{kind} {case}: {said}"


@pytest.mark.parametrize("kind", MAKE)
def test_the_files_that_are_mutated_are_right(
    kind: str, inputs: InputModels, tmp_path: Path
) -> None:
    for recipe in MAKE[kind][0]():
        said = outcome(kind, mutations.written(recipe), inputs, tmp_path)
        assert said is None, f"{recipe}: {said}"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neo", "deepseek_v3", "smollm3"])
def test_a_mutated_config_json_is_planned_with_or_refused(model_type: str, tmp_path: Path) -> None:
    base = decoders.write(tmp_path / "base", model_type)
    config = decoders.config_of(base)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(base / "model.safetensors")
    ranges = [(base, [0, 2]), (tmp_path / "other", [1, 4])]
    recipe = parse_recipe(
        "merge_method: passthrough\nslices:\n"
        + "".join(f"- sources: [{{model: {m}, layer_range: {r}}}]\n" for m, r in ranges),
        "recipe",
    )
    for case in range(COUNT // 10):
        content = mutations.mutated(case, [config])
        try:
            changed = yaml.safe_load(content)
            (tmp_path / "other" / "config.json").write_text(json.dumps(changed))
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        try:
            with within(SECONDS):
                make_plan(recipe, open_checkpoints(recipe))
        except ConfigError:
            pass
        except (Exception, TooSlow) as error:
            pytest.fail(f"{model_type} {case}: {type(error).__name__}: {error}\n{changed}")


@pytest.mark.slow
def test_the_command_line_says_it_in_a_line_and_leaves_nothing(
    inputs: InputModels, tmp_path: Path
) -> None:
    refused = [
        content
        for content in (mutations.mutated(case, mutations.seeds()) for case in range(60))
        if outcome("recipe", content, inputs, tmp_path) is not None
    ]
    work = tmp_path / "work"
    work.mkdir()
    for content in refused[: max(6, min(20, COUNT // 500))]:
        (tmp_path / "file.yaml").write_bytes(content)
        ran = subprocess.run(
            [sys.executable, "-m", "evomerge", "merge", str(tmp_path / "file.yaml"), "out"],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert ran.returncode == 2, (content, ran)
        assert "Traceback" not in ran.stderr, (content, ran.stderr)
        assert str(tmp_path / "file.yaml") in ran.stderr.replace("\n", ""), ran.stderr
        assert ran.stdout == ""
        assert list(work.iterdir()) == []
