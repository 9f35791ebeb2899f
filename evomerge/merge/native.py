"""The kernels of `blend.c`: compiled once by the system's compiler, kept in the user's cache.

One pass over a piece, and no torch: importing that takes longer than merging a model of a billion
parameters. The bits are those of the kernels in `methods.py`, which stand in where there is no
compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from evomerge.merge.blends import Blend, split_weight
from evomerge.merge.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType

SOURCE = Path(__file__).with_name("blend.c")
COMPILERS = ("cc", "gcc", "clang")
# No contraction, no fast maths: every operation rounds for itself, as in torch.
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC")
_FOR_THIS_CPU = "-march=native"
_COMPILER_SECONDS = 60
# In the order of the enumerations in the source.
_DTYPES = {dtype: number for number, dtype in enumerate((BFLOAT16, FLOAT16, FLOAT32))}
_KERNELS = {
    name: number for number, name in enumerate(("linear", "task_arithmetic", "passthrough"))
}


class NativeBlend:
    """A `Blend` over memory, rounded once; several threads may call it at once."""

    def __init__(self, library: Path) -> None:
        """Loads a library made of `blend.c`; OSError where it is none, or computes other bits."""
        loaded = ctypes.CDLL(str(library))
        if not hasattr(loaded, "evomerge_blend"):
            raise OSError(f"{library}: is not made of {SOURCE.name}")
        self._call = loaded.evomerge_blend
        self._call.argtypes = [
            *(ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        ]
        if not self._rounds_every_operation():
            raise OSError(f"{library}: its compiler keeps not to the rules of arithmetic")

    @staticmethod
    def takes(dtypes: Sequence[DType]) -> bool:
        """Whether it computes with inputs and outputs of these types: all but float64."""
        return all(dtype in _DTYPES for dtype in dtypes)

    def __call__(
        self,
        blend: Blend,
        inputs: Sequence[memoryview],
        dtypes: Sequence[DType],
        out: memoryview,
        dtype: DType,
    ) -> bool:
        """Fills the bytes `out` with numbers of `dtype`; whether all of them are finite.

        `inputs`, of as many numbers, have `dtypes`. No memory may overlap `out`.
        """
        words = [split_weight(weight) for weight in blend.weights]
        count, number = len(out) // dtype.itemsize, len(inputs)
        assert all(
            len(one) == count * its.itemsize for one, its in zip(inputs, dtypes, strict=True)
        )
        assert len(words) == {"linear": number, "task_arithmetic": number - 1}.get(blend.kernel, 0)
        floats = ctypes.c_float * len(words)
        finite: int = self._call(
            _KERNELS[blend.kernel],
            count,
            number,
            (ctypes.c_void_p * number)(*map(_address, inputs)),
            (ctypes.c_int * number)(*(_DTYPES[one] for one in dtypes)),
            floats(*(high for high, _ in words)),
            floats(*(low for _, low in words)),
            _address(out),
            _DTYPES[dtype],
        )
        return bool(finite)

    def _rounds_every_operation(self) -> bool:
        """Whether products round before they are added, and the smallest numbers are not lost.

        (1 + 2^-7)·(1 + 2^-23) − (1 + 2^-7 + 2^-23) is 0 if the product is rounded, else 2^-30.
        """
        count = 37  # whole vectors and a rest
        numbers = (1 + 2**-7 + 2**-23, 1 + 2**-23, 2.0**-140)
        inputs = [memoryview(bytearray(struct.pack("f", one) * count)) for one in numbers]
        out = memoryview(bytearray(4 * count))
        self(Blend("linear", (-1.0, 1 + 2**-7, 0.5)), inputs, [FLOAT32] * 3, out, FLOAT32)
        return struct.unpack(f"{count}f", out) == (2.0**-141,) * count


@functools.cache
def native_blend() -> NativeBlend | None:
    """The kernel, compiled now or before; None where there is no compiler that can."""
    compiler = _compiler()
    if compiler is None:
        return None
    folder = _cache_folder()
    if folder is None:  # nothing is kept, then
        with tempfile.TemporaryDirectory() as made:
            return _made(compiler, Path(made))
    with suppress(OSError):
        return NativeBlend(_trusted(folder / _library_name(compiler)))
    return _made(compiler, folder)


def _made(compiler: Sequence[str], folder: Path) -> NativeBlend | None:
    """The kernel compiled into `folder`; None where the compiler fails."""
    library = folder / _library_name(compiler)
    for flags in ((*_FLAGS, _FOR_THIS_CPU), _FLAGS):
        with suppress(OSError, subprocess.SubprocessError):
            with tempfile.TemporaryDirectory(dir=folder) as made:
                partial = Path(made) / library.name
                _run([*compiler, *flags, str(SOURCE), "-o", str(partial)])
                partial.chmod(0o700)
                blend = NativeBlend(partial)
                partial.replace(library)  # whole or absent: other processes look for it
            return blend
    return None


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_COMPILER_SECONDS,
    )


def _compiler() -> list[str] | None:
    """The command of the C compiler: $CC, else the first of the usual names that is there."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:
        return None
    for name, *options in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(name):
            return [path, *options]
    return None


def _cache_folder() -> Path | None:
    """The folder of kernels in the user's cache; None where it cannot be made or trusted."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
        folder = home / "evomerge"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _trusted(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def _trusted(path: Path) -> Path:
    """`path`, if nobody but this user can have written to it; else OSError.

    What lies there is run as this user's own code.
    """
    status = path.lstat()
    if (
        stat.S_ISLNK(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise PermissionError(f"{path}: can be written by others")
    return path


def _library_name(compiler: Sequence[str]) -> str:
    """Another name for all that the machine code depends on: source, compiler, flags, processor."""
    status = Path(compiler[0]).stat()
    told = [*compiler, status.st_size, status.st_mtime_ns, *_FLAGS, _FOR_THIS_CPU, _processor()]
    content = SOURCE.read_bytes() + "\n".join(map(str, told)).encode()
    return f"blend-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _processor() -> str:
    """What this processor can do, as the system tells it; else which machine it is."""
    lines: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            lines.setdefault(key.strip(), value.strip())
    known = [lines.get(key, "") for key in ("model name", "flags", "Features", "CPU part", "isa")]
    return " ".join([os.uname().machine, *(known if any(known) else [os.uname().nodename])])


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
