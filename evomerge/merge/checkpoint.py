"""Checkpoints on disk: safetensors read lazily and written in a stream."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from evomerge.errors import ConfigError
from evomerge.merge.architecture import Architecture, read_architecture
from evomerge.merge.headers import TensorHeader, TensorSpec, num_bytes, read_headers
from evomerge.merge.model_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json, small_files
from evomerge.merge.publishing import disk_failure

if TYPE_CHECKING:
    from torch import Tensor


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
            tensors = read_headers(single)
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
        for file in small_files(self.directory):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(self.directory)} {content}\n".encode())
        return digest.hexdigest()


def read_tensor_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped, by name; ConfigError where it is damaged."""
    headers = read_headers(file)
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
    return sum(num_bytes(spec) for spec in specs)


def _open_tensors(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(file, framework="pt")
    except safetensors.SafetensorError as error:  # of what our own checks of headers let through
        raise ConfigError(f"{file}: is damaged ({error}); fetch the file again") from error


def _read_indexed_headers(index: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: has no weight_map")
    names = {_checked_file_name(index, name) for name in weight_map.values()}
    by_file = {name: _indexed_file(index, name) for name in sorted(names)}
    tensors = {}
    for name, file_name in weight_map.items():
        if name not in by_file[file_name]:
            raise ConfigError(f"{index}: says that {name} is in {file_name}, but it is not")
        tensors[name] = by_file[file_name][name]
    return tensors


def _checked_file_name(index: Path, file_name: object) -> str:
    if not isinstance(file_name, str) or Path(file_name).name != file_name:
        raise ConfigError(f"{index}: {file_name!r} should be the name of a file beside it")
    return file_name


def _indexed_file(index: Path, file_name: str) -> dict[str, TensorHeader]:
    file = index.with_name(file_name)
    if not file.is_file():
        raise ConfigError(f"{index}: names {file_name}, which is missing; fetch it again")
    return read_headers(file)


def _no_weights_message(directory: Path) -> str:
    message = f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if any(directory.glob("pytorch_model*.bin")):
        message += "; only safetensors is read: save the model again with safe_serialization=True"
    return message


def _cut_into_shards(
    specs: Sequence[TensorSpec], max_shard_size: int
) -> dict[str, list[TensorSpec]]:
    """The tensors of each file by its name, in order; greedy, no empty file."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + num_bytes(spec) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += num_bytes(spec)
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
        end = place + num_bytes(spec)
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
