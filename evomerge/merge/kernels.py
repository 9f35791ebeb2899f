"""Runs a merge method over a tensor: compiled where a C++ compiler is present, else in chunks.

Both ways give the same bits (tests/merge/test_kernels.py); compiled it takes about the memory
traffic's own time, in chunks of a cache's size 4 to 6 times that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merge.methods import METHODS


def merge_into(out: Tensor, method: str, inputs: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Fills `out` with `method` over `inputs`, computed in float32 and rounded once.

    `out` may be a view into a larger parameter; `inputs` have its shape, on its device.
    `weights` are rounded to float32 before anything is computed.
    """
    METHODS[method](out, inputs, torch.tensor(weights, dtype=torch.float32, device=out.device))
