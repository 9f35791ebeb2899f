"""A plan's tensors, computed and written piece by piece on every core, in any order.

One worker reads a piece of the inputs, computes it and writes it to its place, each in memory that
it uses again; while one waits for a file, another computes. So a merge takes little more time than
its bytes take, and as little memory for a large model as for a small one.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import CandidateError
from evomerge.merge.blends import Blend, Pieces, Recall
from evomerge.merge.checkpoint import (
    Checkpoint,
    InputFiles,
    ShardedOutput,
    bytes_of,
    total_bytes,
)
from evomerge.merge.dtypes import DType, dtype_of
from evomerge.merge.headers import TensorHeader
from evomerge.merge.native import NativeBlend, native_blend
from evomerge.merge.plan import MergePlan, PlanEntry

if TYPE_CHECKING:
    from evomerge.merge.recall import Statistics

# Large enough that the calls of a piece are a small part of its time, small enough that its
# temporaries stay in the caches: half of it takes 3 to 20 % more time, twice as much 25 %.
PIECE_ELEMENTS = 1 << 18
# Between two calls of torch a worker holds the interpreter; more than these would queue for it.
MOST_WORKERS = 8

Progress = Callable[[int, int], None]


def write_merged(
    plan: MergePlan,
    checkpoints: Mapping[str, Checkpoint],
    output: ShardedOutput,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
) -> None:
    """Computes every tensor of `plan` into `output`; the same bits for any number of `workers`.

    By default there is one for each core that this process may use. `progress` is told how many
    bytes of how many are written, by one thread at a time. `statistics` remembers what methods
    found out of whole tensors, for the next candidate of a search. Memory needed: some megabytes
    for each worker, and what a method needs for its statistics of a whole tensor. Raises
    CandidateError where a number of the output is NaN or infinite, or where there is none; RunError
    where the disk fails or is full; ConfigError where an input cannot be read.
    """
    count = workers or min(cores(), MOST_WORKERS)
    native = native_blend()
    with InputFiles() as files, _workers(count, _needs_torch(plan, checkpoints, native)) as pool:
        work = _Work(plan.entries, progress)
        try:
            running = [
                pool.submit(_Worker(plan, checkpoints, files, output, native, statistics).run, work)
                for _ in range(count)
            ]
            for ended in as_completed(running):
                ended.result()
        finally:
            work.stop()  # after an error, or Ctrl-C: the workers end with their pieces


@contextmanager
def _workers(count: int, needs_torch: bool) -> Iterator[ThreadPoolExecutor]:
    """That many threads; torch computes in each of them alone, as the other cores have theirs."""
    if not needs_torch:
        with ThreadPoolExecutor(count) as pool:
            yield pool
        return
    from evomerge.merge import kernels

    kernels.keep_freed_memory()
    with (
        kernels.thread_count_kept(),
        ThreadPoolExecutor(count, initializer=kernels.use_one_thread) as pool,
    ):
        yield pool


def _needs_torch(
    plan: MergePlan, checkpoints: Mapping[str, Checkpoint], native: NativeBlend | None
) -> bool:
    """Whether an entry is more than a blend of what is in the files, or more than `native` does."""
    return native is None or any(
        entry.numbers is not None
        or plan.makes_inputs(entry)
        or not native.takes([entry.dtype, *(one.dtype for one in _headers(entry, checkpoints))])
        for entry in plan.entries
    )


def _headers(entry: PlanEntry, checkpoints: Mapping[str, Checkpoint]) -> list[TensorHeader]:
    return [checkpoints[source.model].tensors[source.name] for source in entry.inputs]


class _Line(Protocol):
    """A flattened tensor, or what gives ranges of itself as one does."""

    def __getitem__(self, part: slice, /) -> Any: ...


@dataclass(frozen=True)
class _Blended:
    """A blend, and where its inputs are: in files, or made for it (one line of numbers each)."""

    blend: Blend
    inputs: tuple[TensorHeader | _Line, ...]
    dtypes: tuple[DType, ...]


@dataclass(frozen=True)
class _Piece:
    """The flat elements [start, stop) of an output tensor, and what they are made of."""

    entry: PlanEntry
    ready: _Blended | Pieces
    start: int
    stop: int


class _Work:
    """What the workers have yet to do: pieces of tensors that are prepared, then other tensors."""

    def __init__(self, entries: Sequence[PlanEntry], progress: Progress | None) -> None:
        self._entries = deque(entries)
        self._pieces: deque[_Piece] = deque()
        self._preparing = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._progress = progress
        self._written, self._total = 0, total_bytes(entries)

    def take(self) -> _Piece | PlanEntry | None:
        """The next piece, or an entry to be prepared and handed to `add`; None at the end."""
        with self._changed:
            while not self._stopped:
                if self._pieces:
                    return self._pieces.popleft()
                if self._entries:
                    self._preparing += 1
                    return self._entries.popleft()
                if not self._preparing:
                    break
                self._changed.wait()
            return None

    def add(self, pieces: Iterable[_Piece]) -> None:
        with self._changed:
            self._pieces.extend(pieces)
            self._preparing -= 1
            self._changed.notify_all()

    def done(self, num_bytes: int) -> None:
        with self._changed:
            self._written += num_bytes
            if self._progress is not None:
                self._progress(self._written, self._total)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@dataclass
class _Worker:
    """What one thread does, in memory that it uses for piece after piece."""

    plan: MergePlan
    checkpoints: Mapping[str, Checkpoint]
    files: InputFiles
    output: ShardedOutput
    native: NativeBlend | None
    statistics: Statistics | None
    memory: dict[str, memoryview] = field(default_factory=dict)  # by purpose

    def run(self, work: _Work) -> None:
        try:
            while (task := work.take()) is not None:
                if isinstance(task, PlanEntry):
                    work.add(self._prepared(task))
                else:
                    work.done(self._write(task))
        except BaseException:
            work.stop()
            raise

    def _prepared(self, entry: PlanEntry) -> list[_Piece]:
        """The pieces of an entry, once what it needs of whole tensors is known."""
        headers = _headers(entry, self.checkpoints)
        dtypes = tuple(header.dtype for header in headers)
        if entry.numbers is None and not self.plan.makes_inputs(entry):
            return _cut(entry, _Blended(entry.blend, tuple(headers), dtypes), 1)
        from evomerge.merge.kernels import prepare

        tensors = self.plan.read_inputs(entry, self.checkpoints)
        ready = prepare(entry, tensors, self._recall(entry))
        if isinstance(ready, Pieces):
            return _cut(entry, ready, ready.step)
        if not self.plan.makes_inputs(entry):
            return _cut(entry, _Blended(ready, tuple(headers), dtypes), 1)
        lines = tuple(tensor.reshape(-1) for tensor in tensors)
        dtypes = tuple(dtype_of(tensor.dtype) for tensor in tensors)
        return _cut(entry, _Blended(ready, lines, dtypes), 1)

    def _recall(self, entry: PlanEntry) -> Recall:
        from evomerge.merge.recall import Statistics

        # What is made of the files for this recipe alone bears no name of its own, and is
        # remembered for this tensor only: one method may ask twice.
        if self.statistics is None or self.plan.makes_inputs(entry):
            return Statistics().of(entry.name)
        return self.statistics.of(entry.inputs)

    def _write(self, piece: _Piece) -> int:
        """Computes and writes one piece; the number of its bytes."""
        dtype = piece.entry.dtype
        out = self._reused("out", (piece.stop - piece.start) * dtype.itemsize)
        if isinstance(piece.ready, Pieces):
            from evomerge.merge.kernels import piece_bytes

            finite = piece_bytes(piece.ready, piece.start, piece.stop, out, dtype)
        else:
            finite = self._blend(piece.ready, piece.start, piece.stop, out, dtype)
        if not finite:
            raise CandidateError(f"{piece.entry.name}: has NaN or infinite numbers after the merge")
        self.output.write(piece.entry.name, piece.start, out)
        return len(out)

    def _blend(
        self, blended: _Blended, start: int, stop: int, out: memoryview, dtype: DType
    ) -> bool:
        """Computes a piece of a blend into `out`; whether all numbers of it are finite."""
        pieces = []
        for slot, (source, its) in enumerate(zip(blended.inputs, blended.dtypes, strict=True)):
            if not isinstance(source, TensorHeader):
                pieces.append(bytes_of(source[start:stop]))
                continue
            piece = self._reused(f"input {slot}", (stop - start) * its.itemsize)
            self.files.read(source, start, piece)
            pieces.append(piece)
        if self.native is not None and self.native.takes([dtype, *blended.dtypes]):
            return self.native(blended.blend, pieces, blended.dtypes, out, dtype)
        from evomerge.merge.kernels import blend_bytes

        return blend_bytes(blended.blend, pieces, blended.dtypes, out, dtype)

    def _reused(self, purpose: str, size: int) -> memoryview:
        """`size` bytes of any content, valid until this is asked for the same purpose again."""
        if len(self.memory.get(purpose, b"")) < size:
            self.memory[purpose] = memoryview(mmap.mmap(-1, size))
        return self.memory[purpose][:size]


def _cut(entry: PlanEntry, ready: _Blended | Pieces, step: int) -> list[_Piece]:
    """The pieces of an entry, of whole steps and about PIECE_ELEMENTS each."""
    total, size = math.prod(entry.shape), step * max(1, PIECE_ELEMENTS // step)
    return [
        _Piece(entry, ready, start, min(start + size, total)) for start in range(0, total, size)
    ]


def cores() -> int:
    """The cores that this process may use; where the system does not say, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
