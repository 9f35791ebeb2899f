"""A search inside the real vLLM, killed and resumed, against an unbroken one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main

pytest.importorskip("vllm")
# vLLM and what it imports warn of their own deprecations.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("default")]

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"
UNITS = 7 + 8  # base, two experts, four uniform merges; then two generations of four


def write_study(folder: Path) -> Path:
    """The demo's models on a part of its tasks, as a short search, in `folder`."""
    content = yaml.safe_load((DEMO / "demo.yaml").read_text())
    content |= {
        "base_model": str(DEMO / content["base_model"]),
        "models": [str(DEMO / model) for model in content["models"]],
        "sampler": content["sampler"] | {"population": 4},
        "budget": {"trials": 8},
        "engine": content["engine"] | {"name": "vllm", "threads": 1},
    }
    lines = (DEMO / "tasks.jsonl").read_text().splitlines()
    (folder / "tasks.jsonl").write_text("\n".join(lines[::2]) + "\n")
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def search(study: Path, storage: Path) -> list[str]:
    return ["search", str(study), "--storage", str(storage)]


def killed_after(units: int, study: Path, storage: Path) -> None:
    """Runs the search until so many units are told on stderr, then SIGKILL."""
    command = [sys.executable, "-m", "evomerge", *search(study, storage)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        done = 0
        for line in process.stderr:
            done += " answers " in line
            if done == units:
                break
        process.kill()


def outcome(storage: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[Any], bytes]:
    """(every trial's genome and score, the bytes of the best recipe)."""
    capsys.readouterr()
    assert main(["status", "demo", "--storage", str(storage), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "finished"
    trials = [(trial["genome"], trial["score"]) for trial in status["trials"]]
    return trials, Path(status["best"]["config"]).read_bytes()


def test_a_search_in_vllm_that_was_killed_ends_as_an_unbroken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path)
    assert main(search(study, tmp_path / "unbroken")) == 0
    killed_after(random.randint(1, UNITS - 1), study, tmp_path / "broken")
    resume = [sys.executable, "-m", "evomerge", *search(study, tmp_path / "broken")]
    subprocess.run(resume, check=True, capture_output=True)
    unbroken, broken = (outcome(tmp_path / name, capsys) for name in ("unbroken", "broken"))
    assert broken == unbroken
    assert len({score for _, score in unbroken[0]}) > 1
