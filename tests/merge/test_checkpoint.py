from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evomerge.errors import ConfigError, OutputExistsError, RunError
from evomerge.merge.checkpoint import (
    Checkpoint,
    InputFiles,
    ShardedOutput,
    bytes_of,
    read_tensor_file,
)
from evomerge.merge.dtypes import DType, dtype_of
from evomerge.merge.publishing import MARKER_FILE, disk_failure, published
from tests import tiny


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: DType
    shape: tuple[int, ...]


def numbers(sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (dtype, shape) in sizes.items()
    }


def specs_of(tensors: dict[str, Tensor]) -> list[Spec]:
    return [
        Spec(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
    ]


def write(directory: Path, tensors: dict[str, Tensor], max_shard_size: int = 10**9) -> Path:
    directory.mkdir(exist_ok=True)
    with ShardedOutput(directory, specs_of(tensors), max_shard_size) as output:
        for name, tensor in tensors.items():
            output.write(name, 0, bytes_of(tensor.contiguous()))
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "sharded"
    return tiny.llama(directory, layers=2, max_shard_size="300KB")


def copy_of(directory: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in directory.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def opening(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "sharded"])
def test_every_tensor_is_read_as_it_was_saved(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    opened = Checkpoint.open(directory)
    saved = tiny.read_tensors(directory)
    assert opened.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        header = opened.tensors[name]
        assert (header.dtype.torch, header.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(opened.read(name), tensor)


def test_reading_copies_nothing_into_memory(tmp_path: Path) -> None:
    size = 200_000_000
    tensors = {"big": torch.zeros(size // 4)}
    directory = write(tmp_path / "big", tensors)
    (directory / "config.json").write_text("{}")
    del tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = Checkpoint.open(directory).read("big")
    assert tensor.shape == (size // 4,)
    # Reading it into memory would touch each of its 4 KB pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < size / 4096 / 10


def test_the_fingerprint_changes_with_config_weights_and_time(llama: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(llama).fingerprint()
    assert Checkpoint.open(llama).fingerprint() == first
    copied = copy_of(llama, tmp_path)
    times = (llama / "model.safetensors").stat()
    os.utime(copied / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Checkpoint.open(copied).fingerprint() == first
    os.utime(copied / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert Checkpoint.open(copied).fingerprint() != first
    os.utime(copied / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    tiny.edit_config(copied, rope_theta=5.0)
    assert Checkpoint.open(copied).fingerprint() != first


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
        *("generation_config.json", "additional_chat_templates/tools.jinja"),
    ],
)
def test_the_fingerprint_changes_with_the_tokenizer_and_its_templates(
    llama: Path, tmp_path: Path, name: str
) -> None:
    copied = copy_of(llama, tmp_path)
    file = copied / name
    file.parent.mkdir(exist_ok=True)
    digests = [Checkpoint.open(copied).fingerprint()]
    for content in ("{}", "[]", "{}"):
        file.write_text(content)
        digests.append(Checkpoint.open(copied).fingerprint())
    assert digests[1] == digests[3]
    assert len(set(digests)) == 3
    (copied / "README.md").write_text("no part of the model")
    assert Checkpoint.open(copied).fingerprint() == digests[3]


def test_what_is_missing_is_named(llama: Path, sharded: Path, tmp_path: Path) -> None:
    assert "there is no such model directory" in opening(tmp_path / "absent")
    copied = copy_of(llama, tmp_path)
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert "only safetensors is read" in opening(copied)
    (copied / "config.json").unlink()
    assert "has no config.json" in opening(copied)
    (tmp_path / "second").mkdir()
    copied = copy_of(sharded, tmp_path / "second")
    next(copied.glob("model-00002*")).unlink()
    assert "names model-00002" in opening(copied)


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1, -1000])
def test_a_truncated_file_is_named(llama: Path, tmp_path: Path, keep: int) -> None:
    copied = copy_of(llama, tmp_path)
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = opening(copied)
    assert message.startswith(f"{file}: is truncated")


def test_a_file_with_more_than_its_tensors_is_damaged(llama: Path, tmp_path: Path) -> None:
    copied = copy_of(llama, tmp_path)
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "is truncated or damaged" in opening(copied)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[1]", "header is no JSON object"),
        (b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}', "tensor a has a broken"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "tensor a has a broken header"),
        (b'{"a": 3}', "tensor a has a broken header"),
        (b"\xff\xfe\x00", "no safetensors file"),
    ],
)
def test_a_broken_header_is_named(tmp_path: Path, header: bytes, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert said in opening(tmp_path)


def header_file(directory: Path, **entries: object) -> Path:
    """A model of 16 bytes of numbers, under a header that says `entries` of them."""
    (directory / "config.json").write_text("{}")
    header = json.dumps(entries).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return file


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": entry([5], 0, 16)}, "tensor a has a broken header: 16 bytes for shape [5] of"),
        ({"a": entry([4], 0, 16, "BF16")}, "tensor a has a broken header: 16 bytes for shape [4]"),
        (
            {"a": entry([4], 0, 16, "U32")},
            "tensor a has numbers of type U32, as models with",
        ),
        ({"a": entry([-2, -2], 0, 16)}, "tensor a has a broken header: 16 bytes for shape [-2, -2"),
        (
            {"a": entry([4], 0, 16), "b": entry([2], 8, 16)},
            "tensor b has a broken header: it begins at byte 8, but the one before it ends at 16",
        ),
        (
            {"a": entry([2], 8, 16)},
            "tensor a has a broken header: it begins at byte 8, but the one before it ends at 0",
        ),
    ],
)
def test_a_header_that_disagrees_with_itself_is_named(
    tmp_path: Path, entries: dict[str, object], said: str
) -> None:
    file = header_file(tmp_path, **entries)
    assert opening(tmp_path).startswith(f"{file}: {said}")


def test_a_file_that_only_the_library_finds_damaged_is_named(tmp_path: Path) -> None:
    file = header_file(tmp_path, __metadata__={"format": 1}, a=entry([4], 0, 16))
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(tmp_path).read("a")
    assert str(caught.value).startswith(f"{file}: is damaged (")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "should be the name of a file beside it"),
        ({"weight_map": {"a": 3}}, "should be the name of a file beside it"),
        ({"weight_map": {"a": ["x"]}}, "should be the name of a file beside it"),
        ({"weight_map": {"a": 3, "b": "x"}}, "should be the name of a file beside it"),
        ({"weight_map": {"absent": "part.safetensors"}}, "says that absent is in part.safetensors"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: object, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"present": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in opening(tmp_path)


@pytest.mark.parametrize("max_shard_size", [10**9, 4000, 1])
def test_what_is_written_is_read_back_by_the_library(tmp_path: Path, max_shard_size: int) -> None:
    tensors = numbers(
        {
            "odd": (torch.bfloat16, (3, 5)),
            "wide": (torch.float32, (7, 11)),
            "half": (torch.float16, (1001,)),
            "scalar": (torch.float32, ()),
            "none": (torch.float32, (0, 4)),
            "last": (torch.float64, (2, 2, 2)),
        }
    )
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).T
    directory = write(tmp_path / "out", tensors, max_shard_size)
    read = tiny.read_tensors(directory)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_shards_keep_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors = numbers({f"t{index}": (torch.float32, (100,)) for index in range(10)})
    tensors["t3"] = torch.randn(1000)
    directory = write(tmp_path / "out", tensors, 900)
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (9 * 100 + 1000)
    for name, file in index["weight_map"].items():
        assert name in read_tensor_file(directory / file)
    held = {file: list(read_tensor_file(directory / file)) for file in files}
    assert list(held.values()) == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],
        ["t4", "t5"],
        ["t6", "t7"],
        ["t8", "t9"],
    ]


