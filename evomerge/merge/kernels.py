"""Runs a merge method over one tensor: compiled where a C++ compiler is present, else in chunks.

Both ways give the same bits (tests/merge/test_kernels.py), so the choice is one of speed alone:
compiled, a merge takes little more than its memory traffic; in chunks 4 to 6 times that. Compiling
costs some seconds once per machine (the compiler's cache keeps the kernels), which pays for models
that are merged many times.
"""

from __future__ import annotations

import functools
import shutil
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merge.blends import METHODS, Blend, Pieces, Recall, recall_nothing
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.dtypes import FLOAT64, DType
from evomerge.merge.methods import KERNELS, Kernel, has_overflow, weight_words, working_dtype
from evomerge.merge.plan import MergePlan, PlanEntry

# The float32 temporaries of a chunk fit into a core's second-level cache, and torch does not split
# so few elements over threads: on busy cores those wait for each other (0.1 s against up to 9 s).
CHUNK_ELEMENTS_CPU = 1 << 15
CHUNK_ELEMENTS_GPU = 1 << 24
# Below this many output elements a whole eager merge takes less than compiling would save in a
# search of some hundred candidates.
COMPILE_PAYS_ELEMENTS = 30_000_000


@functools.cache
def can_compile() -> bool:
    """Whether torch's compiler works here: it wants a C++ compiler and Python's headers.

    Compiles and runs a small kernel, or finds it in the compiler's cache.
    """
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file() or not any(shutil.which(name) for name in ("g++", "clang++")):
        return False
    numbers = torch.arange(4.0)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, which may be errors here
            _compiled("linear", 1)(torch.empty(4), [numbers], torch.ones(2, 1))
    except Exception:  # a compiler that does not work fails in many ways, and eager kernels do
        return False
    return True


def compile_pays(elements: int, device: torch.device) -> bool:
    """Whether compiled kernels are worth their start-up for a model of so many output elements.

    Only on CPUs: a GPU's compiler may contract a multiplication and an addition into one rounding,
    and then the live model would differ from the one on disk.
    """
    return device.type == "cpu" and elements >= COMPILE_PAYS_ELEMENTS and can_compile()


def merge_into(
    out: Tensor,
    method: str,
    inputs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    compiled: bool = False,
) -> None:
    """Fills `out` with `method` over `inputs`, computed in float32 and rounded once.

    (In float64, where `out` or an input is float64.) `out` may be a view into a larger parameter;
    `inputs` have its shape and lie on its device.
    """
    words = weight_words(weights, working_dtype([out, *inputs])).to(out.device)
    out, inputs = _flattened(out, inputs)
    with torch.no_grad():
        if compiled and method != "passthrough":
            _compiled(method, len(inputs))(out, inputs, words)
        else:
            _in_chunks(KERNELS[method], out, inputs, words)


def merge_entry(
    out: Tensor,
    entry: PlanEntry,
    inputs: Sequence[Tensor],
    *,
    recall: Recall = recall_nothing,
    compiled: bool = False,
) -> None:
    """Fills `out`, of the entry's shape and dtype, with the tensor that the entry plans.

    `inputs` are the entry's source tensors, whole and in its order. Raises CandidateError where its
    numbers give no tensor.
    """
    ready = prepare(entry, inputs, recall)
    if isinstance(ready, Blend):
        merge_into(out, ready.kernel, inputs, ready.weights, compiled=compiled)
    else:
        fill_pieces(out, ready)


def prepare(entry: PlanEntry, inputs: Sequence[Tensor], recall: Recall) -> Blend | Pieces:
    """What is left to do element by element once the statistics of whole tensors are known.

    Raises CandidateError where the entry's numbers give no tensor.
    """
    if entry.numbers is None:
        return entry.blend
    base, others = (inputs[0], inputs[1:]) if entry.has_base else (None, inputs)
    try:
        with torch.no_grad():
            return METHODS[entry.method](base, others, recall=recall, **entry.numbers)
    except ValueError as error:
        raise CandidateError(f"{entry.name}: {error}") from error


