"""The real tasks, answers and scores beside the repository, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """The file or folder `shared/data/NAME` beside the repository; the test is skipped without."""
    for folder in Path(__file__).resolve().parents:
        if (found := folder / "shared" / "data" / name).exists():
            return found
    pytest.skip(f"shared/data/{name} is not here")
