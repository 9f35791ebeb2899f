"""The types of numbers that are known without torch are torch's, and those of safetensors."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch

from evomerge.merge.checkpoint import read_tensor_file
from evomerge.merge.dtypes import BY_CODE, MERGED, DType, dtype_of, widest


@pytest.mark.parametrize("dtype", BY_CODE.values(), ids=str)
def test_a_type_is_the_one_that_torch_and_safetensors_call_so(dtype: DType, tmp_path: Path) -> None:
    assert (dtype.torch.itemsize, dtype.torch.is_floating_point) == (
        dtype.itemsize,
        dtype.is_floating_point,
    )
    assert dtype_of(dtype.torch) == dtype_of(dtype.name) == dtype_of(f"torch.{dtype}") == dtype
    file = tmp_path / "one.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3, dtype=dtype.torch)}, file)
    assert f'"dtype":"{dtype.code}"'.encode() in file.read_bytes()
    assert read_tensor_file(file)["x"].dtype == dtype.torch


def test_the_widest_of_two_types_is_what_torch_promotes_them_to() -> None:
    for one, other in itertools.product(MERGED, repeat=2):
        promoted = torch.promote_types(one.torch, other.torch)
        assert widest([one, other]).torch == promoted, (one, other)
