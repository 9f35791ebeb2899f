"""Tensors that are made of others part by part, by all cores: in little memory, of any size."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merge.checkpoint import ShardedOutput, bytes_of, total_bytes
from evomerge.merge.dtypes import DType
from evomerge.merge.kernels import thread_count_kept
from evomerge.merge.methods import has_overflow
from evomerge.merge.streaming import Progress, cores

# Elements that are computed at a time, where nothing else is asked for.
BLOCK = 1 << 17

Part = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class PartTensor:
    """One tensor of an output; `part(start, stop)` computes its flat elements [start, stop).

    `start` is a multiple of `step`, `stop` at most a step further; the part has any dtype.
    `checked` has NaN and infinities refused.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    part: Part
    step: int = BLOCK
    checked: bool = True

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The whole tensor in parts, each with its first flat element's place."""
        total = math.prod(self.shape)
        for start in range(0, total, self.step):
            yield start, self.part(start, min(start + self.step, total)).to(self.dtype.torch)


def write_tensors(
    tensors: Sequence[PartTensor],
    output: ShardedOutput,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Computes every tensor into `output`, each by one of `workers` threads: by default all cores.

    `progress` is told how many bytes of how many are written. Raises CandidateError where a number
    that is checked is NaN or infinite, RunError where the disk fails or is full.
    """
    done, total = 0, total_bytes(tensors)
    count = workers or cores()
    stop = threading.Event()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    with thread_count_kept(), pool:
        running = [pool.submit(_write_tensor, tensor, output, stop) for tensor in tensors]
        try:
            for ended in as_completed(running):
                done += ended.result()
                if progress is not None:
                    progress(done, total)
        finally:
            stop.set()  # after an error, or Ctrl-C


def _write_tensor(tensor: PartTensor, output: ShardedOutput, stop: threading.Event) -> int:
    """Computes one tensor into `output`; the number of its bytes."""
    for start, out in tensor.parts():
        if stop.is_set():
            break
        if tensor.checked and has_overflow(out):
            raise CandidateError(f"{tensor.name}: has NaN or infinite numbers")
        output.write(tensor.name, start, bytes_of(out.contiguous()))
    return total_bytes([tensor])


def cut(flat: Tensor, start: int, stop: int) -> Tensor:
    """The part of a tensor that is there already, as one line."""
    return flat[start:stop]
