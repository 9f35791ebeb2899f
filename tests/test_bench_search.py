"""What `scripts/bench_search.py` measures with: its landscapes, its peers, its report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_search

    return bench_search


@pytest.mark.parametrize("kind", ["hill", "rugged", "border", "noisy"])
def test_the_truth_of_a_landscape_is_what_many_grades_come_to(bench: ModuleType, kind: str) -> None:
    landscape = bench.Landscape(bench.KINDS[kind], 10, 50, seed=3)
    weights = np.array([np.full(10, 0.5), landscape.best])
    random = np.random.RandomState(0)
    grades = np.array([landscape.grades(weights, range(50), random) for _ in range(400)])
    assert set(np.unique(grades)) == {1, 2, 3, 4, 5}
    # 400 × 50 grades of standard deviation under 1: to 0.007 at one standard error.
    assert grades.mean(axis=(0, 2)) == pytest.approx(landscape.truth(weights), abs=0.03)
    assert landscape.truth(weights)[1] > landscape.truth(weights)[0] + 0.2


def test_weights_beyond_the_bounds_are_graded_as_those_at_the_bounds(bench: ModuleType) -> None:
    landscape = bench.Landscape(bench.KINDS["border"], 4, 20, seed=0)
    inside, beyond = np.full(4, bench.HIGH), np.full(4, bench.HIGH + 3)
    assert landscape.truth(inside).tolist() == landscape.truth(beyond).tolist()


@pytest.mark.parametrize("way", ["ours", "plain", "tpe"])
def test_a_search_of_the_benchmark_is_a_function_of_its_job(bench: ModuleType, way: str) -> None:
    job = bench.Job(way, "hill", 5, seed=1, budget=1600, tasks=40)
    first, again = bench.run(job), bench.run(job)
    assert first.truth == again.truth
    assert first.spent <= job.budget
    landscape = bench.Landscape(bench.KINDS["hill"], 5, 40, seed=1)
    assert (
        landscape.truth(np.full(5, -0.5))[0]
        < first.truth
        < landscape.truth(landscape.best)[0] + 0.1
    )


def test_the_report_names_what_it_measured_and_its_bar() -> None:
    told = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_search.py"), "--quick", "--only", "overhead"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    ).stdout
    row = next(line for line in told.splitlines() if line.startswith("| processor"))
    # Not the clock: other programs have no say in the processor's time.
    assert 0 < float(row.split("|")[2].removesuffix(" ms ")) < 5
    assert "| wall clock | **" in told
    assert "| < 5 ms |" in told
