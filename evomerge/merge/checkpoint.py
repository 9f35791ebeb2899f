"""Checkpoints on disk: safetensors read lazily and written in a stream; folders whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from evomerge.errors import ConfigError, OutputExistsError, RunError, shown
from evomerge.merge.dtypes import BY_CODE, DType

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.merge.architecture import Architecture

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
ADAPTER_CONFIG = "adapter_config.json"
MARKER_FILE = ".evomerge-partial"

# Any one of them is enough to make a tokenizer from.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# All that a tokenizer may consist of; TEMPLATE_FOLDER may hold more of its chat templates.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes


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


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its config and its tensors' headers; numbers are read when asked for."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    _files: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """The checkpoint in `directory`, from config.json and safetensors headers alone.

        Raises ConfigError where something is missing, truncated or not safetensors.
        """
        if not directory.is_dir():
            raise ConfigError(f"{directory}: there is no such model directory")
        config = read_json(directory / CONFIG_FILE)
        single, index = directory / SINGLE_FILE, directory / INDEX_FILE
        if single.is_file():  # before an index, as transformers has it
            tensors = _read_headers(single)
        elif index.is_file():
            tensors = _read_indexed_headers(index)
        else:
            raise ConfigError(_no_weights_message(directory))
        return cls(directory, config, tensors)

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, mapped from its file: no copy, pages read when touched.

        It must not be written to.
        """
        file = self.tensors[name].file
        if file not in self._files:
            self._files[file] = _open_tensors(file)
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor

    @cached_property
    def architecture(self) -> Architecture:
        """Which tensor is in which layer; ConfigError where they are not those of one model."""
        from evomerge.merge.architecture import read_architecture

        return read_architecture(self)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, by name."""
        return tuple(sorted({header.file for header in self.tensors.values()}))

    def fingerprint(self) -> str:
        """A hash of all that decides the model's answers: another model, another hash.

        Of tensors it takes headers, sizes and modification times, of the small files the content:
        config, tokenizer, chat templates, generation config.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, header in sorted(self.tensors.items()):
            # With the names that types had in studies before.
            digest.update(
                f"{name} torch.{header.dtype} {header.shape} {header.file.name}\n".encode()
            )
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for file in _small_files(self.directory):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(self.directory)} {content}\n".encode())
        return digest.hexdigest()


def require_tokenizer(directory: Path) -> None:
    """Raises ConfigError where `directory` has nothing to make a tokenizer from."""
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(
            f"{directory}: this model has no tokenizer (one of {', '.join(VOCABULARY_FILES)}); "
            "copy the one that it was trained with into it"
        )


def read_tensor_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped, by name; ConfigError where it is damaged."""
    headers = _read_headers(file)
    checkpoint = Checkpoint(file.parent, {}, headers)
    return {name: checkpoint.read(name) for name in headers}


class InputFiles:
    """Files of tensors, read piece by piece into memory that is used again and again.

    Faster than `Checkpoint.read`: no page is mapped, and a piece comes to lie in the processor's
    cache. Several threads may read at once. A context manager, which owns the open files.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, tensor: TensorHeader, start: int, piece: memoryview) -> None:
        """Fills `piece` with the bytes of the tensor's flat elements from `start` on.

        Raises ConfigError where the file cannot be read or has become shorter.
        """
        rest, place = piece, tensor.begin + start * tensor.dtype.itemsize
        try:
            descriptor = self._opened(tensor.file)
            while rest:
                count = os.preadv(descriptor, [rest], place)
                if not count:
                    raise ConfigError(
                        f"{tensor.file}: ends within {tensor.name}, so it has changed since it was "
                        "opened; fetch it again"
                    )
                rest, place = rest[count:], place + count
        except OSError as error:
            raise ConfigError(f"{tensor.file}: cannot be read ({error.strerror})") from error

    def _opened(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


class ShardedOutput:
    """The safetensors files of a model in the making, where every tensor has its place beforehand.

    `write` fills the places in any order, from several threads at once. A context manager: left
    without an error, all numbers have been written and the model is complete.
    """

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], max_shard_size: int) -> None:
        """Makes model.safetensors in `directory`, or numbered shards of at most `max_shard_size`.

        That counts the bytes of the numbers alone; a larger tensor gets its own file. Raises
        RunError where the disk fails or is full.
        """
        self._directory = directory
        self._shards = _cut_into_shards(specs, max_shard_size)
        self._file_of: dict[str, _OutputFile] = {}
        with self._disk_failures_named():
            for file_name, shard in self._shards.items():
                file = _OutputFile(directory / file_name, shard)
                self._file_of |= dict.fromkeys((spec.name for spec in shard), file)
        assert len(self._file_of) == len(specs), "two tensors of one name"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._disk_failures_named():
            for file in set(self._file_of.values()):
                file.close()
                assert kind or not file.missing, f"{file.path}: lacks {file.missing} bytes"
            if kind is None and list(self._shards) != [SINGLE_FILE]:
                _write_index(self._directory / INDEX_FILE, self._shards)

    def write(self, name: str, start: int, numbers: memoryview) -> None:
        """Puts the bytes of `numbers` into tensor `name`, as its flat elements from `start` on.

        Raises RunError where the disk fails or is full.
        """
        with self._disk_failures_named():
            self._file_of[name].write(name, start, numbers)

    @contextmanager
    def _disk_failures_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_failure(self._directory, error) from error


