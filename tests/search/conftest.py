"""Models and study files for the searches of these tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.search.study import StudyConfig, read_study
from tests import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two experts of 4 layers."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.llama(folder / "base", layers=4, hidden=64)
    tiny.variant(base, folder / "left", seed=1)
    tiny.variant(base, folder / "right", seed=2)
    return folder


@pytest.fixture
def study_file(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file with other values for some keys, and gives its path."""

    def write(name: str = "study.yaml", tasks: int = 10, **changes: Any) -> Path:
        rows = [{"id": str(number), "input": "?", "output": "!"} for number in range(tasks)]
        (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        study = {
            "study": "formula",
            "base_model": str(models / "base"),
            "models": [str(models / "left"), str(models / "right")],
            "search_space": {"layer_granularity": 2},
            "sampler": {"population": 6, "seed": 3},
            "budget": {"trials": 24},
            "suite": {"scorer": "exact", "data": "tasks.jsonl"},
            "engine": {"name": "transformers"},
            "holdout": 0.3,
            "sweep": False,
            "selection": {"attempts": 0},
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**study, **changes}))
        return path

    return write


@pytest.fixture
def study(study_file: Callable[..., Path]) -> Callable[..., StudyConfig]:
    """A study as read from a file with other values for some keys."""
    return lambda **changes: read_study(str(study_file(**changes)))


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL server of the tests' own."""
    pgserver = pytest.importorskip("pgserver")
    pytest.importorskip("psycopg")
    server = _started(pgserver, tmp_path_factory)
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


def _started(pgserver: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server in a folder of its own; pgserver gives up after 10 s, which a busy machine needs."""
    for left in (2, 1, 0):
        try:
            return pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
        except subprocess.SubprocessError:
            if not left:
                raise
    raise AssertionError
