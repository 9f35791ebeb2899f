"""What a merge method returns, and the methods that do not look at the tensors.

Numbers alone, without torch: a plan of these methods is made, and their merges are run by the
native kernel, in less time than it takes to import torch. The other methods are in `methods.py`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

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
    numbers, which the caller hands to the kernel in two words each (`split_weight`).
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


def split_weight(weight: float) -> tuple[float, float]:
    """A float64 number as two, of 8 and of all further bits; their sum is the number.

    A product with the first is exact in float32 for inputs of up to 16 bits, and one with the
    second is off by 2^-33 of the whole; so a weight such as 1.3 reaches a tie between two bfloat16
    numbers exactly where the decimal does. With float32(1.3) up to 1 output in 50 falls to the
    wrong side.
    """
    single = ctypes.c_float(weight)  # infinite where struct.pack would raise
    bits = ctypes.c_uint32.from_buffer(single)
    bits.value &= 0xFFFF0000
    return single.value, weight - single.value


METHODS: dict[str, Callable[..., Blend | Pieces]] = {}
MethodFunction = TypeVar("MethodFunction", bound=Callable[..., Blend | Pieces])


def merge_method(function: MethodFunction) -> MethodFunction:
    """Enters a method into METHODS under the function's name.

    It is called with the base (None without one), the other inputs, at least one, all of one shape,
    and by keyword the numbers of its row in `merge_rules.py`: own ones as tuples with one number
    per input, `lambda` as `lambda_`; further with `recall`, and with `seed` if it is random.
    """
    METHODS[function.__name__] = function
    return function


def normalized(weight: Sequence[float]) -> tuple[float, ...]:
    """The weights over their sum; ValueError where that is below 1e-8."""
    total = math.fsum(weight)
    if not abs(total) >= _SMALLEST_SUM:
        raise ValueError(f"weights that sum to {total} cannot be normalised")
    return tuple(one / total for one in weight)


def scaled(weight: Sequence[float], lambda_: float, normalize: bool) -> tuple[float, ...]:
    """The weights times lambda, over their sum if `normalize` (over 1 if that is below 1e-8)."""
    total = math.fsum(weight) if normalize else 1.0
    scale = lambda_ / (total if abs(total) >= _SMALLEST_SUM else 1.0)
    return tuple(one * scale for one in weight)


@merge_method
def linear(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    normalize: bool,
    recall: Recall,
) -> Blend:
    """Σᵢ wᵢ·xᵢ, divided by Σᵢ wᵢ if `normalize`.

    Raises ValueError for weights to normalise whose sum is nearer to 0 than 1e-8, where mergekit
    makes infinities.
    Source: Wortsman et al. 2022 (model soups), arXiv:2203.05482, §2.
    """
    del base, inputs, recall
    return Blend("linear", normalized(weight) if normalize else tuple(weight))


@merge_method
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
    return Blend("task_arithmetic", scaled(weight, lambda_, normalize))


@merge_method
def passthrough(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    scale: Sequence[float | None],
    recall: Recall,
) -> Blend:
    """scale·x, of the one input; without a scale (None, or 1) x itself."""
    del base, inputs, recall
    (factor,) = scale
    if factor is None or factor == 1.0:
        return Blend("passthrough")
    return Blend("linear", (factor,))
