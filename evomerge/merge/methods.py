"""The maths of merging: tensors in, one tensor out.

Every method is one function of the tensors and of the numbers of its row in `merge_rules.py`. It
returns what is left to do per element: a `Blend` of the inputs, or `Pieces` of the output. All are
computed in float32 (float64 tensors in float64) and rounded once, into `out`. The order of the
operations is part of the contract: the compiled kernels (`kernels.py`) run these very functions,
and the merge in the live engine must equal the one on disk to the last bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge import statistics
from evomerge.merge.blends import (
    Blend,
    Pieces,
    Recall,
    merge_method,
    normalized,
    scaled,
    split_weight,
)
from evomerge.merge.statistics import Cut, Histogram, Values, mark

T = TypeVar("T")
Kernel = Callable[[Tensor, Sequence[Tensor], Tensor], None]


# As mergekit: smaller L1 norms are not rescaled.
_SMALLEST_NORM = 1e-7
# The temporaries of a range that is computed at a time fit into a core's second-level cache, and
# torch does not split so few elements over threads.
_RANGE_CPU = 1 << 15
_RANGE_GPU = 1 << 22
# Random numbers are 32 bits each; the generator makes eight of them per step of its counter.
_DRAWS = 1 << 32
_DRAWS_PER_STEP = 8


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What a merge of these tensors (inputs and output) is computed in: float64 for any float64."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def weight_words(weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The weights in two words each (`blends.split_weight`): `dtype` of shape (2, k)."""
    words = torch.tensor([split_weight(weight) for weight in weights], dtype=torch.float64)
    return words.reshape(-1, 2).T.contiguous().to(dtype)


def task_arithmetic_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = base + Σᵢ weightᵢ · (tunedᵢ − base), with inputs = [base, tuned₁, …, tunedₖ].

    All inputs have the shape of `out`, any floating dtype; `weights` are `weight_words`, in whose
    dtype it computes.
    """
    # Differences first: 1 parameter in 100,000 differs from the exact sum rounded once. The same
    # loop in bfloat16: 1 in 49; adding each difference to `base` in bfloat16: 1 in 3.
    # In place where it can be: 0.64 ns per parameter on one core, 0.82 ns with new tensors.
    base = inputs[0].to(weights.dtype)
    delta = inputs[1].to(weights.dtype, copy=True).sub_(base)
    high, low = weights[0, 0] * delta, delta.mul_(weights[1, 0])
    for index, tuned in enumerate(inputs[2:], start=1):
        delta = tuned.to(weights.dtype, copy=True).sub_(base)
        high.add_(weights[0, index] * delta)
        low.add_(delta.mul_(weights[1, index]))
    out.copy_(high.add_(low).add_(base))


def linear_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = Σᵢ weightᵢ · inputᵢ; whoever wants an average hands in weights that sum to 1.

    All inputs have the shape of `out`, any floating dtype; `weights` are `weight_words`, in whose
    dtype it computes.
    """
    tensor = inputs[0].to(weights.dtype, copy=True)
    high, low = weights[0, 0] * tensor, tensor.mul_(weights[1, 0])
    for index, more in enumerate(inputs[1:], start=1):
        tensor = more.to(weights.dtype, copy=True)
        high.add_(weights[0, index] * tensor)
        low.add_(tensor.mul_(weights[1, index]))
    out.copy_(high.add_(low))


