"""Every merge method: known results, float64, and what must hold for all of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from evomerge import merge_rules
from evomerge.merge import methods, statistics
from evomerge.merge.blends import METHODS, Blend, Pieces, recall_nothing
from evomerge.merge.kernels import merge_into
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
    assert right >= 0.9998
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


LARGE = (300, 500)  # several ranges, and more than one thread's share of a library's sum


def large_tensors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = 0.02 * torch.randn(LARGE, generator=generator)
    tuned = [base + 0.001 * torch.randn(LARGE, generator=generator) for _ in range(count)]
    return [tensor.bfloat16() for tensor in (base, *tuned)]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_bits_do_not_depend_on_the_number_of_threads(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    name, count, given = case
    base, *inputs = large_tensors(count)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(merged(name, base if has_base(name) else None, inputs, **given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "sce", "arcee_fusion"])
def test_pieces_may_be_filled_at_once(name: str) -> None:
    base, *inputs = large_tensors(merge_rules.METHODS[name].inputs[1] or 2)
    given: dict[str, Any] = {"select_topk": 0.5} if name == "sce" else {}
    if name in ("ties", "dare_ties", "della"):
        given = {"weight": 0.7, "density": 0.4}
    numbers = numbers_of(name, len(inputs), given)
    rest = METHODS[name](base, inputs, recall=recall_nothing, **numbers)
    assert isinstance(rest, Pieces)
    out = torch.empty(base.numel(), dtype=base.dtype)
    step = 30 * 500  # whole rows, which all of them take

    def fill(start: int) -> None:
        rest.fill(out[start : start + step], start, min(start + step, out.numel()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(0, out.numel(), step)))
    assert torch.equal(out.view(LARGE), merged(name, base, inputs, **given))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_recalled_statistics_change_no_bit(case: tuple[str, int, dict[str, Any]]) -> None:
    name, count, given = case
    base, *inputs = tensors(count)
    base_or_none = base if has_base(name) else None
    kept: dict[Hashable, Any] = {}

    def recall(key: Hashable, compute: Callable[[], T], /) -> T:
        if key not in kept:
            kept[key] = compute()
        result: T = kept[key]
        return result

    # Other numbers first: a key that lacks one of them would bring back their statistics.
    others = {
        key: value
        for key, value in {
            **{"density": 0.25, "epsilon": 0.07 if count > 1 else 0.05, "gamma": 0.05},
            **{"select_topk": 0.6, "weight": 0.3, "seed": 5},
        }.items()
        if merge_rules.METHODS[name].parameter(key) or (key == "seed" and is_random(name))
    }
    merged(name, base_or_none, inputs, recall=recall, **{**given, **others})
    for _ in range(2):
        again = merged(name, base_or_none, inputs, recall=recall, **given)
        assert torch.equal(again, merged(name, base_or_none, inputs, **given))


def is_random(name: str) -> bool:
    return merge_rules.METHODS[name].random


def test_of_equal_magnitudes_the_lowest_indices_stay() -> None:
    base, tuned = torch.zeros(3, 4), torch.tensor([1.0, -2, 2, 1, -1, 2, 0, 1, 1, -1, 1, 0])
    kept = merged("ties", base, [tuned.view(3, 4)], weight=1.0, density=0.5, normalize=False)
    assert kept.flatten().tolist() == [1, -2, 2, 1, -1, 2, 0, 0, 0, 0, 0, 0]
    kept = merged("breadcrumbs", base, [tuned.view(3, 4)], weight=1.0, density=0.5, gamma=0.17)
    assert kept.flatten().tolist() == [1, 0, 0, 1, -1, 2, 0, 1, 1, 0, 0, 0]
    moved = [tuned.view(3, 4), torch.zeros(3, 4)]
    kept = merged("sce", base, moved, select_topk=0.5)  # 10 elements vary, 5 are taken
    assert kept.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [3, 1000, 10**9])
def test_the_largest_are_those_of_a_stable_sort(dtype: torch.dtype, distinct: int) -> None:
    generator = torch.Generator().manual_seed(1)
    count = 300_000  # more than one piece
    numbers = torch.randint(distinct, (count,), generator=generator).to(dtype) / 7
    order = torch.sort(numbers, descending=True, stable=True).indices

    def values(start: int, stop: int) -> Tensor:
        return numbers[start:stop]

    leading = statistics.leading_digits(values, count)
    assert statistics.zeros(values, count, leading) == int((numbers == 0).sum())
    for k in (0, 1, 2, 99_999, 150_000, 299_999, 300_000):
        cut = statistics.largest(values, count, k, leading)
        expected = torch.zeros(count, dtype=dtype)
        expected[order[:k]] = 1
        held = [cut.holds(values(a, min(a + 7777, count)), a) for a in range(0, count, 7777)]
        assert torch.equal(torch.cat(held), expected), k


def test_rows_and_columns_have_the_dot_products_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(37, 1000, generator=generator) for _ in range(3)]
    vectors = [lambda a, b, m=m: m.view(-1)[a:b] for m in matrices]
    wide = torch.stack(matrices).double()
    rows, columns = (
        torch.einsum("irc,jrc->ijr", wide, wide),
        torch.einsum("irc,jrc->ijc", wide, wide),
    )
    torch.testing.assert_close(statistics.row_gram(vectors, 37, 1000), rows)
    torch.testing.assert_close(statistics.column_gram(vectors, 37, 1000), columns)
    whole = torch.from_numpy(statistics.gram(vectors, 37_000))
    torch.testing.assert_close(whole, rows.sum(2), rtol=1e-14, atol=1e-10)


# ---- Cases whose result is plain ----


# Those whose weights need not sum to 1, and the one that scales, give something else.
AVERAGES = [
    case
    for case in CASES
    if case[0] not in ("passthrough", "linear") and case[2].get("normalize_weights", True)
]


@pytest.mark.parametrize("case", AVERAGES, ids=case_id)
def test_models_equal_to_the_base_give_the_base(case: tuple[str, int, dict[str, Any]]) -> None:
    name, count, given = case
    base = tensors(0)[0]
    result = merged(name, base if has_base(name) else None, [base.clone()] * count, **given)
    assert torch.equal(result, base)


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "della", "della_linear"])
def test_density_0_drops_all_and_1_keeps_all(name: str) -> None:
    base, tuned = tensors(1)
    assert torch.equal(merged(name, base, [tuned], weight=1.0, density=0.0), base)
    assert torch.equal(merged(name, base, [tuned], weight=1.0, density=1.0), tuned)


def test_the_ends_of_the_arc_are_the_models() -> None:
    base, tuned = tensors(1, salt=4)
    other = tuned.flip(0)  # far from the base, so that it is an arc
    assert torch.equal(merged("slerp", base, [other], t=0.0), base)
    assert torch.equal(merged("slerp", base, [other], t=1.0), other)
    assert torch.equal(merged("nuslerp", None, [base, other], weight=[1.0, 0.0]), base)


def test_directions_that_cancel_have_a_linear_or_no_result() -> None:
    base = tensors(0)[0].float()
    halves = merged("multislerp", None, [base, -base / 2], weight=0.5)
    torch.testing.assert_close(halves, base / 4)
    with pytest.raises(ValueError, match="cancel"):
        merged("multislerp", None, [base, -base, base * 2, -base], weight=0.25)
    opposite = merged("nuslerp", None, [base, -base], weight=[3.0, 1.0])
    torch.testing.assert_close(opposite, base / 2)


@pytest.mark.parametrize(("name", "key"), [("linear", "normalize"), ("multislerp", "eps")])
def test_weights_that_sum_to_0_are_refused(name: str, key: str) -> None:
    base, *inputs = tensors(2)
    del base
    with pytest.raises(ValueError, match="cannot be normalised"):
        merged(name, None, inputs, weight=[0.5, -0.5], **({key: True} if key != "eps" else {}))


def test_weights_that_cancel_divide_nothing() -> None:
    base, first, second, third = tensors(3)
    weights = [0.1, 0.2, -0.3]
    result = merged("ties", base, [first, second, third], weight=weights, density=1.0)
    assert float((result - base).abs().max()) < 0.1


def test_inputs_without_a_direction_count_in_the_mean_length_alone() -> None:
    base, first, second = (tensor.float() for tensor in tensors(2))
    two = merged("karcher", None, [first, second])
    three = merged("karcher", None, [first, second, torch.zeros_like(base)])
    torch.testing.assert_close(three, two * 2 / 3)
    nothing = merged("karcher", None, [torch.zeros_like(base)] * 2)
    assert not nothing.any()


# ---- Random methods ----


def test_what_is_kept_at_a_density_is_kept_at_a_higher_one() -> None:
    base, tuned = torch.zeros(LARGE), torch.ones(LARGE)
    kept = [
        merged("dare_linear", base, [tuned], weight=1.0, density=d, rescale=False).bool()
        for d in (0.1, 0.3, 0.31, 0.8)
    ]
    for few, more in itertools.pairwise(kept):
        assert not (few & ~more).any()
    # The standard deviation of each share is below 0.0013.
    for share, d in zip(kept, (0.1, 0.3, 0.31, 0.8), strict=True):
        assert abs(float(share.double().mean()) - d) < 0.005


def test_seeds_and_inputs_draw_numbers_of_their_own() -> None:
    base, tuned = torch.zeros(LARGE), torch.ones(LARGE)
    numbers: dict[str, Any] = {"weight": 1.0, "density": 0.5, "rescale": False}
    first = merged("dare_linear", base, [tuned], seed=1, **numbers)
    assert torch.equal(first, merged("dare_linear", base, [tuned], seed=1, **numbers))
    other = merged("dare_linear", base, [tuned], seed=2, **numbers)
    both = merged("dare_linear", base, [tuned, tuned], seed=1, **numbers)
    # Independent halves agree in one half of the places.
    assert abs(float((first == other).double().mean()) - 0.5) < 0.01
    assert torch.equal((both - first).clamp(0, 1), both - first)
    assert abs(float((both == 1.0).double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs", "ties"])
def test_rescaled_differences_have_the_length_that_they_had(name: str) -> None:
    base, tuned = (tensor.float() for tensor in tensors(1))
    numbers: dict[str, Any] = {"weight": 1.0, "density": 0.4, "rescale": True, "normalize": False}
    result = merged(name, base, [tuned], dtype=torch.float64, **numbers)
    assert float((result - base).abs().sum() / (tuned - base).double().abs().sum()) == (
        pytest.approx(1.0, abs=1e-5)
    )


def test_della_keeps_the_larger_ones_more_often() -> None:
    base = torch.zeros(400, 500)
    tuned = torch.linspace(1.0, 2.0, 500).expand(400, 500)
    numbers: dict[str, Any] = {"density": 0.5, "epsilon": 0.3, "rescale": False}
    kept = merged("della_linear", base, [tuned], weight=1.0, **numbers).bool().double()
    shares = kept.view(400, 5, 100).mean((0, 2))
    torch.testing.assert_close(
        shares, torch.tensor([0.26, 0.38, 0.5, 0.62, 0.74]).double(), rtol=0, atol=0.01
    )


def test_della_goes_on_where_probabilities_leave_the_unit_interval_or_a_row_is_one_element() -> (
    None
):
    base, tuned = torch.zeros(1, 1000), torch.linspace(1.0, 2.0, 1000).view(1, 1000)
    numbers: dict[str, Any] = {"weight": 1.0, "rescale": False}
    kept = merged("della_linear", base, [tuned], density=0.9, epsilon=0.3, **numbers).bool()
    assert kept[0, 700:].all()
    assert 0.55 < float(kept[0, :100].double().mean()) < 0.75
    columns = merged(
        "della_linear", base.view(1000, 1), [tuned.view(1000, 1)], density=0.3, **numbers
    )
    assert abs(float(columns.bool().double().mean()) - 0.3) < 0.06


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 3, 5)])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_shape_has_a_result(case: tuple[str, int, dict[str, Any]], shape: Any) -> None:
    name, count, given = case
    generator = torch.Generator().manual_seed(9)
    base, *inputs = (torch.randn(shape, generator=generator) for _ in range(count + 1))
    result = merged(name, base if has_base(name) else None, inputs, **given)
    assert result.shape == shape
    assert result.isfinite().all()


def test_sce_counts_its_elements_in_float32_as_mergekit_does() -> None:
    """A gradient from 0.1 to 0.7 is 0.49999999999999994 in the third of four layers."""
    base, *inputs = (torch.randn(64, generator=torch.Generator().manual_seed(n)) for n in range(4))
    pieces = METHODS["sce"](base, inputs, select_topk=0.49999999999999994, recall=recall_nothing)
    assert isinstance(pieces, Pieces)
    out = torch.empty(64)
    pieces.fill(out, 0, 64)
    assert int((out != base).sum()) == 32


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce", "arcee_fusion"])
def test_inputs_that_are_not_finite_are_told(name: str, dtype: torch.dtype, broken: float) -> None:
    base, tuned = torch.full((2, 8), broken, dtype=dtype)
    shared = {"weight": (1.0, 1.0), "lambda_": 1.0, "normalize": True, "rescale": False}
    numbers: dict[str, Any] = {
        "ties": shared | {"density": (0.5, 0.5)},
        "breadcrumbs": shared | {"density": (0.5, 0.5), "gamma": (0.1, 0.1)},
        "sce": {"select_topk": 0.5},
        "arcee_fusion": {},
    }[name]
    inputs = [tuned] if name == "arcee_fusion" else [tuned, tuned.clone()]
    with pytest.raises(ValueError, match="its inputs have NaN or infinite numbers"):
        METHODS[name](base, inputs, recall=recall_nothing, **numbers)
