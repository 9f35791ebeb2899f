"""The maths of merging: tensors in, one tensor out.

Every function computes in float32 and rounds once, into `out`. The order of the operations is part
of the contract: the compiled kernels (`kernels.py`) run these very functions, and the merge in the
live engine must equal the one on disk to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Method = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def task_arithmetic(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = base + Σᵢ weightᵢ · (tunedᵢ − base), with inputs = [base, tuned₁, …, tunedₖ].

    All inputs have the shape of `out`, any floating dtype; `weights` is float32 of shape (k,) and
    need not sum to 1 (all 0 gives back the base).

    Source: Ilharco et al. 2023, arXiv:2212.04089, §2.
    """
    # In float32, deltas first: 1 parameter in 10,000 to 55,000 differs from the exact sum rounded
    # once. The same loop in bfloat16: 1 in 49; adding each delta to `base` in bfloat16: 1 in 3.
    base = inputs[0].float()
    delta = weights[0] * (inputs[1].float() - base)
    for index, tuned in enumerate(inputs[2:], start=1):
        delta = delta + weights[index] * (tuned.float() - base)
    out.copy_(base + delta)


def linear(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = Σᵢ weightᵢ · inputᵢ; whoever wants an average hands in weights that sum to 1.

    All inputs have the shape of `out`, any floating dtype; `weights` is float32 of shape (k,).
    Source: Wortsman et al. 2022 (model soups), arXiv:2203.05482, §2.
    """
    total = weights[0] * inputs[0].float()
    for index, tensor in enumerate(inputs[1:], start=1):
        total = total + weights[index] * tensor.float()
    out.copy_(total)


def passthrough(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = input, in `out`'s dtype; `weights` is empty and not read."""
    del weights
    out.copy_(inputs[0])


METHODS: dict[str, Method] = {
    "linear": linear,
    "passthrough": passthrough,
    "task_arithmetic": task_arithmetic,
}


def has_overflow(tensor: Tensor) -> bool:
    """Whether a NaN or an infinity is among the numbers of `tensor`."""
    if tensor.numel() == 0:
        return False
    low, high = torch.aminmax(tensor)  # 20 times as fast as isfinite, and NaN comes through
    return not bool(torch.isfinite(low) & torch.isfinite(high))
