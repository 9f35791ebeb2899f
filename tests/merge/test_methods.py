"""Every merge method: known results, float64, and what must hold for all of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from evomerge import merge_rules
from evomerge.merge import methods
from evomerge.merge.kernels import merge_into
from evomerge.merge.methods import METHODS, Blend, recall_nothing
from tests.merge import float64_methods

T = TypeVar("T")


def numbers_of(name: str, count: int, given: dict[str, Any]) -> dict[str, Any]:
    """The given numbers and the defaults of the rest, by the function's keywords."""
    numbers: dict[str, Any] = {}
    for parameter in merge_rules.METHODS[name].parameters:
        value = given.get(parameter.name, parameter.default)
        if parameter.own:
            value = tuple(value) if isinstance(value, list) else (value,) * count
        numbers["lambda_" if parameter.name == "lambda" else parameter.name] = value
    assert given.keys() <= {one.name for one in merge_rules.METHODS[name].parameters} | {"seed"}
    if merge_rules.METHODS[name].random:
        numbers["seed"] = given.get("seed", 0)
    return numbers


def merged(
    name: str,
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    cuts: Sequence[int] = (),
    recall: methods.Recall = recall_nothing,
    **given: Any,
) -> Tensor:
    """What the method makes of the tensors; Pieces are filled between the cuts, last one first."""
    rest = METHODS[name](base, inputs, recall=recall, **numbers_of(name, len(inputs), given))
    out = torch.full(inputs[0].shape, float("nan"), dtype=dtype or inputs[0].dtype)
    if isinstance(rest, Blend):
        with_base = base is not None and rest.kernel != "passthrough"
        merge_into(out, rest.kernel, [*([base] if with_base else []), *inputs], rest.weights)
        return out
    flat = out.view(-1)
    places = [0, *(cut // rest.step * rest.step for cut in cuts), flat.numel()]
    for start, stop in reversed(list(itertools.pairwise(places))):
        rest.fill(flat[start:stop], start, stop)
    return out


B = torch.arange(4.0) / 100
E1, E2, E3 = (
    torch.tensor(numbers)
    for numbers in ([0.10, -0.05, 0.02, 0.20], [0.04, 0.06, -0.08, 0.10], [-0.06, 0.03, 0.12, -0.1])
)

# Full merges of mergekit 0.1.5 in float32, over 2×2 matrices: name, base, inputs, numbers, result.
KNOWN: list[tuple[str, Tensor | None, list[Tensor], dict[str, Any], list[float]]] = [
    ("linear", None, [E1, E2], {"weight": [0.25, 0.5]}, [0.06, 0.0233333, -0.0466667, 0.1333333]),
    (
        *("task_arithmetic", B, [E1, E2], {"weight": [0.6, 0.5], "lambda": 0.5}),
        [0.04, 0.0045, -0.005, 0.0985],
    ),
    (
        *("ties", B, [E1, E2, E3], {"weight": [0.6, 0.5, 0.4], "density": 0.5}),
        [0.1, 0.01, -0.08, 0.15454546],
    ),
    (
        *("ties", B, [E1, E2, E3]),
        {"weight": [0.6, 0.5, 0.4], "density": 0.75, "normalize": False},
        [0.06, -0.026, -0.03, 0.167],
    ),
    (
        *("breadcrumbs", B, [E1, E2], {"weight": [1.0, 0.5], "density": 0.5, "gamma": 0.25}),
        [0.1, -0.025, 0.02, 0.065],
    ),
    ("slerp", B, [E1], {"t": 0.25}, [0.027807791, -0.0060174018, 0.021334546, 0.079275064]),
    (
        *("nuslerp", None, [E1, E2], {"weight": [1.0, 3.0]}),
        [0.061206691, 0.033785544, -0.058586441, 0.13851061],
    ),
    (
        *("nuslerp", B, [E1, E2], {"weight": [1.0, 3.0], "nuslerp_flatten": False}),
        [0.071012922, 0.033157058, -0.060492996, 0.13567466],
    ),
    (
        *("multislerp", None, [E1, E2, E3], {"weight": [1.0, 2.0, 3.0]}),
        [-0.0082949596, 0.11743851, 0.11612984, 0.04846146],
    ),
    ("karcher", None, [E1, E2, E3], {}, [0.037733033, 0.082876466, 0.089350298, 0.13025345]),
    ("model_stock", B, [E1, E2], {}, [0.043711305, 0.0068777632, -0.011222361, 0.10493367]),
    ("sce", B, [E1, E2, E3], {"select_topk": 0.5}, [0, 0.01, 0.12, 0.16598174]),
    ("nearswap", B, [E1], {"t": 0.05}, [0.05, -0.04, 0.02, 0.08]),
    ("ram", B, [E1, E2], {}, [0.07, 0.005, -0.08, 0.15]),
    ("ramplus_tl", B, [E1, E2], {"r": 0.5, "alpha": 0.3}, [0.07, 0.005, -0.095, 0.15]),
]


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case[0])
def test_known_results(case: tuple[Any, ...]) -> None:
    name, base, inputs, numbers, expected = case
    square = None if base is None else base.view(2, 2)
    result = merged(name, square, [one.view(2, 2) for one in inputs], **numbers)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected), rtol=0, atol=6e-8)


