"""The headers of safetensors files: what they say of tensors before any number is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evomerge.errors import ConfigError, shown
from evomerge.merge.dtypes import BY_CODE, DType

_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes
# Types of the format that are not read here.
_OF_PACKED_WEIGHTS = ("U16", "U32", "U64", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "C64")


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of one tensor before any of its numbers is read.

    They are the bytes of `file` from `begin` on, row by row.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    begin: int


class TensorSpec(Protocol):
    """A tensor that is to be written: its name, dtype and shape."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Described(Protocol):
    """A model directory as its config and its tensors' headers describe it."""

    @property
    def directory(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorHeader]: ...


def num_bytes(spec: TensorSpec) -> int:
    """The bytes of its numbers."""
    return spec.dtype.itemsize * math.prod(spec.shape)


def read_headers(file: Path) -> dict[str, TensorHeader]:
    """The headers of one safetensors file, in the order of the file's header.

    Raises ConfigError where the file is shorter or longer than its header says, or where a tensor
    has numbers of a type that is not read, or other bytes than its shape and dtype need.
    """
    header, data_start = _read_raw_header(file)
    header.pop("__metadata__", None)
    tensors, places = {}, {}
    for name, entry in header.items():
        try:
            if entry["dtype"] in _OF_PACKED_WEIGHTS:
                raise ConfigError(
                    f"{file}: tensor {name} has numbers of type {entry['dtype']}, as models with "
                    f"packed weights have; it should be one of {', '.join(BY_CODE)}"
                )
            dtype, shape = BY_CODE[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}: tensor {name} has a broken header: {shown(entry)} should have a "
                "dtype, a shape and data_offsets as safetensors has them; fetch the file again"
            ) from error
        tensors[name] = TensorHeader(name, dtype, shape, file, data_start + begin)
        places[name] = begin, end
    size = file.stat().st_size
    data_end = data_start + max((end for _, end in places.values()), default=0)
    if size != data_end:
        raise ConfigError(
            f"{file}: is truncated or damaged: {size} bytes, but its header describes {data_end}; "
            "fetch the file again"
        )
    _check_places(file, tensors, places)
    return tensors


def _check_places(
    file: Path, tensors: Mapping[str, TensorHeader], places: Mapping[str, tuple[int, int]]
) -> None:
    """Raises ConfigError unless the tensors follow each other, each as long as its numbers."""
    previous_end = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        header = tensors[name]
        if min(header.shape, default=0) < 0 or end - begin != num_bytes(header):
            raise ConfigError(
                f"{file}: tensor {name} has a broken header: {end - begin} bytes for shape "
                f"{list(header.shape)} of {header.dtype}; fetch the file again"
            )
        if begin != previous_end:
            raise ConfigError(
                f"{file}: tensor {name} has a broken header: it begins at byte {begin}, but the "
                f"one before it ends at {previous_end}; fetch the file again"
            )
        previous_end = end


def _read_raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header as parsed JSON, and where the numbers start."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(_LONGEST_HEADER, file.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(opened.read(length))
        if not isinstance(header, dict):
            raise ValueError("header is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: is truncated or no safetensors file ({error}); fetch the file again"
        ) from error
    return header, 8 + length