def fill_pieces(out: Tensor, pieces: Pieces) -> None:
    """Fills the contiguous `out` piece by piece, so that temporaries stay in the cache."""
    limit = CHUNK_ELEMENTS_CPU if out.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    size = pieces.step * max(1, limit // pieces.step)
    flat = out.view(-1)
    with torch.no_grad():
        for start in range(0, flat.numel(), size):
            stop = min(start + size, flat.numel())
            pieces.fill(flat[start:stop], start, stop)


def merged_tensors(
    plan: MergePlan, checkpoints: Mapping[str, Checkpoint]
) -> Iterator[tuple[str, Tensor]]:
    """The plan's output tensors on the CPU, one after another, in the order of its entries.

    Raises CandidateError where a number of the output is NaN or infinite.
    """
    from evomerge.merge.vocabulary import AlignedRows

    for entry in plan.entries:
        inputs = [
            one.whole() if isinstance(one, AlignedRows) else one
            for one in plan.read_inputs(entry, checkpoints)
        ]
        out = torch.empty(entry.shape, dtype=entry.dtype.torch)
        merge_entry(out, entry, inputs)
        if has_overflow(out):
            raise CandidateError(f"{entry.name}: has NaN or infinite numbers after the merge")
        yield entry.name, out


def blend_bytes(
    blend: Blend,
    inputs: Sequence[memoryview],
    dtypes: Sequence[DType],
    out: memoryview,
    dtype: DType,
) -> bool:
    """Fills the bytes `out` with a piece of a blend; whether all numbers of it are finite.

    What `native.NativeBlend` does, by torch: eagerly, for numbers of any type.
    """
    tensors = [_tensor(one, its) for one, its in zip(inputs, dtypes, strict=True)]
    target = _tensor(out, dtype)
    words = _words(blend.weights, FLOAT64 in (dtype, *dtypes))
    with torch.no_grad():
        KERNELS[blend.kernel](target, tensors, words)
    return not has_overflow(target)


def piece_bytes(pieces: Pieces, start: int, stop: int, out: memoryview, dtype: DType) -> bool:
    """Fills the bytes `out` with the elements [start, stop); whether all of them are finite."""
    target = _tensor(out, dtype)
    with torch.no_grad():
        pieces.fill(target, start, stop)
    return not has_overflow(target)


def _tensor(memory: memoryview, dtype: DType) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype.torch)


@functools.lru_cache(maxsize=64)  # the pieces of a tensor ask one after another
def _words(weights: tuple[float, ...], wide: bool) -> Tensor:
    return weight_words(weights, torch.float64 if wide else torch.float32)


def use_one_thread() -> None:
    """torch computes in this thread alone when it is called by it."""
    torch.set_num_threads(1)


@contextmanager
def thread_count_kept() -> Iterator[None]:
    """Threads that torch is first used in later take the number that was set last, anywhere."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Frees one large block, after which glibc keeps smaller ones that are freed (mallopt(3)).

    Until then it gives temporaries of a piece back to the system, which has to map and to clear
    them anew for the next piece: ten times the time of computing it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _flattened(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same memory as vectors where it is contiguous: one kernel then fits every shape."""
    if out.is_contiguous() and all(tensor.is_contiguous() for tensor in inputs):
        return out.view(-1), [tensor.view(-1) for tensor in inputs]
    return out, list(inputs)


def _in_chunks(method: Kernel, out: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    """`method` piece by piece along the first dimension, so that temporaries stay in the cache."""
    limit = CHUNK_ELEMENTS_CPU if out.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    if out.numel() <= limit or out.dim() == 0:
        method(out, inputs, weights)
        return
    step = max(1, limit * out.shape[0] // out.numel())
    for start in range(0, out.shape[0], step):
        piece = slice(start, start + step)
        method(out[piece], [tensor[piece] for tensor in inputs], weights)


@functools.cache
def _compiled(method: str, number_of_inputs: int) -> Callable[..., None]:
    """`method` as one fused loop, specialised on the number of inputs only.

    Every pair gets a code object of its own, because the compiler counts its specialisations per
    code object and refuses the ninth.
    """
    del number_of_inputs
    function = KERNELS[method]
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., None] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled
