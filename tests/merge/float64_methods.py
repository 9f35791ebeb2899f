"""Every merge method in float64, the straightforward way: what `methods.py` is tested against.

Sorted tensors, whole masks, no thought of memory; nothing is shared with the code under test.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def linear(base: Tensor, xs: Tensors, *, weight: list[float], normalize: bool) -> Tensor:
    total = sum(weight) if normalize else 1.0
    return sum_of(w / total * x for w, x in zip(weight, xs, strict=True))


def passthrough(base: Tensor, xs: Tensors, *, scale: list[float | None]) -> Tensor:
    return xs[0] * (1.0 if scale[0] is None else scale[0])


def slerp(base: Tensor, xs: Tensors, *, t: float) -> Tensor:
    cosine = float((unit(base) * unit(xs[0])).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * xs[0]
    theta = math.acos(cosine)
    first, second = math.sin((1 - t) * theta), math.sin(t * theta)
    return (first * base + second * xs[0]) / math.sin(theta)


def nuslerp(
    base: Tensor | None,
    xs: Tensors,
    *,
    weight: list[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Tensor:
    t = weight[1] / sum(weight)
    first, second = xs if base is None else [x - base for x in xs]
    dims: tuple[int, ...] = tuple(range(first.dim()))
    if not nuslerp_flatten:
        dims = (0,) if nuslerp_row_wise else (-1,)
    lengths = [x.square().sum(dims, keepdim=True).sqrt() for x in (first, second)]
    cosine = (first / lengths[0] * second / lengths[1]).sum(dims, keepdim=True)
    theta = torch.acos(cosine)
    result = ((1 - t) * theta).sin() * first + (t * theta).sin() * second
    return result / theta.sin() + (0.0 if base is None else base)


def multislerp(
    base: Tensor | None, xs: Tensors, *, weight: list[float], normalize_weights: bool, eps: float
) -> Tensor:
    shares = [w / sum(weight) if normalize_weights else w for w in weight]
    vectors = list(xs) if base is None else [x - base for x in xs]
    units = [vector / (vector.norm() + eps) for vector in vectors]
    mean = sum_of(w * u for w, u in zip(shares, units, strict=True))
    length = sum(w * float(vector.norm()) for w, vector in zip(shares, vectors, strict=True))
    return length * unit(mean) + (0.0 if base is None else base)


def karcher(base: Tensor, xs: Tensors, *, max_iter: int, tol: float) -> Tensor:
    units = [unit(x) for x in xs]
    mean = unit(sum_of(iter(units)))
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for one in units:
            cosine = float((one * mean).sum())
            theta = math.acos(min(1.0, cosine))
            if theta >= tol:
                tangent += theta / math.sin(theta) * (one - cosine * mean) / len(units)
        step = float(tangent.norm())
        if step < tol:
            break
        mean = unit(math.cos(step) * mean + math.sin(step) * tangent / step)
    return mean * sum(float(x.norm()) for x in xs) / len(xs)


def model_stock(base: Tensor, xs: Tensors, *, filter_wise: bool) -> Tensor:
    dims = (-1,) if filter_wise else tuple(range(base.dim()))
    deltas = [x - base for x in xs]
    cosines = []
    for i, first in enumerate(deltas):
        for second in deltas[:i]:
            lengths = [one.square().sum(dims, keepdim=True).sqrt() for one in (first, second)]
            cosines.append((first * second).sum(dims, keepdim=True) / (lengths[0] * lengths[1]))
    cosine = sum_of(iter(cosines)) / len(cosines)
    count = len(xs)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum_of(iter(xs)) / count + (1 - t) * base


def task_arithmetic(base: Tensor, xs: Tensors, **numbers: object) -> Tensor:
    masks = [None] * len(xs)
    return merge_deltas(base, xs, masks, rescale=False, consensus=False, **numbers)  # type: ignore[arg-type]


def ties(base: Tensor, xs: Tensors, *, density: list[float], **numbers: object) -> Tensor:
    masks = [magnitude_mask(x - base, d) for x, d in zip(xs, density, strict=True)]
    return merge_deltas(base, xs, masks, consensus=True, **numbers)  # type: ignore[arg-type]


def dare_linear(
    base: Tensor,
    xs: Tensors,
    *,
    density: list[float],
    seed: int,
    consensus: bool = False,
    **numbers: object,
) -> Tensor:
    masks = [
        uniform(base.shape, seed, index) < d if d < 1 else None for index, d in enumerate(density)
    ]
    return merge_deltas(base, xs, masks, consensus=consensus, **numbers)  # type: ignore[arg-type]


def dare_ties(base: Tensor, xs: Tensors, **numbers: object) -> Tensor:
    return dare_linear(base, xs, consensus=True, **numbers)  # type: ignore[arg-type]


def della_linear(
    base: Tensor,
    xs: Tensors,
    *,
    density: list[float],
    epsilon: list[float],
    seed: int,
    consensus: bool = False,
    **numbers: object,
) -> Tensor:
    masks: list[Tensor | None] = []
    for index, (d, e) in enumerate(zip(density, epsilon, strict=True)):
        probability = torch.empty_like(base)
        for row, delta in enumerate((xs[index] - base).abs()):
            # Of equal magnitudes the first one ranks highest.
            order = sorted(range(len(delta)), key=lambda i: (float(delta[i]), -i))
            for rank, place in enumerate(order):
                probability[row, place] = d - e + 2 * e * rank / (len(delta) - 1)
        masks.append(uniform(base.shape, seed, index) < probability if d < 1 else None)
    return merge_deltas(base, xs, masks, consensus=consensus, **numbers)  # type: ignore[arg-type]


def della(base: Tensor, xs: Tensors, **numbers: object) -> Tensor:
    return della_linear(base, xs, consensus=True, **numbers)  # type: ignore[arg-type]


def breadcrumbs(
    base: Tensor,
    xs: Tensors,
    *,
    density: list[float],
    gamma: list[float],
    consensus: bool = False,
    **numbers: object,
) -> Tensor:
    masks: list[Tensor | None] = []
    for x, d, g in zip(xs, density, gamma, strict=True):
        order = descending(x - base)
        count = len(order)
        kept, outliers = int(d * count), int(g * count)
        ascending = order[::-1]
        chosen = ascending[max(0, count - kept - outliers) :][:kept]
        masks.append(mask_of(base, chosen) if d < 1 else None)
    return merge_deltas(base, xs, masks, consensus=consensus, **numbers)  # type: ignore[arg-type]


def breadcrumbs_ties(base: Tensor, xs: Tensors, **numbers: object) -> Tensor:
    return breadcrumbs(base, xs, consensus=True, **numbers)  # type: ignore[arg-type]


def sce(base: Tensor, xs: Tensors, *, select_topk: float) -> Tensor:
    deltas = torch.stack([x - base for x in xs])
    if select_topk < 1:
        variance = deltas.var(0, unbiased=False).float()  # so that rounding leaves equal ones equal
        k = int(select_topk * int((variance != 0).sum()))
        deltas = deltas * mask_of(base, descending(variance)[:k])
    weights = deltas.square().flatten(1).mean(1)
    if float(weights.sum()) < 1e-6:
        weights = torch.ones_like(weights)
    weights = (weights / weights.sum()).view(-1, *[1] * base.dim())
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = deltas.sign() == sign
    return base + (weights * agreeing * deltas).sum(0) / (weights * agreeing).sum(0).clamp(1e-6)


def arcee_fusion(base: Tensor, xs: Tensors) -> Tensor:
    p, q = xs[0].softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = (xs[0] - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (float(ordered[int(f * (len(ordered) - 1))]) for f in (0.25, 0.5, 0.75))
    return torch.where(importance >= middle + 1.5 * (high - low), xs[0], base)


def nearswap(base: Tensor, xs: Tensors, *, t: float) -> Tensor:
    share = (t / (xs[0] - base).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * xs[0] + (1 - share) * base


def ram(base: Tensor, xs: Tensors, *, epsilon: float) -> Tensor:
    deltas = torch.stack([x - base for x in xs])
    active = deltas.abs() > epsilon
    return base + (deltas * active).sum(0) / active.sum(0).clamp(min=1)


def ramplus_tl(base: Tensor, xs: Tensors, *, r: float, alpha: float, epsilon: float) -> Tensor:
    deltas = torch.stack([x - base for x in xs])
    active = deltas.abs() > epsilon
    count = active.double().sum(0)
    out = base.clone()
    for delta, here in zip(deltas, active, strict=True):
        ratio = int((here & (count > 1)).sum()) / max(int((here & (count == 1)).sum()), epsilon)
        factor = torch.where(count == 1, 1 + r * min(alpha, ratio), 1.0 / count.clamp(min=1))
        out = out + here * delta * factor
    return out


def merge_deltas(
    base: Tensor,
    xs: Tensors,
    masks: Sequence[Tensor | None],
    *,
    weight: list[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    consensus: bool,
) -> Tensor:
    terms = []
    for x, mask, w in zip(xs, masks, weight, strict=True):
        delta = x - base
        kept = delta if mask is None else delta * mask
        if rescale and mask is not None:
            kept = kept * (delta.abs().sum() / kept.abs().sum())
        terms.append(w * kept)
    stacked = torch.stack(terms)
    weights = torch.tensor(weight, dtype=torch.float64).view(-1, *[1] * base.dim())
    agreeing = torch.ones_like(stacked, dtype=torch.bool)
    if consensus:
        # 0.6 · 2 − 0.4 · 3 is 0, whatever float64 makes of it.
        positive = stacked.sum(0) >= -1e-9 * stacked.abs().sum(0)
        agreeing = stacked.sign() == torch.where(positive, 1.0, -1.0)
    divisor = (weights * agreeing).sum(0)
    divisor = torch.where(divisor.abs() < 1e-12, 1.0, divisor)
    total = (stacked * agreeing).sum(0)
    return base + lambda_ * (total / divisor if normalize else total)


def magnitude_mask(delta: Tensor, density: float) -> Tensor | None:
    if density >= 1:
        return None
    k = max(1, int(density * delta.numel())) if density > 0 else 0
    return mask_of(delta, descending(delta)[:k])


def descending(numbers: Tensor) -> list[int]:
    """Flat indices by magnitude, the largest first; of equal ones the lowest index first."""
    flat = numbers.abs().flatten().tolist()
    return sorted(range(len(flat)), key=lambda i: (-flat[i], i))


def mask_of(like: Tensor, places: list[int]) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.view(like.shape)


def uniform(shape: Sequence[int], seed: int, index: int) -> Tensor:
    """The documented random numbers: Philox keyed with a hash of seed and index, 32 bits each."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:16], dtype="<u8")
    size = math.prod(shape)
    raw = np.random.Philox(key=key).random_raw(-(-size // 2))
    halves = np.stack([raw & 0xFFFFFFFF, raw >> 32], axis=1).reshape(-1)[:size]
    return torch.from_numpy(halves / 2.0**32).view(*shape)


def sum_of(terms: object) -> Tensor:
    total: Tensor = sum(terms)  # type: ignore[call-overload]
    return total


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


METHODS: dict[str, Callable[..., Tensor]] = {
    one.__name__: one
    for one in (
        *(linear, passthrough, slerp, nuslerp, multislerp, karcher, model_stock, task_arithmetic),
        *(ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties),
        *(sce, arcee_fusion, nearswap, ram, ramplus_tl),
    )
}