class _OutputFile:
    """One file of a `ShardedOutput`, open from the first number to the last.

    `missing` counts the bytes that it waits for.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header, offsets = _layout(specs)
        with path.open("xb") as file:
            file.write(header)
        self.path = path
        self.missing = total_bytes(specs)
        self._places = {name: len(header) + offset for name, offset in offsets.items()}
        self._itemsizes = {spec.name: spec.dtype.itemsize for spec in specs}
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(self, name: str, start: int, numbers: memoryview) -> None:
        descriptor, rest = self._opened(), numbers
        place = self._places[name] + start * self._itemsizes[name]
        while rest:
            count = os.pwrite(descriptor, rest, place)
            rest, place = rest[count:], place + count
        with self._lock:
            self.missing -= len(numbers)
            if not self.missing:  # many small shards are more than a process may hold open
                self.close()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _opened(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY)
            return self._descriptor


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """The bytes of all numbers of `specs`."""
    return sum(_num_bytes(spec) for spec in specs)


def disk_failure(path: Path, error: OSError) -> RunError:
    """The error to raise for an OSError while writing to `path`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: the disk is full ({reason}); free some space and run it again")
    return RunError(f"{path}: writing failed ({reason})")


@contextmanager
def published(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` only when the block ends without an error.

    So a directory that exists is whole; what a killed writer leaves behind ends in `.partial`, and
    the next writer removes it. What it replaces is `.replaced` until it is gone, marked as ours.
    Raises OutputExistsError, before the block runs, where `directory` is there, not empty and not
    to be overwritten; ConfigError where it cannot be made, or a folder of others has such a name.
    """
    directory = directory.absolute()
    _refuse_taken(directory, overwrite=overwrite)
    partial = directory.with_name(directory.name + ".partial")
    with ExitStack() as stack:
        try:
            _remove_if_ours(partial)
            if _is_filled(directory):
                _remove_if_ours(_replaced(directory))
            partial.mkdir(parents=True)
            stack.enter_context(_marked(partial))
        except OSError as error:
            raise ConfigError(
                f"{partial}: cannot be made ({error.strerror}); choose another folder"
            ) from error
        try:
            yield partial
            _replace(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raises OutputExistsError where `directory` is taken; `overwrite` replaces models alone."""
    _refuse_taken(directory, overwrite=overwrite)
    if _is_filled(directory) and not (directory / CONFIG_FILE).is_file():
        raise OutputExistsError(
            f"{directory}: is not empty and no model directory, so it is not replaced; "
            "choose another name"
        )


def _refuse_taken(directory: Path, *, overwrite: bool) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OutputExistsError(f"{directory}: exists and is no folder; choose another name")
    if not overwrite and _is_filled(directory):
        raise OutputExistsError(
            f"{directory}: exists and is not empty; choose another name or say --overwrite"
        )


def _small_files(directory: Path) -> list[Path]:
    """What beside config and tensors decides a model's answers."""
    named = [directory / name for name in (*TOKENIZER_FILES, GENERATION_FILE)]
    templates = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    return [file for file in (*named, *templates) if file.is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file; ConfigError where it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent}: has no {path.name}, so it is no model directory"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: should be a JSON object")
    return content


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    """The headers of one safetensors file, in the order of the file's header.

    Raises ConfigError where the file is shorter or longer than its header says, or where a tensor
    has other bytes than its shape and dtype need.
    """
    header, data_start = _read_raw_header(file)
    header.pop("__metadata__", None)
    tensors, places = {}, {}
    for name, entry in header.items():
        try:
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
        if min(header.shape, default=0) < 0 or end - begin != _num_bytes(header):
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


def _open_tensors(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(file, framework="pt")
    except safetensors.SafetensorError as error:  # of what our own checks of headers let through
        raise ConfigError(f"{file}: is damaged ({error}); fetch the file again") from error


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


def _read_indexed_headers(index: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: has no weight_map")
    by_file = {name: _indexed_file(index, name) for name in sorted(set(weight_map.values()))}
    tensors = {}
    for name, file_name in weight_map.items():
        if name not in by_file[file_name]:
            raise ConfigError(f"{index}: says that {name} is in {file_name}, but it is not")
        tensors[name] = by_file[file_name][name]
    return tensors


def _indexed_file(index: Path, file_name: object) -> dict[str, TensorHeader]:
    if not isinstance(file_name, str) or Path(file_name).name != file_name:
        raise ConfigError(f"{index}: {file_name!r} should be the name of a file beside it")
    file = index.with_name(file_name)
    if not file.is_file():
        raise ConfigError(f"{index}: names {file_name}, which is missing; fetch it again")
    return _read_headers(file)


def _no_weights_message(directory: Path) -> str:
    message = f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if any(directory.glob("pytorch_model*.bin")):
        message += "; only safetensors is read: save the model again with safe_serialization=True"
    return message


def _num_bytes(spec: TensorSpec) -> int:
    return spec.dtype.itemsize * math.prod(spec.shape)


def _cut_into_shards(
    specs: Sequence[TensorSpec], max_shard_size: int
) -> dict[str, list[TensorSpec]]:
    """The tensors of each file by its name, in order; greedy, no empty file."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + _num_bytes(spec) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += _num_bytes(spec)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def _layout(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the numbers, and each tensor's offset after them.

    Wide dtypes come first, so that every tensor is aligned to its own item size.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    place = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        offsets[spec.name] = place
        end = place + _num_bytes(spec)
        entries[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def bytes_of(numbers: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    view: memoryview = numbers.view(-1).view(torch.uint8).numpy().data
    return view


def _write_index(path: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    index = {
        "metadata": {"total_size": sum(total_bytes(shard) for shard in shards.values())},
        "weight_map": {spec.name: name for name, shard in shards.items() for spec in shard},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_filled(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _replaced(directory: Path) -> Path:
    """Where the old `directory` is while the new one takes its place."""
    return directory.with_name(directory.name + ".replaced")


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Our marker in `folder`, locked as long as its writer lives."""
    with (folder / MARKER_FILE).open("w", encoding="utf-8") as marker:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.lockf(marker, fcntl.LOCK_EX)
        marker.write(f"{os.getpid()}\n")
        marker.flush()
        yield


def _remove_if_ours(folder: Path) -> None:
    """Removes what a killed writer left; raises ConfigError where that is not what is there."""
    if not folder.exists():
        return
    marker = folder / MARKER_FILE
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # killed before it could be marked, or after all but it was gone
        return
    if not marker.is_file():
        raise ConfigError(f"{folder}: is in the way and not ours; move or remove it")
    with marker.open("r+", encoding="utf-8") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: process {opened.read().strip()} is writing it; wait for its end"
            ) from None
        _remove_marked(folder)


def _remove_marked(folder: Path) -> None:
    """Removes `folder`, its marker last: what a kill leaves of it is known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER_FILE:
            path.unlink()
    shutil.rmtree(folder)


def _replace(partial: Path, directory: Path) -> None:
    """Renames `partial` to `directory`; what was there goes only when the new one is whole."""
    try:
        if not _is_filled(directory):
            _rename_marked(partial, directory)
            return
        replaced = _replaced(directory)
        with _marked(directory):
            directory.rename(replaced)
            _rename_marked(partial, directory)
            _remove_marked(replaced)
    except OSError as error:
        raise disk_failure(directory, error) from error


def _rename_marked(partial: Path, directory: Path) -> None:
    partial.rename(directory)  # a rename onto an empty folder replaces it
    (directory / MARKER_FILE).unlink()
