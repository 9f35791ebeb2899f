"""A plan's tensors, computed and written piece by piece on every core, in any order.

One worker reads a piece of the inputs, computes it and writes it to its place, each in memory that
it uses again; while one waits for a file, another computes. So a merge takes little more time than
its bytes take, and as little memory for a large model as for a small one.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merge.checkpoint import (
    Checkpoint,
    InputFiles,
    ShardedOutput,
    TensorHeader,
    total_bytes,
)
from evomerge.merge.kernels import prepare
from evomerge.merge.methods import (
    KERNELS,
    Kernel,
    Pieces,
    Recall,
    has_overflow,
    weight_words,
    working_dtype,
)
from evomerge.merge.plan import MergePlan, PlanEntry
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
    _keep_freed_memory()
    count = workers or min(cores(), MOST_WORKERS)
    with InputFiles() as files, thread_count_kept(), ThreadPoolExecutor(count) as pool:
        work = _Work(plan.entries, progress)
        try:
            running = [
                pool.submit(_Worker(plan, checkpoints, files, output, statistics).run, work)
                for _ in range(count)
            ]
            for ended in as_completed(running):
                ended.result()
        finally:
            work.stop()  # after an error, or Ctrl-C: the workers end with their pieces


@dataclass(frozen=True)
class _Blended:
    """A kernel with the words of its weights, and where the inputs are: in files, or at hand."""

    kernel: Kernel
    words: Tensor
    inputs: tuple[TensorHeader | Tensor, ...]


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


class _Worker:
    """What one thread does, in memory that it uses for piece after piece."""

    def __init__(
        self,
        plan: MergePlan,
        checkpoints: Mapping[str, Checkpoint],
        files: InputFiles,
        output: ShardedOutput,
        statistics: Statistics | None,
    ) -> None:
        self._plan = plan
        self._statistics = statistics
        self._checkpoints = checkpoints
        self._files = files
        self._output = output
        self._memory: dict[str, Tensor] = {}  # bytes by purpose, and the last vector of each
        self._last: dict[str, Tensor] = {}

    def run(self, work: _Work) -> None:
        torch.set_num_threads(1)  # of this thread: the other cores have workers of their own
        try:
            with torch.no_grad():
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
        tensors = self._plan.read_inputs(entry, self._checkpoints)
        ready = prepare(entry, tensors, self._recall(entry))
        if isinstance(ready, Pieces):
            return _cut(entry, ready, ready.step)
        dtype = working_dtype([torch.empty(0, dtype=entry.dtype), *tensors])
        inputs: Sequence[TensorHeader | Tensor] = [
            self._checkpoints[source.model].tensors[source.name] for source in entry.inputs
        ]
        if self._plan.makes_inputs(entry):
            inputs = [tensor.reshape(-1) for tensor in tensors]
        words = weight_words(ready.weights, dtype)
        return _cut(entry, _Blended(KERNELS[ready.kernel], words, tuple(inputs)), 1)

    def _recall(self, entry: PlanEntry) -> Recall:
        # What is made of the files for this recipe alone bears no name of its own, and is
        # remembered for this tensor only: one method may ask twice.
        if self._statistics is None or self._plan.makes_inputs(entry):
            return Statistics().of(entry.name)
        return self._statistics.of(entry.inputs)

    def _write(self, piece: _Piece) -> int:
        """Computes and writes one piece; the number of its bytes."""
        out = self._reused("out", piece.entry.dtype, piece.stop - piece.start)
        if isinstance(piece.ready, Pieces):
            piece.ready.fill(out, piece.start, piece.stop)
        else:
            self._blend(out, piece.ready, piece.start)
        if has_overflow(out):
            raise CandidateError(f"{piece.entry.name}: has NaN or infinite numbers after the merge")
        self._output.write(piece.entry.name, piece.start, out)
        return out.nbytes

    def _blend(self, out: Tensor, blended: _Blended, start: int) -> None:
        pieces = []
        for slot, source in enumerate(blended.inputs):
            if isinstance(source, Tensor):
                pieces.append(source[start : start + len(out)])
                continue
            piece = self._reused(f"input {slot}", source.dtype, len(out))
            self._files.read(source, start, piece)
            pieces.append(piece)
        blended.kernel(out, pieces, blended.words)

    def _reused(self, purpose: str, dtype: torch.dtype, size: int) -> Tensor:
        """A vector of any content, valid until this is asked for the same purpose again."""
        last = self._last.get(purpose)
        if last is not None and last.dtype == dtype and len(last) == size:
            return last
        needed = size * dtype.itemsize
        if purpose not in self._memory or len(self._memory[purpose]) < needed:
            self._memory[purpose] = torch.empty(needed, dtype=torch.uint8)
        self._last[purpose] = self._memory[purpose][:needed].view(dtype)
        return self._last[purpose]


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


def _keep_freed_memory() -> None:
    """Frees one large block, after which glibc keeps smaller ones that are freed (mallopt(3)).

    Until then it gives temporaries of a piece back to the system, which has to map and to clear
    them anew for the next piece: ten times the time of computing it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def thread_count_kept() -> Iterator[None]:
    """Threads that torch is first used in later take the number that was set last, anywhere."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