@pytest.mark.parametrize(
    ("limit", "held"), [(1200, [3]), (1199, [2, 1]), (800, [2, 1]), (799, [1, 1, 1])]
)
def test_the_largest_shard_has_exactly_the_bytes_that_were_allowed(
    tmp_path: Path, limit: int, held: list[int]
) -> None:
    tensors = numbers({f"t{index}": (torch.float32, (100,)) for index in range(3)})
    files = sorted(write(tmp_path / "out", tensors, limit).glob("*.safetensors"))
    assert [len(read_tensor_file(file)) for file in files] == held


def test_more_shards_than_files_that_may_be_open_are_written(tmp_path: Path) -> None:
    tensors = numbers({f"t{index}": (torch.float32, (2,)) for index in range(60)})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limit[1]))
    try:
        directory = write(tmp_path / "out", tensors, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert all(torch.equal(tiny.read_tensors(directory)[name], tensors[name]) for name in tensors)


def test_places_are_filled_in_any_order_and_a_missing_one_is_noticed(tmp_path: Path) -> None:
    tensors = numbers({"a": (torch.float32, (10,)), "b": (torch.bfloat16, (3, 4))})
    with ShardedOutput(tmp_path, specs_of(tensors), 10**9) as output:
        output.write("b", 5, bytes_of(tensors["b"].view(-1)[5:]))
        output.write("a", 0, bytes_of(tensors["a"]))
        output.write("b", 0, bytes_of(tensors["b"].view(-1)[:5]))
    read = read_tensor_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    (tmp_path / "model.safetensors").unlink()
    with (
        pytest.raises(AssertionError, match="lacks 24 bytes"),
        ShardedOutput(tmp_path, specs_of(tensors), 10**9) as output,
    ):
        output.write("a", 0, bytes_of(tensors["a"]))


def test_pieces_are_read_as_they_lie_in_the_file(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    with InputFiles() as files:
        for name, header in checkpoint.tensors.items():
            piece = torch.empty(7, dtype=header.dtype.torch)
            files.read(header, 5, bytes_of(piece))
            assert torch.equal(piece, checkpoint.read(name).view(-1)[5:12]), name


def test_a_file_that_shrinks_while_it_is_read_is_named(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    header = list(Checkpoint.open(tmp_path / "model").tensors.values())[-1]
    os.truncate(file, header.begin + 10)
    with InputFiles() as files, pytest.raises(ConfigError, match=f"^{file}: ends within"):
        files.read(header, 0, bytes_of(torch.empty(header.shape, dtype=header.dtype.torch)))


def test_every_tensor_of_a_file_is_aligned_to_its_numbers(tmp_path: Path) -> None:
    tensors = numbers(
        {"a": (torch.bfloat16, (3,)), "b": (torch.float64, (3,)), "c": (torch.float32, (3,))}
    )
    file = write(tmp_path / "out", tensors) / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_a_failing_disk_stops_the_run_with_its_name(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(RunError, match=f"^{tmp_path}: writing failed"):
            write(tmp_path, {"big": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_called_full() -> None:
    error = disk_failure(Path("/models/out"), OSError(errno.ENOSPC, "No space left on device"))
    assert str(error).startswith("/models/out: the disk is full (No space left on device)")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with published(out) as partial:
        (partial / "file").write_text("1")
        assert not out.exists()
    assert sorted(os.listdir(out)) == ["file"]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with published(tmp_path / "out") as partial:
            (partial / "file").write_text("1")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(OutputExistsError, match="not empty"), published(out):
        pytest.fail("the work must not begin")
    assert os.listdir(out) == ["mine"]
    with pytest.raises(ValueError, match="failed"), published(out, overwrite=True):
        raise ValueError("failed")
    assert os.listdir(out) == ["mine"]
    with published(out, overwrite=True) as partial:
        (partial / "new").write_text("1")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled_and_a_file_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with published(tmp_path / "empty") as partial:
        (partial / "new").write_text("1")
    assert os.listdir(tmp_path / "empty") == ["new"]
    (tmp_path / "file").write_text("1")
    with (
        pytest.raises(OutputExistsError, match="no folder"),
        published(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("the work must not begin")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(ConfigError, match="cannot be made"), published(tmp_path / "file" / "out"):
        pytest.fail("the work must not begin")


WRITER = """
import os, sys, time
from pathlib import Path
from evomerge.merge.publishing import published
with published(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(out: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def test_the_remains_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    with start_writer(tmp_path / "out") as writer:
        writer.kill()
    assert os.listdir(tmp_path) == ["out.partial"]
    with published(tmp_path / "out") as partial:
        assert os.listdir(partial) == [MARKER_FILE]
        (partial / "whole").write_text("1")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["whole"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with start_writer(tmp_path / "out") as writer:
        said = f"process {writer.pid} is writing it"
        with pytest.raises(ConfigError, match=said), published(tmp_path / "out"):
            pytest.fail("the work must not begin")
        assert (tmp_path / "out.partial" / "half").read_text() == "half"
        writer.kill()


def test_a_partial_folder_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").write_text("1")
    with pytest.raises(ConfigError, match="not ours"), published(tmp_path / "out"):
        pytest.fail("the work must not begin")
    assert os.listdir(tmp_path / "out.partial") == ["theirs"]


def test_a_replaced_folder_that_is_not_ours_stays(tmp_path: Path) -> None:
    for name in ("out", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").write_text(name)
    with (
        pytest.raises(ConfigError, match=r"out\.replaced: is in the way and not ours"),
        published(tmp_path / "out", overwrite=True),
    ):
        pytest.fail("the work must not begin")
    for name in ("out", "out.replaced"):
        assert (tmp_path / name / "theirs").read_text() == name
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]


def test_a_new_folder_leaves_one_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "theirs").write_text("1")
    with published(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").write_text("1")
    assert os.listdir(tmp_path / "out.replaced") == ["theirs"]


REPLACER = """
import os, signal, sys
from pathlib import Path
from evomerge.merge.publishing import published
removed = []

def kill_at_removal(event, arguments):
    if event == "os.remove":
        removed.append(arguments)
        if len(removed) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

with published(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "new").write_text("1")
    sys.addaudithook(kill_at_removal)
"""


# Removed are, in this order: the new folder's marker, three old files, the old folder's marker.
@pytest.mark.parametrize("removal", [1, 2, 3, 4, 5])
def test_a_writer_killed_while_it_replaces_is_in_nobodys_way(tmp_path: Path, removal: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b", "c"):
        (out / name).write_text("old")
    killed = subprocess.run([sys.executable, "-c", REPLACER, str(out), str(removal)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["out", "out.replaced"]
    assert (out / "new").read_text() == "1"
    with published(out, overwrite=True) as partial:
        (partial / "newer").write_text("1")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["newer"]