def passthrough_kernel(out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """out = input, in `out`'s dtype; `weights` is empty and not read."""
    del weights
    out.copy_(inputs[0])


KERNELS: dict[str, Kernel] = {
    "linear": linear_kernel,
    "passthrough": passthrough_kernel,
    "task_arithmetic": task_arithmetic_kernel,
}
# ---- Blends: linear combinations whose weights depend on norms and angles alone ----


@merge_method
def slerp(base: Tensor | None, inputs: Sequence[Tensor], *, t: float, recall: Recall) -> Blend:
    """(sin((1−t)θ)·b + sin(tθ)·x) / sin θ, θ the angle between base and input as one vector each.

    (1−t)·b + t·x where |cos θ| > 0.9995. A vector shorter than 1e-8 counts as one at a right angle
    to the other. t is usually in [0, 1] (0: the base), and not limited.
    Source: Shoemake 1985, Animating rotation with quaternion curves, §3.3.
    """
    assert base is not None
    dots = recall(
        ("gram", "inputs"), lambda: statistics.gram(_values([base, *inputs]), _size(base))
    )
    lengths = [norm if norm > 1e-8 else 1.0 for norm in np.sqrt(np.diag(dots))]
    cosine = min(1.0, max(-1.0, float(dots[0, 1]) / (lengths[0] * lengths[1])))
    if abs(cosine) > 0.9995:
        return Blend("linear", (1.0 - t, t))
    return Blend("linear", _on_the_arc(t, math.acos(cosine)))


@merge_method
def nuslerp(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
    recall: Recall,
) -> Blend | Pieces:
    """(sin((1−t)θ)·x₁ + sin(tθ)·x₂) / sin θ with t = w₂/(w₁+w₂), or 1/2 where |w₁+w₂| < 1e-6.

    With a base, the same of the differences to it, added to it. θ is the angle between the whole
    tensors (`nuslerp_flatten`), else between their vectors along the last dimension, or along the
    first one (`nuslerp_row_wise`: mergekit's name for columns). Shorter vectors than 1e-7 count as
    so long. Parallel and opposite vectors (sin²θ ≤ 1e-12) are interpolated linearly; mergekit's
    limit is 1e-16, which its float32 cosines reach where sin²θ is about 1e-7.
    Source: Shoemake 1985, §3.3, with two weights in the place of one t.
    """
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    vectors = _values(inputs, base)
    size, shape = _size(inputs[0]), inputs[0].shape or (1,)
    origin = "inputs" if base is None else "differences"
    if nuslerp_flatten:
        dots = recall(("gram", origin), lambda: statistics.gram(vectors, size))
        first, second = (float(one) for one in _nuslerp_weights(torch.from_numpy(dots), t))
        return Blend("linear" if base is None else "task_arithmetic", (first, second))
    if nuslerp_row_wise:
        rows, columns = shape[0], size // max(1, shape[0])
        find = functools.partial(statistics.column_gram, vectors, rows, columns)
        factors = _nuslerp_weights(recall(("column gram", origin), find), t)[:, None, :]
    else:
        rows, columns = size // max(1, shape[-1]), shape[-1]
        find = functools.partial(statistics.row_gram, vectors, rows, columns)
        factors = _nuslerp_weights(recall(("row gram", origin), find), t)[:, :, None]
    return _combined(base, inputs, factors, columns)


@merge_method
def multislerp(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    normalize_weights: bool,
    eps: float,
    recall: Recall,
) -> Blend:
    """(Σᵢ wᵢ‖xᵢ‖)·m/‖m‖ with m = Σᵢ wᵢ·xᵢ/(‖xᵢ‖ + eps); with a base, of the differences to it.

    Weights are divided by their sum if `normalize_weights`; a single input is returned as it is.
    mergekit goes on through the tangent space at m, where the weighted sum is 0, so that the result
    is this one. Where ‖m‖ < eps or is 0, two inputs are added (Σᵢ wᵢ·xᵢ), and ValueError is raised
    for more, as by mergekit. It is also raised for weights to normalise that sum to less than 1e-8,
    where mergekit makes NaN.
    Source: Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.
    """
    kernel: Literal["linear", "task_arithmetic"] = "linear" if base is None else "task_arithmetic"
    if len(inputs) == 1:
        return Blend(kernel, (1.0,))
    shares = np.array(normalized(weight) if normalize_weights else weight)
    origin = "inputs" if base is None else "differences"
    dots = recall(
        ("gram", origin), lambda: statistics.gram(_values(inputs, base), _size(inputs[0]))
    )
    lengths = np.sqrt(np.diag(dots))
    units = np.divide(shares, lengths + eps, out=np.zeros_like(shares), where=lengths + eps > 0)
    length_of_mean = math.sqrt(max(0.0, units @ dots @ units))
    # Rounding leaves some 1e-9 of unit vectors that cancel: to mergekit's float32 that is 0, too.
    if length_of_mean < max(eps, 1e-8):
        if len(inputs) == 2:
            return Blend(kernel, tuple(float(share) for share in shares))
        raise ValueError("the weighted directions of the inputs cancel each other")
    scale = float(shares @ lengths) / length_of_mean
    return Blend(kernel, tuple(float(unit) * scale for unit in units))


@merge_method
def karcher(
    base: Tensor | None, inputs: Sequence[Tensor], *, max_iter: int, tol: float, recall: Recall
) -> Blend:
    """The inputs' mean length times the Karcher mean (on the sphere) of their directions.

    The mean m of the K unit vectors uᵢ is the fixed point of m ← cos‖T‖·m + sin‖T‖·T/‖T‖ with
    T = 1/K·Σᵢ (θᵢ/sin θᵢ)·(uᵢ − cos θᵢ·m), from their normalised mean on (where that is shorter
    than `tol`: from the first of them), in at most `max_iter` steps and until ‖T‖ < `tol`; inputs
    nearer to m than `tol` do not pull. All of it are sums of inputs, so their dot products suffice.
    Inputs not longer than `tol` have no direction, but count in the mean length; if none is longer,
    the result is 0. A direction opposite to m pulls nowhere (in mergekit: wherever rounding says).
    Source: Karcher 1977, Riemannian center of mass and mollifier smoothing; arXiv:2603.04972.
    """
    del base
    if len(inputs) == 1:
        return Blend("passthrough")
    dots = recall(("gram", "inputs"), lambda: statistics.gram(_values(inputs), _size(inputs[0])))
    lengths = np.sqrt(np.diag(dots))
    voting = lengths > tol
    if not voting.any():
        return Blend("linear", (0.0,) * len(inputs))
    cosines = (dots / np.outer(lengths, lengths).clip(min=1e-300))[np.ix_(voting, voting)]
    mean = _karcher_mean(cosines, max_iter, tol)
    weights = np.zeros(len(inputs))
    weights[voting] = lengths.mean() * mean / lengths[voting]
    return Blend("linear", tuple(float(one) for one in weights))


@merge_method
def model_stock(
    base: Tensor | None, inputs: Sequence[Tensor], *, filter_wise: bool, recall: Recall
) -> Blend | Pieces:
    """t·mean(xᵢ) + (1−t)·b with t = K·c/(1 + (K−1)·c), c the mean cosine of the K differences.

    c is taken over all pairs of δᵢ = xᵢ − b, of whole tensors or (`filter_wise`) of their vectors
    along the last dimension; products of norms below 1e-6 count as 1e-6. t is not limited to
    [0, 1]: inputs that point away from each other push the result away from their mean, as in
    mergekit; where |1 + (K−1)·c| < 1e-6 it is 0.
    Source: Jang et al. 2024, arXiv:2403.19522, §4.
    """
    assert base is not None
    vectors, count = _values(inputs, base), len(inputs)
    if not filter_wise:
        find = functools.partial(statistics.gram, vectors, _size(base))
        share = _stock_ratio(torch.from_numpy(recall(("gram", "differences"), find)))
        return Blend("task_arithmetic", (float(share) / count,) * count)
    columns = (base.shape or (1,))[-1]
    rows = _size(base) // max(1, columns)
    shares = recall(
        ("stock ratio of rows",),
        lambda: _stock_ratio(statistics.row_gram(vectors, rows, columns)),
    )
    factors = (shares / count).expand(count, rows)[:, :, None]
    return _combined(base, inputs, factors, columns)


# ---- Sparse differences to the base: trimmed or dropped, then summed ----


@merge_method
def ties(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
) -> Blend | Pieces:
    """b + λ·Σᵢ wᵢ·τᵢ / Σᵢ wᵢ over those i that agree with the elected sign, per element.

    τᵢ are the k = max(1, int(density·n)) largest of the n differences δᵢ = xᵢ − b, 0 elsewhere
    (density 0: all 0; 1: all of δᵢ); with `rescale` stretched to the L1 norm of δᵢ. The sign is
    that of Σᵢ wᵢ·τᵢ, + for 0. Without `normalize` there is no division.
    Source: Yadav et al. 2023, arXiv:2306.01708, §3. Unlike mergekit, which leaves the order of
    equal magnitudes open, the lowest flat index wins.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [vectors.of_largest(i, one) for i, one in enumerate(density)]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=True)


@merge_method
def dare_linear(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
    seed: int,
) -> Blend | Pieces:
    """b + λ·Σᵢ wᵢ·τᵢ, where τᵢ keeps each element of δᵢ = xᵢ − b with probability `density`.

    With `rescale` τᵢ is stretched to the L1 norm of δᵢ (as mergekit does; the paper divides by the
    density), with `normalize` the sum is divided by Σᵢ wᵢ. An element is kept where its random
    number in [0, 1), which depends on `seed`, the input's index and the element's alone, is below
    the density: what is kept at 0.3 is kept at 0.4, too, so that a search sees a smooth function.
    Source: Yu et al. 2023, arXiv:2311.03099, §3.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [vectors.of_random(i, one, seed) for i, one in enumerate(density)]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=False)


