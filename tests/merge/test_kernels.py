"""The merge methods: against float64, and the compiled kernels against the eager ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomerge.merge import kernels
from evomerge.merge.kernels import merge_into

SHAPES = [(7,), (3, 5), (257, 300), (640, 512)]
# As a search draws them, and as people write them: with round decimals many exact sums are ties
# between two bfloat16 numbers.
DRAWN = {1: [0.6937183], 2: [1.2951159, -0.2629947], 3: [0.1047731, 0.2262349, 0.3158762]}
WRITTEN: list[list[float]] = [
    *([0.3], [0.1], [1.3], [1.1], [0.7], [0.05], [1 / 3], [0.6, 0.5], [0.7, 0.2], [0.2, 0.8]),
    *([1.3, -0.3], [-0.3, 0.9], [1 / 3, 2 / 3], [0.3, 0.3, 0.4], [1 / 3, 1 / 3, 1 / 3]),
]


def inputs(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=generator)
    moved = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *moved)]


def exact(method: str, tensors: list[Tensor], weights: list[float]) -> Tensor:
    wide = [tensor.double() for tensor in tensors]
    if method == "linear":
        return sum((w * x for w, x in zip(weights, wide, strict=True)), torch.zeros_like(wide[0]))
    base = wide[0]
    return base + sum(w * (x - base) for w, x in zip(weights, wide[1:], strict=True))


@pytest.mark.parametrize("weights", [*DRAWN.values(), *WRITTEN], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_bfloat16_results_are_the_exact_sum_rounded_once(method: str, weights: list[float]) -> None:
    number = len(weights) + (method == "task_arithmetic")
    tensors = inputs(number, (1000, 1000), torch.bfloat16)
    out = torch.empty_like(tensors[0])
    merge_into(out, method, tensors, weights)
    reference = exact(method, tensors, weights)
    wrong = out != reference.to(torch.bfloat16)
    assert wrong.double().mean() < 5e-5
    terms = torch.stack([tensor.abs() for tensor in tensors]).amax(0).double() * 2
    one_place = 2.0 ** (torch.floor(torch.log2(terms)) - 7)
    assert bool(((out.double() - reference).abs() <= one_place)[wrong].all())


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("weights", DRAWN.values(), ids=str)
def test_float64_is_computed_in_float64(method: str, weights: list[float]) -> None:
    number = len(weights) + (method == "task_arithmetic")
    tensors = inputs(number, (1000,), torch.float64)
    out = torch.empty_like(tensors[0])
    merge_into(out, method, tensors, weights)
    reference = exact(method, tensors, weights)
    assert ((out - reference).abs() <= 2e-15 * (1 + reference.abs())).all()


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.skipif(not kernels.can_compile(), reason="no C++ compiler here")
@pytest.mark.filterwarnings("default")
def test_compiled_kernels_give_the_bits_of_the_eager_ones(method: str, experts: int) -> None:
    number = experts + (method == "task_arithmetic")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            tensors = inputs(number, shape, dtype)
            eager, compiled = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
            merge_into(eager, method, tensors, DRAWN[experts])
            merge_into(compiled, method, tensors, DRAWN[experts], compiled=True)
            assert torch.equal(eager, compiled), (shape, dtype)


@pytest.mark.parametrize("columns", [slice(0, 256), slice(256, 512)])
def test_a_view_of_columns_is_filled_and_nothing_beside_it(columns: slice) -> None:
    tensors = inputs(2, (640, 512), torch.bfloat16)
    whole = torch.full((640, 512), 9.0, dtype=torch.bfloat16)
    merge_into(whole[:, columns], "task_arithmetic", [t[:, columns] for t in tensors], [0.7])
    alone = torch.empty(640, 512, dtype=torch.bfloat16)
    merge_into(alone, "task_arithmetic", tensors, [0.7])
    expected = torch.full_like(whole, 9.0)
    expected[:, columns] = alone[:, columns]
    assert torch.equal(whole, expected)


def test_pieces_of_a_chunk_are_put_together_without_gaps() -> None:
    size = 2 * kernels.CHUNK_ELEMENTS_CPU + 1
    tensors = inputs(2, (size,), torch.float32)
    out = torch.full((size,), float("nan"))
    merge_into(out, "task_arithmetic", tensors, [0.5])
    assert torch.equal(out, tensors[0] + 0.5 * (tensors[1] - tensors[0]))


def test_all_weights_zero_give_back_the_base() -> None:
    tensors = inputs(3, (100, 10), torch.bfloat16)
    out = torch.empty_like(tensors[0])
    merge_into(out, "task_arithmetic", tensors, [0.0, 0.0])
    assert torch.equal(out, tensors[0])


def test_passthrough_copies() -> None:
    tensors = inputs(1, (10, 10), torch.float32)
    out = torch.empty(10, 10, dtype=torch.bfloat16)
    merge_into(out, "passthrough", tensors, [])
    assert torch.equal(out, tensors[0].bfloat16())
