"""Source tensors by part, and the bound that spares reading a merge's result."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from evomerge.engine.residency import Residency, View, memory_budget
from evomerge.errors import ConfigError
from tests import tiny

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def residency(tmp_path: Path) -> Residency:
    base = tiny.llama(tmp_path / "base", layers=2)
    return Residency.open([str(base)], torch.device("cpu"))


def test_a_part_is_that_part_of_the_tensor_in_the_file(residency: Residency) -> None:
    (model,) = residency.checkpoints
    whole = tiny.read_tensors(Path(model))[NAME]
    rows, columns = whole.shape
    right_half = View((rows, columns // 2), (columns, 1), columns // 2)
    assert torch.equal(residency.part(model, NAME, right_half), whole[:, columns // 2 :])
    largest = float(whole[:, columns // 2 :].abs().max())
    assert residency.largest(model, NAME, right_half) == largest


def test_the_largest_of_a_part_with_a_nan_is_a_nan(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", layers=2)
    tiny.rewrite(base, lambda tensors: tensors[NAME][0, 0].fill_(float("nan")))
    residency = Residency.open([str(base)], torch.device("cpu"))
    shape = residency.checkpoint(str(base)).tensors[NAME].shape
    whole = View(tuple(shape), (shape[1], 1), 0)
    assert math.isnan(residency.largest(str(base), NAME, whole))


def test_what_was_not_declared_is_not_opened(residency: Residency, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", layers=2)
    with pytest.raises(ConfigError, match="no declared source"):
        residency.checkpoint(str(other))


def test_a_cpu_has_no_budget_of_its_own() -> None:
    assert memory_budget(torch.device("cpu")) == (0, 0)
