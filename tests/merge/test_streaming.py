"""Merges in pieces on many threads: the same bits, whatever happens to the disk or the process."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.cli import main
from evomerge.errors import ConfigError, RunError
from evomerge.merge import materialize as materialize_module
from evomerge.merge import streaming
from evomerge.merge.checkpoint import ShardedOutput
from evomerge.merge.kernels import merged_tensors
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import make_plan, open_checkpoints
from evomerge.recipe import Recipe, read_recipe, recipe_from_mapping
from tests import tiny

SETTINGS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.7},
    "task_arithmetic": {"weight": 0.7},
    "slerp": {"t": [0.2, 0.8]},
    "ties": {"weight": 0.7, "density": 0.4},
    "dare_ties": {"weight": 0.7, "density": 0.4},
    "della_linear": {"weight": 0.7, "density": 0.4},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "passthrough": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of five layers with `expert1` and `expert2` beside it."""
    directory = tmp_path_factory.mktemp("models") / "base"
    tiny.llama(directory, layers=5, hidden=64)
    for seed in (1, 2):
        tiny.variant(directory, directory.with_name(f"expert{seed}"), seed=seed)
    return directory


def recipe_of(base: Path, method: str = "task_arithmetic", dtype: str = "bfloat16") -> Recipe:
    experts = [str(base.with_name(f"expert{seed}")) for seed in (1, 2)]
    listed = {
        "slerp": [str(base), experts[0]],
        "linear": [str(base), *experts],
        "passthrough": experts[:1],
    }
    fields: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": model} for model in listed.get(method, experts)],
        "parameters": SETTINGS[method],
        "dtype": dtype,
    }
    if method not in ("linear", "passthrough"):
        fields["base_model"] = str(base)
    return recipe_from_mapping(fields, "made here")


def in_order(recipe: Recipe) -> dict[str, Tensor]:
    checkpoints = open_checkpoints(recipe)
    return dict(merged_tensors(make_plan(recipe, checkpoints), checkpoints))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_any_number_of_workers_and_any_pieces_give_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    recipe = recipe_of(base, method, dtype)
    expected = in_order(recipe)
    for workers, piece in ((1, 1 << 17), (2, 1000), (5, 4096)):
        monkeypatch.setattr(streaming, "PIECE_ELEMENTS", piece)
        written = tiny.read_tensors(
            materialize(recipe, tmp_path / f"{workers}", workers=workers, max_shard_size=100_000)
        )
        assert written.keys() == expected.keys()
        assert [name for name in written if not torch.equal(written[name], expected[name])] == []


