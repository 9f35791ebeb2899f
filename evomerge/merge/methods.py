"""The maths of merging: tensors in, one tensor out.

Every method is one function of the tensors and of the numbers of its row in `merge_rules.py`. It
returns what is left to do per element: a `Blend` of the inputs, or `Pieces` of the output. All are
computed in float32 (float64 tensors in float64) and rounded once, into `out`. The order of the
operations is part of the contract: the compiled kernels (`kernels.py`) run these very functions,
and the merge in the live engine must equal the one on disk to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Kernel = Callable[[Tensor, Sequence[Tensor], Tensor], None]


# As mergekit: a smaller sum of weights is no divisor.
_SMALLEST_SUM = 1e-8


class Recall(Protocol):
    """`recall(key, compute)`: compute(), or what it gave before for the same key and inputs.

    Statistics of the inputs alone are handed through it, so that a search computes them once per
    study. A key holds every number that the statistic depends on.
    """

    def __call__(self, key: Hashable, compute: Callable[[], T], /) -> T: ...


@dataclass(frozen=True)
class Blend:
    """What is left is the element-wise `kernel` over the inputs.

    "linear": one weight for each of [base, if there is one, *inputs]; "task_arithmetic": one for
    each of `inputs`, all measured against the base; "passthrough": none. The weights are float64
    numbers, which the caller hands to the kernel as `weight_words`.
    """

    kernel: Literal["linear", "task_arithmetic", "passthrough"]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """The output, any part of it at a time.

    `fill(out, start, stop)` computes the elements [start, stop) of the flattened output into the
    vector `out`, rounding once; start and stop are multiples of `step` (stop may be the end). The
    bits do not depend on how the output is cut, and pieces may be filled by several threads at
    once.
    """

    fill: Callable[[Tensor, int, int], None]
    step: int = 1


def recall_nothing(_key: Hashable, compute: Callable[[], T], /) -> T:
    """A `Recall` for one tensor merged once."""
    return compute()


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What a merge of these tensors (inputs and output) is computed in: float64 for any float64."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def weight_words(weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Each weight as two numbers, of 8 and of all further bits: `dtype` of shape (2, k).

    A product with the first is exact for inputs of up to 16 bits, and one with the second is off by
    2^-33 of the whole; so a weight such as 1.3 reaches a tie between two bfloat16 numbers exactly
    where the decimal does. With float32(1.3) up to 1 output in 50 falls to the wrong side.
    """
    whole = np.array(weights, dtype=np.float64)
    first = (whole.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return torch.from_numpy(np.stack([first, whole - first])).to(dtype)


def task_arithmetic_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = base + Σᵢ weightᵢ · (tunedᵢ − base), with inputs = [base, tuned₁, …, tunedₖ].

    All inputs have the shape of `out`, any floating dtype; `weights` are `weight_words`, in whose
    dtype it computes.
    """
    # Differences first: 1 parameter in 100,000 differs from the exact sum rounded once. The same
    # loop in bfloat16: 1 in 49; adding each difference to `base` in bfloat16: 1 in 3.
    base = inputs[0].to(weights.dtype)
    delta = inputs[1].to(weights.dtype) - base
    high, low = weights[0, 0] * delta, weights[1, 0] * delta
    for index, tuned in enumerate(inputs[2:], start=1):
        delta = tuned.to(weights.dtype) - base
        high = high + weights[0, index] * delta
        low = low + weights[1, index] * delta
    out.copy_(base + (high + low))


def linear_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = Σᵢ weightᵢ · inputᵢ; whoever wants an average hands in weights that sum to 1.

    All inputs have the shape of `out`, any floating dtype; `weights` are `weight_words`, in whose
    dtype it computes.
    """
    tensor = inputs[0].to(weights.dtype)
    high, low = weights[0, 0] * tensor, weights[1, 0] * tensor
    for index, more in enumerate(inputs[1:], start=1):
        tensor = more.to(weights.dtype)
        high = high + weights[0, index] * tensor
        low = low + weights[1, index] * tensor
    out.copy_(high + low)


def passthrough_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = input, in `out`'s dtype; `weights` is empty and not read."""
    del weights
    out.copy_(inputs[0])


KERNELS: dict[str, Kernel] = {
    "linear": linear_kernel,
    "passthrough": passthrough_kernel,
    "task_arithmetic": task_arithmetic_kernel,
}


def linear(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    normalize: bool,
    recall: Recall,
) -> Blend:
    """Σᵢ wᵢ·xᵢ, divided by Σᵢ wᵢ if `normalize`.

    Raises ValueError for weights to normalise whose sum is nearer to 0 than 1e-8; mergekit divides.
    Source: Wortsman et al. 2022 (model soups), arXiv:2203.05482, §2.
    """
    del base, inputs, recall
    if not normalize:
        return Blend("linear", tuple(weight))
    total = math.fsum(weight)
    if not abs(total) >= _SMALLEST_SUM:
        raise ValueError(f"weights that sum to {total} cannot be normalised")
    return Blend("linear", tuple(one / total for one in weight))


def task_arithmetic(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    recall: Recall,
) -> Blend:
    """b + λ·Σᵢ wᵢ·(xᵢ − b), the sum divided by Σᵢ wᵢ if `normalize` (by 1 if that is below 1e-8).

    Source: Ilharco et al. 2023, arXiv:2212.04089, §2.
    """
    del base, inputs, recall
    total = math.fsum(weight) if normalize else 1.0
    scale = lambda_ / (total if abs(total) >= _SMALLEST_SUM else 1.0)
    return Blend("task_arithmetic", tuple(one * scale for one in weight))


def passthrough(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    scale: Sequence[float | None],
    recall: Recall,
) -> Blend:
    """scale·x, with one input; without a scale (None, or 1) x itself."""
    del base, inputs, recall
    (factor,) = scale
    if factor is None or factor == 1.0:
        return Blend("passthrough")
    return Blend("linear", (factor,))


METHODS: dict[str, Callable[..., Blend | Pieces]] = {
    one.__name__: one for one in (linear, passthrough, task_arithmetic)
}


def has_overflow(tensor: Tensor) -> bool:
    """Whether a NaN or an infinity is among the numbers of `tensor`."""
    if tensor.numel() == 0:
        return False
    low, high = torch.aminmax(tensor)  # 20 times as fast as isfinite, and NaN comes through
    return not bool(torch.isfinite(low) & torch.isfinite(high))