@merge_method
def dare_ties(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
    seed: int,
) -> Blend | Pieces:
    """Differences dropped at random as in `dare_linear`, their signs elected as in `ties`.

    Source: Yu et al. 2023, arXiv:2311.03099, §3; Yadav et al. 2023, arXiv:2306.01708, §3.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [vectors.of_random(i, one, seed) for i, one in enumerate(density)]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=True)


@merge_method
def della(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
    seed: int,
) -> Blend | Pieces:
    """As `dare_ties`, but the larger a difference is within its row, the likelier it is kept.

    The probability rises linearly from density − epsilon for the smallest of a row (along the last
    dimension; a vector is one row) to density + epsilon for the largest. Density 0 drops all, 1
    keeps all. Where mergekit fails we go on: probabilities beyond [0, 1] are cut off there, and the
    only element of a row is kept with probability `density`. mergekit ranks tensors of three
    dimensions along the second one.
    Source: Deep et al. 2024, arXiv:2406.11617, §3.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [
        vectors.of_ranked(i, one, spread, seed)
        for i, (one, spread) in enumerate(zip(density, epsilon, strict=True))
    ]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=True)


@merge_method
def della_linear(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
    seed: int,
) -> Blend | Pieces:
    """Differences dropped as in `della`, summed as in `dare_linear`.

    Source: Deep et al. 2024, arXiv:2406.11617, §3.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [
        vectors.of_ranked(i, one, spread, seed)
        for i, (one, spread) in enumerate(zip(density, epsilon, strict=True))
    ]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=False)


@merge_method
def breadcrumbs(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
) -> Blend | Pieces:
    """b + λ·Σᵢ wᵢ·τᵢ, where τᵢ has neither the largest nor the small ones of δᵢ = xᵢ − b.

    Of n differences the int(gamma·n) largest go, fewer if else no K = int(density·n) are left; of
    the rest the K largest stay. Density 1 keeps all. `rescale` and `normalize` as in `dare_linear`.
    Source: Davari and Belilovsky 2023, arXiv:2312.06795, §3. Of equal magnitudes the lowest flat
    index counts as the largest.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [
        vectors.of_middle(i, one, share)
        for i, (one, share) in enumerate(zip(density, gamma, strict=True))
    ]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=False)


@merge_method
def breadcrumbs_ties(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    recall: Recall,
) -> Blend | Pieces:
    """Differences trimmed as in `breadcrumbs`, their signs elected as in `ties`.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, §3; Yadav et al. 2023, arXiv:2306.01708.
    """
    vectors = _TaskVectors(base, inputs, recall)
    keeps = [
        vectors.of_middle(i, one, share)
        for i, (one, share) in enumerate(zip(density, gamma, strict=True))
    ]
    return vectors.merged(keeps, weight, lambda_, normalize, rescale, consensus=True)


