"""Where source tensors live while an engine runs: on the device, in pinned memory, or mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint


@dataclass(frozen=True)
class View:
    """A part of a checkpoint tensor; `offset` counts elements from the tensor's first."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This part of `tensor`, which is contiguous; no copy."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> View:
        """All of a contiguous tensor of that shape."""
        strides = [1]
        for length in reversed(shape[1:]):
            strides.append(strides[-1] * max(1, length))
        return cls(tuple(shape), tuple(reversed(strides[: len(shape)])), 0)


@dataclass
class Residency:
    """The declared sources of one engine worker, and their tensors as a merge reads them.

    Every part is decided on once, at its first use: on a GPU it stays in device memory while
    `device_bytes` last, then in pinned host memory while `pinned_bytes` last, else it remains a
    mapping of the file, as all do on a CPU (there the page cache is the memory).
    """

    checkpoints: dict[str, Checkpoint]
    device: torch.device
    device_bytes: int = 0
    pinned_bytes: int = 0
    _parts: dict[tuple[str, str, View], Tensor] = field(default_factory=dict)
    _largest: dict[tuple[str, str, View], float] = field(default_factory=dict)

    def settle(self, parts: Iterable[tuple[str, str, View]]) -> None:
        """Decides now where these parts live, before others ask for the device's memory."""
        if self.device.type != "cpu":
            for model, name, view in parts:
                self.part(model, name, view)

    @classmethod
    def open(
        cls,
        directories: Sequence[str],
        device: torch.device,
        *,
        device_bytes: int = 0,
        pinned_bytes: int = 0,
    ) -> Residency:
        """Opens the checkpoints of `directories`, each known by the name it was declared with."""
        checkpoints = {name: Checkpoint.open(Path(name)) for name in dict.fromkeys(directories)}
        return cls(checkpoints, device, device_bytes, pinned_bytes)

    def checkpoint(self, name: str) -> Checkpoint:
        """The declared checkpoint `name`; a name that was not declared opens nothing."""
        if name not in self.checkpoints:
            known = ", ".join(self.checkpoints)
            raise ConfigError(f"{name!r} is no declared source of this engine; declared: {known}")
        return self.checkpoints[name]

    def part(self, model: str, name: str, view: View) -> Tensor:
        """That part of the tensor, on the engine's device."""
        key = (model, name, view)
        if key not in self._parts:
            self._parts[key] = self._settle(view.of(self.checkpoint(model).read(name)))
        return self._parts[key].to(self.device, non_blocking=True)

    def largest(self, model: str, name: str, view: View) -> float:
        """The largest magnitude in that part; NaN if there is one in it. Computed once."""
        key = (model, name, view)
        if key not in self._largest:
            low, high = torch.aminmax(self.part(model, name, view))
            self._largest[key] = float(torch.maximum(-low, high))  # which keeps a NaN
        return self._largest[key]

    def _settle(self, mapped: Tensor) -> Tensor:
        size = mapped.numel() * mapped.element_size()
        if self.device.type == "cpu":
            return mapped
        if size <= self.device_bytes:
            self.device_bytes -= size
            return mapped.to(self.device)
        if size <= self.pinned_bytes:
            self.pinned_bytes -= size
            return mapped.contiguous().pin_memory()
        return mapped


def memory_budget(device: torch.device, workers: int = 1) -> tuple[int, int]:
    """(device_bytes, pinned_bytes) for one of the `workers` of this machine; (0, 0) on a CPU.

    A third of the GPU's memory stays for the engine's key-value cache and activations; of the free
    host memory half is pinned at most, as pinned pages are lost to everyone else.
    """
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, free - total // 3), host // (2 * workers)
