"""Exact statistics of large tensors, found piece by piece: sums, products, order statistics.

None sorts a whole tensor or holds more than a few pieces of it. All give the same bits on any
number of threads and on any device: sums add element-wise in float64, in one fixed order, because a
library's own sum depends on how it splits the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Numbers of a flattened tensor: those at [start, stop).
Values = Callable[[int, int], Tensor]

# A sum has so many partial sums, each a float64; they stay in a core's second-level cache.
_LANES = 1 << 13
_PIECE = 1 << 15
# Counting writes 65,536 counters per piece, so these pieces are larger.
_COUNTED_PIECE = 1 << 18
_DIGIT = 16

_NO_ORDER = "its inputs have NaN or infinite numbers"


@dataclass(frozen=True)
class Cut:
    """The largest of some numbers: those above `threshold`, and of those equal to it the ones up
    to flat index `last`. So among equal magnitudes the lowest index wins.
    """

    threshold: float
    last: int

    def holds(self, values: Tensor, start: int) -> Tensor:
        """1 where `values`, the numbers from flat index `start` on, are among the largest, else 0.

        In their dtype.
        """
        if start > self.last:
            return mark(torch.gt, values, self.threshold)
        if start + values.numel() - 1 <= self.last:
            return mark(torch.ge, values, self.threshold)
        held = mark(torch.gt, values, self.threshold)
        first = self.last + 1 - start
        held[:first] += mark(torch.eq, values[:first], self.threshold)
        return held


def mark(relation: Callable[..., Tensor], values: Tensor, other: Tensor | float) -> Tensor:
    """1 where the relation holds, else 0, in the dtype of `values`.

    On CPUs torch writes numbers ten times as fast as booleans, and selects 80 times as fast by a
    multiplication as by `where`.
    """
    return relation(values, other, out=torch.empty_like(values))


NONE_HELD = Cut(math.inf, -1)


@dataclass(frozen=True)
class Histogram:
    """How often each leading digit (the upper 16 bits) occurs among non-negative numbers.

    `digits` ascend, `counts` belong to them; digits that do not occur are left out.
    """

    digits: NDArray[np.int64]
    counts: NDArray[np.int64]

    def find(self, k: int) -> tuple[int, int, int]:
        """The digit of the k-th largest, its place among the numbers of that digit, their count."""
        from_above = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(from_above, k))
        before = int(from_above[place - 1]) if place else 0
        index = len(self.digits) - 1 - place
        return int(self.digits[index]), k - before, int(self.counts[index])


def leading_digits(values: Values, count: int) -> Histogram:
    """The histogram that `largest` starts from, whatever is asked of it: one pass.

    Raises ValueError where there is a NaN with a minus sign.
    """
    found = _histogram(values, count, None, _bits(values(0, 0)) - _DIGIT)
    if found.counts.sum() != count:
        raise ValueError(_NO_ORDER)
    return found


def largest(values: Values, count: int, k: int, leading: Histogram) -> Cut:
    """The k largest of `count` non-negative numbers; for k < 1 none, for k >= count all.

    A radix selection over the numbers' bits, whose order is that of the numbers: one pass per 16
    bits below the leading ones, and one as far as the last number held. Raises ValueError where the
    k-th largest is NaN: by their bits these are larger than all numbers.
    """
    if k < 1:
        return NONE_HELD
    if k >= count:
        return Cut(0.0, count)
    shift = _bits(values(0, 0)) - _DIGIT
    prefix, place, equal = leading.find(k)
    while shift > 0:
        shift -= _DIGIT
        digit, place, equal = _histogram(values, count, prefix, shift).find(place)
        prefix = prefix << _DIGIT | digit
    threshold = _number(prefix, values(0, 0).dtype)
    if math.isnan(threshold):
        raise ValueError(_NO_ORDER)
    last = count if place == equal else _index_of(values, count, threshold, place)
    return Cut(threshold, last)


def zeros(values: Values, count: int, leading: Histogram) -> int:
    """How many of `count` non-negative numbers are 0."""
    if leading.digits.size == 0 or leading.digits[0] != 0:
        return 0
    return sum(
        int(mark(torch.eq, values(*place), 0.0).sum()) for place in _ranges(count, _COUNTED_PIECE)
    )


def total(values: Values, count: int, step: int = 1) -> float:
    """The sum of `count` numbers in float64; they are asked for in ranges of whole steps."""
    size = max(step, _LANES // step * step)
    lanes = torch.zeros(min(size, count), dtype=torch.float64, device=values(0, 0).device)
    # Several rounds of the lanes at a time: what a call takes by itself is then a small part.
    for start, stop in _ranges(count, size * max(1, _PIECE // size)):
        for part in torch.split(values(start, stop), size):
            lanes[: part.numel()] += part
    return float(folded(lanes, 0))


def gram(vectors: Sequence[Values], count: int) -> NDArray[np.float64]:
    """The dot products of vectors of `count` numbers with each other: float64, shape (k, k)."""
    number = len(vectors)
    device = vectors[0](0, 0).device
    lanes = torch.zeros(number, number, _LANES, dtype=torch.float64, device=device)
    for start, stop in _ranges(count, _PIECE):
        parts = [torch.split(vector(start, stop).double(), _LANES) for vector in vectors]
        for pieces in zip(*parts, strict=True):
            size = pieces[0].numel()
            for row in range(number):
                for column in range(row + 1):
                    lanes[row, column, :size].addcmul_(pieces[row], pieces[column])
    lower = folded(lanes, 2).cpu().numpy()
    return np.asarray(np.tril(lower) + np.tril(lower, -1).T)


def row_gram(vectors: Sequence[Values], rows: int, columns: int) -> Tensor:
    """`gram` of every row of matrices in row-major order: float64, shape (k, k, rows)."""
    number = len(vectors)
    device = vectors[0](0, 0).device
    result = torch.zeros(number, number, rows, dtype=torch.float64, device=device)
    for first, end in _ranges(rows, max(1, _PIECE // max(1, columns))):
        pieces = [_matrix(vector, first, end, columns) for vector in vectors]
        for row in range(number):
            for column in range(row + 1):
                result[row, column, first:end] = folded(pieces[row] * pieces[column], 1)
                result[column, row, first:end] = result[row, column, first:end]
    return result


def column_gram(vectors: Sequence[Values], rows: int, columns: int) -> Tensor:
    """`gram` of every column of matrices in row-major order: float64, shape (k, k, columns)."""
    number = len(vectors)
    device = vectors[0](0, 0).device
    result = torch.zeros(number, number, columns, dtype=torch.float64, device=device)
    for first, end in _ranges(rows, max(1, _PIECE // max(1, columns))):
        pieces = [_matrix(vector, first, end, columns) for vector in vectors]
        for row in range(number):
            for column in range(row + 1):
                result[row, column] += folded(pieces[row] * pieces[column], 0)
    for row in range(number):
        for column in range(row):
            result[column, row] = result[row, column]
    return result


def folded(numbers: Tensor, dim: int) -> Tensor:
    """The sum along `dim`, halves added to each other until one is left. Overwrites `numbers`."""
    length = numbers.shape[dim]
    if length == 0:
        return numbers.sum(dim)
    while length > 1:
        half = (length + 1) // 2
        numbers.narrow(dim, 0, length - half).add_(numbers.narrow(dim, half, length - half))
        length = half
    return numbers.select(dim, 0)


def _matrix(vector: Values, first: int, end: int, columns: int) -> Tensor:
    return vector(first * columns, end * columns).double().view(end - first, columns)


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _bits(values: Tensor) -> int:
    return values.dtype.itemsize * 8


def _as_integers(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


def _number(bits: int, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return float(np.array(bits, dtype=np.int32).view(np.float32))
    return float(np.array(bits, dtype=np.int64).view(np.float64))


def _histogram(values: Values, count: int, prefix: int | None, shift: int) -> Histogram:
    """Of the 16 bits above `shift`, among the numbers whose bits above those are `prefix`."""
    size = 1 << _DIGIT
    counts = torch.zeros(size + 2, dtype=torch.int64, device=values(0, 0).device)
    for start, stop in _ranges(count, _COUNTED_PIECE):
        # Numbers with another prefix are counted as well, as digits -1 and 65,536: picking out the
        # others takes ten times as long.
        digits = _as_integers(values(start, stop)) >> shift
        digits = digits.sub_((prefix or 0) << _DIGIT).clamp_(-1, size).add_(1)
        counts += torch.bincount(digits, minlength=size + 2)
    found = counts[1:-1].cpu().numpy()
    (digits_found,) = np.nonzero(found)
    return Histogram(digits_found, found[digits_found])


def _index_of(values: Values, count: int, number: float, place: int) -> int:
    """The flat index of the `place`-th (from 1) of the values that equal `number`."""
    for start, stop in _ranges(count, _COUNTED_PIECE):
        equal = mark(torch.eq, values(start, stop), number)
        here = int(equal.sum())
        if here >= place:
            return start + int(torch.nonzero(equal)[place - 1])
        place -= here
    raise AssertionError("the histogram counted more of them")