@merge_method
def sce(
    base: Tensor | None, inputs: Sequence[Tensor], *, select_topk: float, recall: Recall
) -> Blend | Pieces:
    """b + Σᵢ wᵢ·δᵢ / Σᵢ wᵢ over those i whose δᵢ = xᵢ − b has the sign of Σᵢ δᵢ (0: +).

    Select: below 1, only the int(select_topk·m) elements with the largest variance over the inputs
    are merged, m being the number of elements whose variance is not 0. Calculate: wᵢ is the mean
    square of δᵢ (0 where not selected), over their sum; equal if that is below 1e-6. Erase: the
    signs. As in mergekit the limit is absolute, and typical fine-tunes of a language model lie
    below it: their weights are equal.
    Source: Wan et al. 2024 (FuseChat), arXiv:2408.07990, §3.
    """
    assert base is not None
    count = _size(base)
    spread = _spread(inputs)
    cut = None
    if select_topk < 1.0:
        leading = recall(("spreads",), lambda: statistics.leading_digits(spread, count))
        moved = count - recall(("spreads of 0",), lambda: statistics.zeros(spread, count, leading))
        # In float32 as in mergekit: a gradient's 0.49999999999999994 of 64 elements is 32 of them.
        k = int(np.float32(select_topk) * np.float32(moved))
        cut = recall(("largest spreads", k), lambda: statistics.largest(spread, count, k, leading))

    def squares_of(vector: Values) -> Values:
        def squares(start: int, stop: int) -> Tensor:
            piece = vector(start, stop).double().square()
            return piece if cut is None else piece * cut.holds(spread(start, stop), start)

        return squares

    def mean_squares() -> list[float]:
        vectors = _values(inputs, base)
        return [statistics.total(squares_of(one), count) / max(1, count) for one in vectors]

    squares = recall(("mean squares", cut), mean_squares)
    total = math.fsum(squares)
    weights = [square / total if total >= 1e-6 else 1.0 / len(squares) for square in squares]
    return _sce_pieces(base, inputs, weights, cut)


# ---- Element by element ----


@merge_method
def arcee_fusion(base: Tensor | None, inputs: Sequence[Tensor], *, recall: Recall) -> Pieces:
    """x where |x − b|·D ≥ median + 1.5·(Q₃ − Q₁) of these numbers over the tensor, else b.

    D is the divergence Σ p·log(p/q) of each row (along the last dimension), p and q the softmax of
    x and b, plus 1e-8. The quartiles are the sorted numbers at the indices int(f·(n−1)); they are
    exact for every size, where mergekit draws a million numbers from larger tensors.
    Source: Arcee Fusion, https://arcee.ai.
    """
    assert base is not None
    size, columns = _size(base), (base.shape or (1,))[-1]
    base_values, tuned_values = _values([base, *inputs])
    divergence = recall(
        ("divergences",), lambda: _divergences(base_values, tuned_values, size, columns)
    )

    def importance(start: int, stop: int) -> Tensor:
        moved = (tuned_values(start, stop) - base_values(start, stop)).abs_()
        first, end = start // max(1, columns), -(-stop // max(1, columns))
        rows = divergence[first:end].repeat_interleave(max(1, columns))
        return moved.mul_(rows[start - first * columns : stop - first * columns])

    threshold = recall(("fusion threshold",), lambda: _outlier_threshold(importance, size))

    def fill(out: Tensor, start: int, stop: int) -> None:
        for first, end in _ranges(start, stop, 1, out.device):
            taken = mark(torch.ge, importance(first, end), threshold)
            fused = taken * tuned_values(first, end) + (1.0 - taken) * base_values(first, end)
            out[first - start : end - start].copy_(fused)

    return Pieces(fill)