def test_progress_tells_every_byte_in_order(base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = materialize(
        recipe_of(base), tmp_path / "out", progress=lambda *numbers: told.append(numbers)
    )
    total = sum(tensor.nbytes for tensor in tiny.read_tensors(out).values())
    assert told == sorted(told)
    assert {last for _, last in told} == {total}
    assert told[-1] == (total, total)


COUNT_THREADS = """
import sys
import threading
from pathlib import Path

import torch

from evomerge.merge.materialize import materialize
from tests.merge.test_streaming import recipe_of

torch.set_num_threads(2)
materialize(recipe_of(Path(sys.argv[1])), Path(sys.argv[2]))
thread = threading.Thread(target=lambda: print(torch.get_num_threads()))
thread.start()
thread.join()
print(torch.get_num_threads())
"""


def test_torch_has_as_many_threads_after_a_merge_as_before(base: Path, tmp_path: Path) -> None:
    # In a process of its own: once vLLM ran in this one, torch's threads cannot be set any more.
    ran = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, base, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert ran.stdout.split() == ["2", "2"]


def test_an_error_of_one_worker_stops_the_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = ShardedOutput.write

    def fails_at_the_third(self: ShardedOutput, name: str, start: int, numbers: Tensor) -> None:
        written.append(name)
        if len(written) == 3:
            raise OSError("the cable is out")
        write(self, name, start, numbers)

    monkeypatch.setattr(ShardedOutput, "write", fails_at_the_third)
    with pytest.raises(OSError, match="the cable is out"):
        materialize(recipe_of(base), tmp_path / "out", workers=3)
    assert len(written) < 8
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_in_the_middle_leaves_nothing(base: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        with pytest.raises(RunError, match="writing failed"):
            materialize(recipe_of(base), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
    materialize(recipe_of(base), tmp_path / "out")


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(ConfigError, match="GB are free on this disk"):
            materialize(recipe_of(base), disk / "out")
        # As if another program took the room after the merge had begun.
        monkeypatch.setattr(materialize_module, "require_space", lambda *_: None)
        with pytest.raises(RunError, match="the disk is full"):
            materialize(recipe_of(base), disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c_at_any_moment_leaves_nothing_and_the_merge_starts_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    slow_down(monkeypatch)
    out = tmp_path / "out"
    delay = random.Random(seed).uniform(0, 0.3)
    timer = threading.Timer(delay, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        materialize(recipe_of(base), out, workers=2)
    timer.join()
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    written = tiny.read_tensors(materialize(recipe_of(base), out))
    assert all(torch.equal(written[name], one) for name, one in in_order(recipe_of(base)).items())


def test_ctrl_c_ends_the_command_with_130(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_down(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(recipe_of(base).to_yaml())
    write = ShardedOutput.write

    def interrupts(self: ShardedOutput, name: str, start: int, numbers: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(self, name, start, numbers)

    monkeypatch.setattr(ShardedOutput, "write", interrupts)
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 130
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    assert "GB/s" not in capsys.readouterr().err


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of the tests' models then takes half a second or more."""
    write = ShardedOutput.write

    def slow(self: ShardedOutput, name: str, start: int, numbers: Tensor) -> None:
        time.sleep(0.03)
        write(self, name, start, numbers)

    monkeypatch.setattr(ShardedOutput, "write", slow)


# Each merge in a fork, killed after a random time; what the merge before left is in its way.
KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
from evomerge.merge.checkpoint import ShardedOutput
from evomerge.merge.materialize import materialize
from evomerge.recipe import read_recipe

recipe, out = read_recipe(Path(sys.argv[1])), Path(sys.argv[2])
write = ShardedOutput.write

def slow(*arguments):
    time.sleep(0.03)
    write(*arguments)

ShardedOutput.write = slow
chance = random.Random(0)
for _ in range(6):
    child = os.fork()
    if not child:
        materialize(recipe, out, workers=2)
        os._exit(0)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not out.exists()
    assert set(os.listdir(out.parent)) <= {out.name + ".partial", "recipe.yaml"}
"""


def test_a_merge_killed_at_any_moment_is_partial_and_the_next_one_clears_it_away(
    base: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(recipe_of(base).to_yaml())
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(recipe), str(out)]
    subprocess.run(command, check=True)
    written = tiny.read_tensors(materialize(read_recipe(recipe), out))
    assert all(torch.equal(written[name], one) for name, one in in_order(recipe_of(base)).items())
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.yaml"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose two embeddings, with a token for each row, are most of it."""
    base = tmp_path_factory.mktemp("large") / "base"
    tiny.llama(base, layers=2, hidden=512, vocabulary=80_000)
    _name_all_rows(base, 80_000, other_from=80_000)
    for seed in (1, 2):
        tiny.variant(base, base.with_name(f"expert{seed}"), seed=seed)
    _name_all_rows(base.with_name("expert2"), 80_000, other_from=75_000)
    return base


def _name_all_rows(model: Path, rows: int, *, other_from: int) -> None:
    """Gives its tokenizer a token for each row; from one on, tokens that no other model has."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = tokenizer["model"]["vocab"]
    for row in range(261, rows):
        known.pop(f"token{row}", None)
        known[f"{'token' if row < other_from else 'other'}{row}"] = row
    file.write_text(json.dumps(tokenizer))


UNITED = {"source": "union", "tokens": {"<new>": {}}, "pad_to_multiple_of": 64}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="task_arithmetic"),
        pytest.param({"tokenizer": UNITED}, id="a new vocabulary"),
        pytest.param(
            {
                "merge_method": "nuslerp",
                "tokenizer": UNITED,
                "parameters": {"weight": 0.4, "nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            id="columns of one",
        ),
    ],
)
def test_a_merge_needs_the_memory_of_its_pieces_alone(
    large: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    largest = max(tensor.nbytes for tensor in tiny.read_tensors(large).values())
    recipe = tmp_path / "recipe.yaml"
    mapping = recipe_of(large).to_mapping() | more
    recipe.write_text(recipe_from_mapping(mapping, "test").to_yaml())
    script = """
        recipe = read_recipe(Path(sys.argv[1]))
        checkpoints = open_checkpoints(recipe)
        make_plan(recipe, checkpoints)  # torch and the tokenizers are in memory now
        import evomerge.merge.kernels
        seen[:] = [anonymous()]  # from here on
        materialize(recipe, Path(sys.argv[2]), checkpoints=checkpoints, workers=2)
        """
    # The united one takes its tables of rows, too.
    limit = 65e6 if "tokenizer" in more else 40e6
    assert anonymous_memory(script, recipe, tmp_path / "out") < limit < largest


def test_an_adapter_is_applied_in_the_memory_of_its_pieces_alone(
    large: Path, tmp_path: Path
) -> None:
    head = tiny.read_tensors(large)["lm_head.weight"]
    tiny_adapter = {
        "base_model.model.lm_head.lora_A.weight": torch.randn(4, head.shape[1]),
        "base_model.model.lm_head.lora_B.weight": torch.randn(head.shape[0], 4),
    }
    save_file(tiny_adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    script = """
        from evomerge.merge.lora import apply_adapter
        Checkpoint.open(Path(sys.argv[1])).read("lm_head.weight")
        seen[:] = [anonymous()]  # from here on
        apply_adapter(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
        """
    took = anonymous_memory(script, large, tmp_path, tmp_path / "out")
    assert took < 65e6 < head.nbytes


def anonymous_memory(script: str, *arguments: Path) -> int:
    """The bytes that `script` takes at most from `seen[:] = …` on, in a process of its own."""
    # RssAnon leaves out the mapped files, whose pages the system takes back when it needs them.
    around = """
        import sys, threading
        from pathlib import Path
        from evomerge.merge.checkpoint import Checkpoint
        from evomerge.merge.materialize import materialize
        from evomerge.merge.plan import make_plan, open_checkpoints
        from evomerge.recipe import read_recipe
        def anonymous():
            line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
            return int(line.split()[1]) * 1024
        def sample():
            while not ended.wait(0.002):
                seen.append(anonymous())
        seen, ended = [], threading.Event()
        sampler = threading.Thread(target=sample)
        sampler.start()
        """
    after = """
        ended.set()
        sampler.join()
        print(max(seen) - seen[0])
        """
    text = "".join(map(textwrap.dedent, (around, script, after)))
    told = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(told.stdout)
