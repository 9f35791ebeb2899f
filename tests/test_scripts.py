"""The scripts: that they run, and that a job near its time limit goes back into the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "scripts" / "slurm_search.sh"

# A search that runs until it is interrupted, as `evomerge search` does.
SEARCH = """#!{python}
import pathlib, sys, time
pathlib.Path("asked").write_text(" ".join(sys.argv[1:]))
try:
    time.sleep({seconds})
except KeyboardInterrupt:
    sys.exit(130)
"""


# `kill -0`, asked whether the search is there: with ended_at 1 it has ended before it is asked,
# with 2 right after a signal has interrupted the wait for it.
SLOW_TO_LOOK = """
asked=0
kill() {{
    [ "$1" = -0 ] || {{ builtin kill "$@"; return; }}
    asked=$((asked + 1))
    [ "$asked" -lt {ended_at} ] && return 0
    while builtin kill -0 "$2" 2>/dev/null; do sleep 0.05; done
    return 1
}}
"""


def slurm_job(folder: Path, seconds: float, ended_at: int | None = None) -> subprocess.Popen[str]:
    """The job script with a stand-in for the search and Slurm's own command beside it."""
    commands = {
        "search": SEARCH.format(python=sys.executable, seconds=seconds),
        "scontrol": '#!/bin/sh\necho "$@" > requeued\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "EVOMERGE": str(folder / "search"),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
    }
    if ended_at is not None:
        (folder / "slow").write_text(SLOW_TO_LOOK.format(ended_at=ended_at))
        environment["BASH_ENV"] = str(folder / "slow")
    return subprocess.Popen(
        ["bash", str(SLURM), "study.yaml", "--trials", "9"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)
    return path.read_text()


def test_a_job_near_its_time_limit_is_interrupted_and_requeued(tmp_path: Path) -> None:
    with slurm_job(tmp_path, seconds=60) as job:
        assert wait_for(tmp_path / "asked") == "search study.yaml --trials 9"
        job.send_signal(signal.SIGUSR1)
        told = job.communicate()[1]
    assert job.returncode == 130
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert "putting job 17 back into the queue" in told


def test_a_preempted_job_is_interrupted_and_left_to_slurm(tmp_path: Path) -> None:
    with slurm_job(tmp_path, seconds=60) as job:
        wait_for(tmp_path / "asked")
        job.send_signal(signal.SIGTERM)
        job.communicate()
    assert job.returncode == 130
    assert not (tmp_path / "requeued").exists()


def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path: Path) -> None:
    with slurm_job(tmp_path, seconds=0) as job:
        job.communicate()
    assert job.returncode == 0
    assert not (tmp_path / "requeued").exists()


def test_a_job_whose_search_is_over_at_once_ends_as_the_search_does(tmp_path: Path) -> None:
    with slurm_job(tmp_path, seconds=0, ended_at=1) as job:
        told = job.communicate()[1]
    assert (job.returncode, told) == (0, "")


def test_a_job_whose_search_ends_at_the_signal_is_requeued(tmp_path: Path) -> None:
    with slurm_job(tmp_path, seconds=60, ended_at=2) as job:
        wait_for(tmp_path / "asked")
        job.send_signal(signal.SIGUSR1)
        job.communicate()
    assert job.returncode == 130
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("script", [SLURM, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.slow
def test_the_benchmark_of_merges_reports_every_bar(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "bench_merge.py"
    command = [sys.executable, str(script), "--shape", "tiny", "--repeats", "1"]
    told = subprocess.run(
        [*command, "--methods", "task_arithmetic", "slerp", "--directory", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout
    rows = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("|")}
    assert {"floor", "task_arithmetic", "slerp", "evomerge process"} <= set(rows)
    assert "5 files each" in told
    assert told.count("≤ 1.5, aim 1.25") == 1
    assert told.count("≤ 1 GB") == 1
    assert not (tmp_path / "scratch").exists()