@merge_method
def nearswap(base: Tensor | None, inputs: Sequence[Tensor], *, t: float, recall: Recall) -> Pieces:
    """b + λ·(x − b) with λ = min(1, t / max(|x − b|, 1e-6)): a step of at most t towards x.

    t ≥ 0; elements nearer than t become x exactly.
    Source: QuartetAnemoi, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    del recall
    assert base is not None
    base_values, tuned_values = _values([base, *inputs])

    def fill(out: Tensor, start: int, stop: int) -> None:
        for first, end in _ranges(start, stop, 1, out.device):
            origin, tuned = base_values(first, end), tuned_values(first, end)
            delta = tuned - origin
            share = t / delta.abs().clamp_(min=1e-6)
            near = mark(torch.ge, share, 1.0)
            stepped = origin + share.clamp_(max=1.0) * delta
            out[first - start : end - start].copy_(near * tuned + (1.0 - near) * stepped)

    return Pieces(fill)


@merge_method
def ram(base: Tensor | None, inputs: Sequence[Tensor], *, epsilon: float, recall: Recall) -> Pieces:
    """b + the mean of those differences δᵢ = xᵢ − b that are active: |δᵢ| > epsilon, per element.

    Source: arXiv:2601.13572 (Reinforced Agent Merging). `epsilon` is absolute, as in mergekit.
    """
    del recall
    return _active_mean(base, inputs, epsilon, (1.0,) * len(inputs))


@merge_method
def ramplus_tl(
    base: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    r: float,
    alpha: float,
    epsilon: float,
    recall: Recall,
) -> Pieces:
    """As `ram`, with the elements active in one input alone multiplied by 1 + r·min(alpha, ρᵢ).

    ρᵢ is the number of elements of this tensor that are active in input i and in another one, over
    that of those active in i alone (over `epsilon`, where that is larger). A negative alpha takes
    the place of ρᵢ.
    Source: arXiv:2601.13572 (RAM+, tensor-local).
    """
    vectors, count = _values(inputs, base), _size(inputs[0])
    counts = recall(("overlaps", epsilon), lambda: _overlaps(vectors, count, epsilon))
    ratios = [
        shared / max(alone, epsilon) if max(alone, epsilon) > 0 else 0.0 for shared, alone in counts
    ]
    factors = tuple(1.0 + r * min(alpha, ratio) for ratio in ratios)
    return _active_mean(base, inputs, epsilon, factors)


# ---- What the methods are made of ----


def _size(tensor: Tensor) -> int:
    return tensor.numel()


def _values(tensors: Sequence[Tensor], origin: Tensor | None = None) -> list[Values]:
    """Ranges of the flattened tensors, or of their differences to `origin`, as they are computed.

    In float32, or in float64 if any of them is.
    """
    dtype = working_dtype(tensors if origin is None else [*tensors, origin])

    def flat(tensor: Tensor) -> Values:
        line = tensor.detach().reshape(-1)
        return lambda start, stop: line[start:stop].to(dtype)

    if origin is None:
        return [flat(tensor) for tensor in tensors]
    start_of = flat(origin)

    def difference(tensor: Tensor) -> Values:
        tuned = flat(tensor)
        return lambda start, stop: tuned(start, stop) - start_of(start, stop)

    return [difference(tensor) for tensor in tensors]


def _ranges(start: int, stop: int, step: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges of whole steps that are computed one at a time."""
    limit = _RANGE_CPU if device.type == "cpu" else _RANGE_GPU
    size = max(step, limit // step * step)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _on_the_arc(t: float, theta: float) -> tuple[float, float]:
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _nuslerp_weights(dots: Tensor, t: float) -> Tensor:
    """The two vectors' weights, shape (2, …), from their dot products of shape (2, 2, …)."""
    lengths = (dots[0, 0] * dots[1, 1]).sqrt().clamp(min=1e-14)
    cosine = torch.where(
        torch.minimum(dots[0, 0], dots[1, 1]) >= 1e-14,
        dots[0, 1] / lengths,
        dots[0, 1] / (dots[0, 0].sqrt().clamp(min=1e-7) * dots[1, 1].sqrt().clamp(min=1e-7)),
    ).clamp(-1.0, 1.0)
    parallel = 1.0 - cosine.square() <= 1e-12
    theta = torch.acos(torch.where(parallel, 0.0, cosine))
    first = torch.where(parallel, 1.0 - t, torch.sin((1.0 - t) * theta) / torch.sin(theta))
    second = torch.where(parallel, t, torch.sin(t * theta) / torch.sin(theta))
    return torch.stack([first, second])


def _karcher_mean(cosines: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64]:
    """The weights, shape (k,), of unit vectors in their Karcher mean, from their cosines (k, k)."""

    def length(weights: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(weights @ cosines @ weights)))

    count = len(cosines)
    mean = np.full(count, 1.0 / count)
    start = length(mean)
    mean = mean / start if start >= tol and start > 0 else np.eye(count)[0]
    for _ in range(max_iter):
        towards = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(towards)
        pulls = np.zeros(count)
        pulling = (angles >= tol) & (np.sin(angles) > 1e-9)
        pulls[pulling] = angles[pulling] / np.sin(angles[pulling]) / count
        tangent = pulls - (pulls @ towards) * mean
        step = length(tangent)
        if step < tol or step == 0:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        unit = length(mean)
        if unit > tol:
            mean = mean / unit
    return mean


def _stock_ratio(dots: Tensor) -> Tensor:
    """Model Stock's t from the dot products of the differences, shapes (…) and (k, k, …)."""
    count = len(dots)
    cosines = [
        (dots[i, j] / (dots[i, i] * dots[j, j]).sqrt().clamp(min=1e-6)).clamp(-1.0, 1.0)
        for i in range(count)
        for j in range(i)
    ]
    cosine = torch.stack(cosines).mean(0)
    divisor = 1.0 + (count - 1) * cosine
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, divisor))


