"""The types of numbers in files, known without torch: importing it takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A type of numbers: its `name` in torch, recipes and config.json, its `code` in safetensors.

    `itemsize` is in bytes.
    """

    name: str
    code: str
    itemsize: int
    is_floating_point: bool

    def __str__(self) -> str:
        return self.name

    @property
    def torch(self) -> torch.dtype:
        """torch's own, which is imported at the first call."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


BFLOAT16 = DType("bfloat16", "BF16", 2, True)
FLOAT16 = DType("float16", "F16", 2, True)
FLOAT32 = DType("float32", "F32", 4, True)
FLOAT64 = DType("float64", "F64", 8, True)
# What models are merged in; other types are of quantised ones.
MERGED = (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)

BY_CODE = {
    dtype.code: dtype
    for dtype in (
        *MERGED,
        DType("float8_e4m3fn", "F8_E4M3", 1, True),
        DType("float8_e5m2", "F8_E5M2", 1, True),
        *(DType(f"int{8 * size}", f"I{8 * size}", size, False) for size in (8, 4, 2, 1)),
        DType("uint8", "U8", 1, False),
        DType("bool", "BOOL", 1, False),
    )
}
_BY_NAME = {dtype.name: dtype for dtype in BY_CODE.values()}


def dtype_of(name: str | torch.dtype) -> DType:
    """The type of a torch dtype, or of its name, with or without `torch.`; KeyError for others."""
    return _BY_NAME[str(name).removeprefix("torch.")]


def widest(dtypes: Iterable[DType]) -> DType:
    """The narrowest type that holds the numbers of all these floating ones: torch.promote_types."""
    return reduce(_wider, dtypes)


def _wider(one: DType, other: DType) -> DType:
    if one == other:
        return one
    if one.itemsize == other.itemsize:
        return FLOAT32  # of float16 and bfloat16
    return max(one, other, key=lambda dtype: dtype.itemsize)