def test_fusion_takes_the_outliers_alone() -> None:
    base = torch.arange(16.0).view(4, 4) / 100
    tuned = base + 0.01
    tuned[1, 1] += 0.5
    tuned[2, 2] -= 0.3
    expected = base.clone()
    expected[1, 1], expected[2, 2] = tuned[1, 1], tuned[2, 2]
    assert torch.equal(merged("arcee_fusion", base, [tuned]), expected)


# ---- Float64 ----

SHAPE = (96, 160)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 3, {"weight": [0.3, 0.5, 0.4]}),
    ("linear", 2, {"weight": [0.3, -0.1], "normalize": False}),
    ("passthrough", 1, {}),
    ("passthrough", 1, {"scale": [0.7]}),
    ("task_arithmetic", 3, {"weight": [0.3, 0.5, -0.4], "lambda": 1.1}),
    ("slerp", 1, {"t": 0.35}),
    ("nuslerp", 2, {"weight": [0.6, 0.9]}),
    ("nuslerp", 2, {"weight": [0.6, 0.9], "nuslerp_flatten": False}),
    (
        *("nuslerp", 2),
        {"weight": [0.6, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    ("multislerp", 3, {"weight": [0.6, 0.9, 0.2]}),
    ("multislerp", 2, {"weight": [0.6, 0.9], "normalize_weights": False}),
    ("karcher", 3, {}),
    ("karcher", 3, {"max_iter": 1}),
    ("model_stock", 3, {}),
    ("model_stock", 2, {"filter_wise": True}),
    ("ties", 3, {"weight": [0.6, 0.5, 0.4], "density": [0.3, 0.5, 0.7]}),
    ("ties", 2, {"weight": [0.6, 0.5], "density": 0.01, "normalize": False, "rescale": True}),
    ("ties", 2, {"weight": [0.6, 0.5], "density": [0.0, 1.0], "lambda": 0.8}),
    ("dare_linear", 2, {"weight": [0.6, 0.5], "density": [0.3, 0.8]}),
    ("dare_linear", 1, {"weight": [0.6], "density": [0.3], "rescale": False, "normalize": True}),
    ("dare_ties", 3, {"weight": [0.6, 0.5, 0.7], "density": [0.3, 0.8, 1.0], "seed": 7}),
    ("della", 2, {"weight": [0.6, 0.5], "density": [0.3, 0.6], "epsilon": [0.1, 0.2]}),
    ("della_linear", 2, {"weight": [0.6, 0.5], "density": 0.4, "rescale": False}),
    ("breadcrumbs", 2, {"weight": [0.6, 0.5], "density": [0.3, 0.9], "gamma": [0.01, 0.2]}),
    ("breadcrumbs_ties", 3, {"weight": [0.6, 0.5, 0.7], "density": 0.4, "rescale": True}),
    ("sce", 3, {}),
    ("sce", 3, {"select_topk": 0.3}),
    ("arcee_fusion", 1, {}),
    ("nearswap", 1, {"t": 0.001}),
    ("ram", 3, {"epsilon": 0.0005}),
    ("ramplus_tl", 3, {"r": 0.4, "alpha": 0.3, "epsilon": 0.001}),
]


def tensors(count: int, dtype: torch.dtype = torch.bfloat16, salt: int = 0) -> list[Tensor]:
    """A base and `count` fine-tunes of it, with the magnitudes of a language model's."""
    generator = torch.Generator().manual_seed(salt)
    base = 0.02 * torch.randn(SHAPE, generator=generator)
    tuned = [base + 0.001 * torch.randn(SHAPE, generator=generator) for _ in range(count)]
    return [tensor.to(dtype) for tensor in (base, *tuned)]


def has_base(name: str) -> bool:
    return merge_rules.METHODS[name].base == "required"


def reference(name: str, base: Tensor | None, inputs: list[Tensor], given: Any) -> Tensor:
    numbers = numbers_of(name, len(inputs), given)
    wide = None if base is None else base.double()
    return float64_methods.METHODS[name](wide, [one.double() for one in inputs], **numbers)


def case_id(case: object) -> str:
    return case[0] if isinstance(case, tuple) else ""


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bfloat16_results_are_the_float64_ones_rounded_once(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    name, count, given = case
    base, *inputs = tensors(count)
    base_or_none = base if has_base(name) else None
    result = merged(name, base_or_none, inputs, **given)
    expected = reference(name, base_or_none, inputs, given)
    right = (result == expected.to(torch.bfloat16)).double().mean()
    print(name, float(right))
    assert right >= 0.999
    torch.testing.assert_close(
        result.double(), expected, rtol=2**-8, atol=2e-9, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 1e-12)])
def test_wide_results_are_the_float64_ones(
    case: tuple[str, int, dict[str, Any]], dtype: torch.dtype, bound: float
) -> None:
    name, count, given = case
    base, *inputs = (tensor.to(dtype) for tensor in tensors(count, torch.bfloat16))
    base_or_none = base if has_base(name) else None
    result = merged(name, base_or_none, inputs, **given)
    expected = reference(name, base_or_none, inputs, given)
    assert result.dtype == dtype
    assert float((result.double() - expected).abs().max()) <= bound * 0.1


# ---- What holds for all ----


@pytest.mark.parametrize("name", sorted(merge_rules.METHODS))
def test_every_row_of_the_table_has_its_function(name: str) -> None:
    rules = merge_rules.METHODS[name]
    parameters = inspect.signature(METHODS[name]).parameters.values()
    keywords = {one.name.rstrip("_") for one in parameters if one.kind is one.KEYWORD_ONLY}
    expected = {one.name for one in rules.parameters} | {"recall"}
    assert keywords == expected | ({"seed"} if rules.random else set())
    assert "Source:" in (METHODS[name].__doc__ or "") or name == "passthrough"


def test_the_table_and_the_functions_are_the_same_methods() -> None:
    assert METHODS.keys() == merge_rules.METHODS.keys()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_bits_do_not_depend_on_how_the_output_is_cut(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    name, count, given = case
    base, *inputs = tensors(count)
    whole = merged(name, base if has_base(name) else None, inputs, **given)
    for cuts in ([160], [161, 4801, 4803], list(range(7, 15000, 1501))):
        cut = merged(name, base if has_base(name) else None, inputs, cuts=cuts, **given)
        assert torch.equal(cut, whole)