def _combined(
    base: Tensor | None, inputs: Sequence[Tensor], factors: Tensor, columns: int
) -> Pieces:
    """Σᵢ factorᵢ·xᵢ, or base + Σᵢ factorᵢ·(xᵢ − base), per row or per column.

    `factors` has the shape (k, rows, 1) or (k, 1, columns).
    """
    dtype = working_dtype(inputs if base is None else [base, *inputs])
    factors = factors.to(dtype)
    vectors = _values(inputs, base)
    origin = None if base is None else _values([base, *inputs])[0]
    by_row = factors.shape[2] == 1

    def fill(out: Tensor, start: int, stop: int) -> None:
        for first, end in _ranges(start, stop, max(1, columns), out.device):
            rows = slice(first // columns, end // columns) if by_row else slice(None)
            total = torch.zeros(end - first, dtype=dtype, device=out.device).view(-1, columns)
            for factor, vector in zip(factors, vectors, strict=True):
                total += factor[rows] * vector(first, end).view(-1, columns)
            if origin is not None:
                total += origin(first, end).view(-1, columns)
            out[first - start : end - start].copy_(total.view(-1))

    return Pieces(fill, max(1, columns))


@dataclass(frozen=True)
class _Keep:
    """Which elements of a difference stay: mask(its range from `start` on, start) is 1 or 0 there.

    `key` holds every number that the choice depends on; `step` is what ranges are multiples of.
    """

    key: Hashable
    mask: Callable[[Tensor, int], Tensor]
    step: int = 1


def _common_step(keeps: Sequence[_Keep | None]) -> int:
    return max(keep.step if keep else 1 for keep in keeps)


class _TaskVectors:
    """The differences of the inputs to the base, what may be kept of them, and their merge."""

    def __init__(self, base: Tensor | None, inputs: Sequence[Tensor], recall: Recall) -> None:
        assert base is not None
        self.dtype = working_dtype([base, *inputs])
        self.device = base.device
        self.size = _size(base)
        self.columns = max(1, (base.shape or (1,))[-1])
        self.origin = _values([base, *inputs])[0]
        self.vectors = _values(inputs, base)
        self.recall = recall

    def of_largest(self, index: int, density: float) -> _Keep | None:
        """The max(1, int(density·n)) of largest magnitude; None: all are kept."""
        if density >= 1.0:
            return None
        k = max(1, int(density * self.size)) if density > 0.0 else 0
        cut = self._largest(index, k)
        return _Keep(("largest", k), lambda delta, start: cut.holds(delta.abs(), start))

    def of_middle(self, index: int, density: float, gamma: float) -> _Keep | None:
        """int(density·n) of them, of the largest but for the int(gamma·n) largest of all."""
        if density >= 1.0:
            return None
        kept = int(density * self.size)
        outliers = min(int(gamma * self.size), self.size - kept)
        outer, inner = self._largest(index, outliers + kept), self._largest(index, outliers)

        def mask(delta: Tensor, start: int) -> Tensor:
            magnitudes = delta.abs()
            return outer.holds(magnitudes, start) - inner.holds(magnitudes, start)

        return _Keep(("middle", outliers, kept), mask)

    def of_random(self, index: int, density: float, seed: int) -> _Keep | None:
        """Each with probability `density`."""
        if density >= 1.0:
            return None
        key, limit = _random_key(seed, index), math.ceil(density * _DRAWS)

        def mask(delta: Tensor, start: int) -> Tensor:
            kept = _draws(key, start, start + delta.numel()) < limit
            return torch.from_numpy(kept).to(device=delta.device, dtype=delta.dtype)

        return _Keep(("random", density, seed), mask)

    def of_ranked(self, index: int, density: float, epsilon: float, seed: int) -> _Keep | None:
        """Each with a probability that rises by its rank in its row around `density`."""
        if density >= 1.0:
            return None
        key, columns = _random_key(seed, index), self.columns
        ranks = np.arange(columns) * (2.0 / (columns - 1)) - 1.0 if columns > 1 else np.zeros(1)
        share = np.clip(density + epsilon * ranks, 0.0, 1.0) if density > 0.0 else 0.0 * ranks
        limits = torch.from_numpy(np.ceil(share * _DRAWS).astype(np.int64)).to(self.device)

        def mask(delta: Tensor, start: int) -> Tensor:
            order = _ascending(delta.abs().view(-1, columns))
            own = torch.empty_like(order).scatter_(1, order, limits.expand_as(order))
            draws = torch.from_numpy(_draws(key, start, start + delta.numel()).astype(np.int64))
            return (draws.to(delta.device) < own.view(-1)).to(delta.dtype)

        return _Keep(("ranked", density, epsilon, seed), mask, columns)

    def merged(
        self,
        keeps: Sequence[_Keep | None],
        weight: Sequence[float],
        lambda_: float,
        normalize: bool,
        rescale: bool,
        *,
        consensus: bool,
    ) -> Blend | Pieces:
        """The base plus lambda times the kept differences' weighted sum, or mean if `normalize`.

        With `rescale` each is stretched to the L1 norm that it had; with `consensus` only those
        enter that agree with the sign of the sum, per element.
        """
        scales = [
            self._scale(index, keep) if rescale and keep else 1.0
            for index, keep in enumerate(keeps)
        ]
        if consensus and len(keeps) > 1:
            return self._elected(keeps, scales, weight, lambda_, normalize=normalize)
        factors = [
            one * scale
            for one, scale in zip(scaled(weight, lambda_, normalize), scales, strict=True)
        ]
        if not any(keeps):
            return Blend("task_arithmetic", tuple(factors))
        return self._summed(keeps, factors)

    def _summed(self, keeps: Sequence[_Keep | None], factors: Sequence[float]) -> Pieces:
        step = _common_step(keeps)
        words = weight_words(factors, self.dtype).to(self.device)

        def fill(out: Tensor, start: int, stop: int) -> None:
            for first, end in _ranges(start, stop, step, out.device):
                high = torch.zeros(end - first, dtype=self.dtype, device=out.device)
                low = torch.zeros_like(high)
                for index, keep in enumerate(keeps):
                    delta = self._kept(index, keep, first, end)
                    high += words[0, index] * delta
                    low += words[1, index] * delta
                total = self.origin(first, end) + (high + low)
                out[first - start : end - start].copy_(total)

        return Pieces(fill, step)

    def _elected(
        self,
        keeps: Sequence[_Keep | None],
        scales: Sequence[float],
        weight: Sequence[float],
        lambda_: float,
        *,
        normalize: bool,
    ) -> Pieces:
        step = _common_step(keeps)
        divisors = weight if normalize else None
        factors = [one * scale for one, scale in zip(weight, scales, strict=True)]
        # Weights that cancel leave a rounding error, which is no divisor.
        smallest = 2.0**-22 * math.fsum(abs(one) for one in weight)

        def fill(out: Tensor, start: int, stop: int) -> None:
            for first, end in _ranges(start, stop, step, out.device):
                terms = [
                    self._kept(index, keep, first, end).mul_(factors[index])
                    for index, keep in enumerate(keeps)
                ]
                total = _agreeing(terms, divisors, smallest).mul_(lambda_)
                out[first - start : end - start].copy_(self.origin(first, end) + total)

        return Pieces(fill, step)

    def _kept(self, index: int, keep: _Keep | None, start: int, stop: int) -> Tensor:
        delta = self.vectors[index](start, stop)
        return delta if keep is None else delta.mul_(keep.mask(delta, start))

    def _scale(self, index: int, keep: _Keep) -> float:
        """What stretches the kept elements to the L1 norm of all; 1 where either norm is ~0."""

        def norm() -> float:
            return statistics.total(self._magnitudes(index), self.size)

        before = self.recall(("L1 norm", index), norm)
        after = self.recall(("L1 norm", index, keep.key), lambda: self._kept_norm(index, keep))
        return 1.0 if min(before, after) < _SMALLEST_NORM else before / after

    def _kept_norm(self, index: int, keep: _Keep) -> float:
        def kept(start: int, stop: int) -> Tensor:
            return self._kept(index, keep, start, stop).abs_()

        return statistics.total(kept, self.size, keep.step)

    def _magnitudes(self, index: int) -> Values:
        return lambda start, stop: self.vectors[index](start, stop).abs_()

    def _largest(self, index: int, k: int) -> Cut:
        magnitudes = self._magnitudes(index)

        def find_leading() -> Histogram:
            return statistics.leading_digits(magnitudes, self.size)

        def find() -> Cut:
            return statistics.largest(magnitudes, self.size, k, leading)

        leading = self.recall(("magnitudes", index), find_leading)
        return self.recall(("largest", index, k), find)


def _agreeing(terms: Sequence[Tensor], divisors: Sequence[float] | None, smallest: float) -> Tensor:
    """The sum of the terms that have the sign of the sum of all, per element; 0 counts as +.

    So does a sum that is 0 but for rounding: weights such as 0.6 and −0.4 on equal numbers of
    bfloat16 make many of them. With `divisors`, one per term, it is divided by the sum of those of
    the summed terms, where that is not below `smallest`.
    """
    total = functools.reduce(torch.add, terms)
    whole = functools.reduce(torch.add, (term.abs() for term in terms))
    positive = mark(torch.ge, total, whole.mul_(-8.0 * torch.finfo(total.dtype).eps))
    sign = positive.mul_(2.0).sub_(1.0)
    total = torch.zeros_like(total)
    divisor = torch.zeros_like(total)
    for index, term in enumerate(terms):
        agreeing = term.mul_(sign).clamp_(min=0.0)
        total += agreeing
        if divisors is not None:
            divisor += mark(torch.gt, agreeing, 0.0).mul_(divisors[index])
    if divisors is not None:
        none = mark(torch.le, divisor.abs(), smallest)
        total /= divisor * (1.0 - none) + none
    return total.mul_(sign)


def _random_key(seed: int, index: int) -> NDArray[np.uint64]:
    """The generator's key for one input of one tensor."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def _draws(key: NDArray[np.uint64], start: int, stop: int) -> NDArray[np.uint32]:
    """The random numbers, uniform in [0, 2^32), of the elements [start, stop).

    Philox's raw stream is the same in every version of numpy, and its counter can be set, so that
    any range has the numbers that it has within the whole.
    """
    skipped = start // _DRAWS_PER_STEP
    generator = np.random.Philox(key=key, counter=skipped)
    first = skipped * _DRAWS_PER_STEP
    raw = np.asarray(generator.random_raw((stop - first + 1) // 2), dtype="<u8")
    return raw.view("<u4")[start - first : stop - first]


def _ascending(magnitudes: Tensor) -> Tensor:
    """The indices that sort each row, the smallest first; of equal ones the last index first."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype != torch.float32:
        return torch.sort(magnitudes, dim=1, descending=True, stable=True).indices.flip(1)
    # Magnitude and index in one integer: numpy sorts those 4 to 6 times as fast.
    columns = magnitudes.shape[1]
    backwards = torch.arange(columns - 1, -1, -1)
    packed = magnitudes.view(torch.int32).to(torch.int64)
    packed.bitwise_left_shift_(32).bitwise_or_(backwards).numpy().sort(axis=1)
    return packed.bitwise_and_(0xFFFFFFFF).neg_().add_(columns - 1)


def _spread(inputs: Sequence[Tensor]) -> Values:
    """Σᵢⱼ (xᵢ − xⱼ)² over the pairs, per element, in float32: the variance over K inputs times K².

    Exact but for the last rounding, so that equal variances are equal numbers.
    """
    values = _values(inputs)

    def spread(start: int, stop: int) -> Tensor:
        pieces = [one(start, stop).double() for one in values]
        total = torch.zeros_like(pieces[0])
        for index, first in enumerate(pieces):
            for second in pieces[:index]:
                total += (first - second).square_()
        return total.float()

    return spread


def _sce_pieces(
    base: Tensor, inputs: Sequence[Tensor], weights: Sequence[float], cut: Cut | None
) -> Pieces:
    origin, *_ = _values([base, *inputs])
    vectors, spread = _values(inputs, base), _spread(inputs)

    def fill(out: Tensor, start: int, stop: int) -> None:
        for first, end in _ranges(start, stop, 1, out.device):
            deltas = [vector(first, end) for vector in vectors]
            if cut is not None:
                held = cut.holds(spread(first, end), first)
                deltas = [delta.mul_(held) for delta in deltas]
            sign = mark(torch.ge, functools.reduce(torch.add, deltas), 0.0).mul_(2.0).sub_(1.0)
            total = torch.zeros_like(sign)
            divisor = torch.zeros_like(sign)
            for delta, weight in zip(deltas, weights, strict=True):
                agreeing = delta.mul_(sign).clamp_(min=0.0)
                divisor += mark(torch.gt, agreeing, 0.0).mul_(weight)
                total += agreeing.mul_(weight)
            total.mul_(sign)
            out[first - start : end - start].copy_(
                origin(first, end) + total / divisor.clamp_(min=1e-6)
            )

    return Pieces(fill)


def _divergences(base: Values, tuned: Values, size: int, columns: int) -> Tensor:
    """Σ p·log(p/q) of each row in float64, p and q the rows' softmax plus 1e-8: shape (rows,)."""
    device = base(0, 0).device
    rows = size // max(1, columns)
    step = max(1, _RANGE_CPU // max(1, columns))
    result = torch.zeros(rows, dtype=torch.float64)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        # Always on the CPU: a GPU's exponential has other last bits, and the threshold shows them.
        q, p = (
            torch.softmax(
                values(first * columns, end * columns).cpu().double().view(-1, columns), 1
            )
            + 1e-8
            for values in (base, tuned)
        )
        result[first:end] = statistics.folded(p * torch.log(p / q), 1)
    return result.clamp_(min=0.0).to(device=device, dtype=base(0, 0).dtype)


def _outlier_threshold(importance: Values, size: int) -> float:
    """median + 1.5·(Q₃ − Q₁) of the sorted numbers at the indices int(f·(size − 1))."""
    leading = statistics.leading_digits(importance, size)
    low, middle, high = (
        statistics.largest(importance, size, size - int(share * (size - 1)), leading).threshold
        for share in (0.25, 0.5, 0.75)
    )
    return middle + 1.5 * (high - low)


def _active_mean(
    base: Tensor | None, inputs: Sequence[Tensor], epsilon: float, factors: Sequence[float]
) -> Pieces:
    """base + the mean of the differences above `epsilon`; where it is one, times its factor."""
    assert base is not None
    origin = _values([base, *inputs])[0]
    vectors = _values(inputs, base)

    def fill(out: Tensor, start: int, stop: int) -> None:
        for first, end in _ranges(start, stop, 1, out.device):
            deltas = [vector(first, end) for vector in vectors]
            active = [mark(torch.gt, delta.abs(), epsilon) for delta in deltas]
            count = functools.reduce(torch.add, active)
            total = torch.zeros_like(count)
            for delta, here, factor in zip(deltas, active, factors, strict=True):
                kept = delta.mul_(here)
                total += kept
                if factor != 1.0:
                    total += kept.mul_(mark(torch.eq, count, 1.0)).mul_(factor - 1.0)
            out[first - start : end - start].copy_(
                origin(first, end) + total / count.clamp_(min=1.0)
            )

    return Pieces(fill)


def _overlaps(vectors: Sequence[Values], size: int, epsilon: float) -> list[tuple[int, int]]:
    """For each difference: how many active elements it shares, and how many it has alone."""
    counts = [[0, 0] for _ in vectors]
    for first, end in _ranges(0, size, 1, vectors[0](0, 0).device):
        active = [mark(torch.gt, vector(first, end).abs_(), epsilon) for vector in vectors]
        alone = mark(torch.eq, functools.reduce(torch.add, active), 1.0)
        for count, here in zip(counts, active, strict=True):
            here_alone = int((here * alone).sum())
            count[0] += int(here.sum()) - here_alone
            count[1] += here_alone
    return [(shared, alone) for shared, alone in counts]


def has_overflow(tensor: Tensor) -> bool:
    """Whether a NaN or an infinity is among the numbers of `tensor`."""
    if tensor.numel() == 0:
        return False
    if tensor.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.half()  # torch has neither sum nor aminmax of 8-bit floats
    # No sum with a NaN or an infinity is finite, and a sum takes a third of aminmax's time; a sum
    # of large numbers may overflow by itself. (isfinite of all of them: 20 times aminmax.)
    if math.isfinite(tensor.sum().item()):
        return False
    low, high = torch.aminmax(tensor)
    return not bool(torch.isfinite(low) & torch.isfinite(high))
