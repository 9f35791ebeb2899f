"""How long a merge on disk takes, against the time that its bytes alone take.

    .venv/bin/python scripts/bench_merge.py             # a pair of 1.1B parameters, some minutes
    .venv/bin/python scripts/bench_merge.py --mergekit mergekit-yaml --repeats 9

The floor is a plain loop in this process that reads both models and writes one of their size,
without arithmetic, into the same number of files. Ours is all from reading the recipe to the last
byte of the model folder. The whole processes are `python -m evomerge merge` and mergekit's, if it
is named. All are measured in turn, in one run, the models in the page cache; memory is sampled in a
process of its own, for this pair and one with a quarter of the layers. Prints medians as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from evomerge.merge.checkpoint import ShardedOutput, bytes_of
from evomerge.merge.dtypes import BFLOAT16, DType
from evomerge.merge.materialize import materialize
from evomerge.merge.publishing import published
from evomerge.recipe import read_recipe

SHARDS = 5
FLOOR_BUFFER = 1 << 22  # the fastest of 64 KiB to 16 MiB

# The methods as recipes: what is the same for both models stands above, what one of them has below.
RECIPES = {
    "task_arithmetic": {"parameters": {"weight": 0.7}},
    "linear": {"parameters": {"weight": 0.7}},
    "ties": {"parameters": {"weight": 0.7, "density": 0.5}},
    "slerp": {"parameters": {"t": 0.3}},
}
MEASURED = ("task_arithmetic", "linear")
METHODS_THAT_LIST_THE_BASE = ("linear", "slerp")

# What a child says of its memory; sampled in a thread that sleeps nearly all the time.
MEMORY_SCRIPT = """
import sys, threading
from pathlib import Path
from evomerge.merge.materialize import materialize
from evomerge.recipe import read_recipe

def resident(kind):
    line = next(l for l in open("/proc/self/status") if l.startswith(kind + ":"))
    return int(line.split()[1]) * 1024

def sample():
    while not ended.wait(0.002):
        for kind in peaks:
            peaks[kind] = max(peaks[kind], resident(kind))

peaks = {"RssAnon": 0, "RssFile": 0}
before, ended = {kind: resident(kind) for kind in peaks}, threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
materialize(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
ended.set()
sampler.join()
print(*(peaks[kind] - before[kind] for kind in peaks))
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with untied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the model."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm": (self.hidden,),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
        }
        named = {
            f"layers.{number}.{part}": shape
            for number in range(self.layers)
            for part, shape in layer.items()
        }
        embedding = (self.vocabulary, self.hidden)
        all_named = {"embed_tokens": embedding, **named, "norm": (self.hidden,)}
        tensors = {f"model.{name}.weight": shape for name, shape in all_named.items()}
        return {**tensors, "lm_head.weight": embedding}

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=160, layers=4, heads=4, kv_heads=2, vocabulary=260),
    "1b": Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4),
}


@dataclass(frozen=True)
class Pair:
    """Two models of one shape, the second a tuned variant of the first."""

    base: Path
    tuned: Path

    @property
    def shards(self) -> list[str]:
        return sorted(path.name for path in self.base.glob("*.safetensors"))

    @property
    def num_bytes(self) -> int:
        return sum((self.base / name).stat().st_size for name in self.shards)


@dataclass(frozen=True)
class _Spec:
    name: str
    shape: tuple[int, ...]
    dtype: DType = BFLOAT16


def main() -> None:
    options = _options()
    shape = SHAPES[options.shape]
    with _directory(options.directory) as directory:
        pair, shard_bytes = write_pair(directory / options.shape, shape)
        small, _ = write_pair(
            directory / f"{options.shape}-small", replace(shape, layers=max(1, shape.layers // 4))
        )
        recipes = {name: write_recipe(directory, name, pair) for name in options.methods}
        scratch = directory / "scratch"
        ways = in_process(pair, recipes, scratch, shard_bytes)
        whole = write_recipe(directory, "task_arithmetic", pair)
        ways |= whole_processes(whole, scratch, shard_bytes, options.mergekit)
        seconds = measure(ways, options.repeats, scratch, pair)
        memory = {
            name: [
                peak_memory(write_recipe(directory, name, one), scratch) for one in (pair, small)
            ]
            for name in options.methods
        }
        report(options, pair, small, seconds, memory)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--mergekit", default=None, help="mergekit-yaml (default: left out)")
    parser.add_argument(
        "--directory", type=Path, default=None, help="where models are written once and kept"
    )
    return parser.parse_args()


@contextlib.contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made).resolve()


def write_pair(directory: Path, shape: Shape) -> tuple[Pair, int]:
    """The pair in `directory`, made unless it is there, and the size of its shards in bytes."""
    pair = Pair(directory / "base", directory / "tuned")
    shard_bytes = _shard_bytes(shape)
    for seed, model in enumerate((pair.base, pair.tuned)):
        if not model.is_dir():
            with published(model) as partial:
                _write_model(partial, shape, shard_bytes, seed)
    return pair, shard_bytes


def _specs(shape: Shape) -> list[_Spec]:
    return [_Spec(name, size) for name, size in shape.tensors().items()]


def _shard_bytes(shape: Shape) -> int:
    """The least size that gives five shards, in steps of a hundredth of the model."""
    sizes = [math.prod(spec.shape) * spec.dtype.itemsize for spec in _specs(shape)]
    step = sum(sizes) // 100
    for limit in range(sum(sizes) // SHARDS, sum(sizes), step):
        shards, filled = 1, 0
        for size in sizes:
            if filled and filled + size > limit:
                shards, filled = shards + 1, 0
            filled += size
        if shards <= SHARDS:
            return limit
    raise AssertionError("one shard holds everything")


def _write_model(directory: Path, shape: Shape, shard_bytes: int, seed: int) -> None:
    """Normal numbers of deviation 0.02; seed 1 adds others of 0.002, as fine-tuning might."""
    streams = [torch.Generator().manual_seed(number) for number in range(seed + 1)]
    with ShardedOutput(directory, _specs(shape), shard_bytes) as output:
        for spec in _specs(shape):
            size = math.prod(spec.shape)
            for start in range(0, size, 1 << 20):
                count = min(1 << 20, size - start)
                numbers = torch.zeros(count)
                for scale, stream in zip((0.02, 0.002), streams, strict=False):
                    numbers += scale * torch.randn(count, generator=stream)
                output.write(spec.name, start, bytes_of(numbers.to(spec.dtype.torch)))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"})
    )


def write_recipe(directory: Path, method: str, pair: Pair) -> Path:
    """A recipe of the pair as a file; JSON is YAML."""
    listed = [pair.base, pair.tuned] if method in METHODS_THAT_LIST_THE_BASE else [pair.tuned]
    recipe = {
        "merge_method": method,
        "models": [{"model": str(model)} for model in listed],
        "dtype": "bfloat16",
        **RECIPES[method],
    }
    if method != "linear":
        recipe["base_model"] = str(pair.base)
    file = directory / f"{method}-{pair.base.parent.name}.yaml"
    file.write_text(json.dumps(recipe, indent=2))
    return file


def in_process(
    pair: Pair, recipes: dict[str, Path], scratch: Path, shard_bytes: int
) -> dict[str, Callable[[], object]]:
    """What is timed in this process, by name: the floor, and ours for each method."""

    def ours(recipe: Path) -> Callable[[], object]:
        return lambda: materialize(read_recipe(recipe), scratch / "out", max_shard_size=shard_bytes)

    floor = {"floor": lambda: copy_without_arithmetic(pair, scratch)}
    return {**floor, **{method: ours(recipe) for method, recipe in recipes.items()}}


def copy_without_arithmetic(pair: Pair, directory: Path) -> None:
    """Reads both models and writes one of their size, file by file, through one buffer."""
    buffer = memoryview(bytearray(FLOOR_BUFFER))
    for name in pair.shards:
        with (
            (pair.base / name).open("rb", buffering=0) as first,
            (pair.tuned / name).open("rb", buffering=0) as second,
            (directory / name).open("wb", buffering=0) as out,
        ):
            while count := first.readinto(buffer):
                second.readinto(buffer[:count])
                out.write(buffer[:count])


def whole_processes(
    recipe: Path, scratch: Path, shard_bytes: int, mergekit: str | None
) -> dict[str, Callable[[], object]]:
    """What is timed as a process from its start to its end, by name."""
    out = str(scratch / "out")
    ours = [sys.executable, "-m", "evomerge", "merge", str(recipe), out]
    commands = {"evomerge process": [*ours, "--max-shard-size", str(shard_bytes)]}
    if mergekit is not None:
        theirs = [mergekit, str(recipe), out, "--out-shard-size", str(shard_bytes)]
        commands["mergekit process"] = theirs
    return {name: _process(command) for name, command in commands.items()}


def _process(command: list[str]) -> Callable[[], object]:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run() -> None:
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{ended.stdout}{ended.stderr}")

    return run


def measure(
    ways: dict[str, Callable[[], object]], repeats: int, scratch: Path, pair: Pair
) -> dict[str, list[float]]:
    """Seconds of each way, in turn; a first round, which fills the caches, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            # A virtual machine gives unused memory back, and the first to write to it again waits
            # for the host: without this, whoever comes after a pause takes up to ten times longer.
            with _emptied(scratch):
                copy_without_arithmetic(pair, scratch)
            with _emptied(scratch):
                start = time.perf_counter()
                way()
                spent = time.perf_counter() - start
            if repeat:
                seconds[name].append(spent)
    return seconds


@contextlib.contextmanager
def _emptied(scratch: Path) -> Iterator[None]:
    scratch.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(scratch)


def peak_memory(recipe: Path, scratch: Path) -> tuple[int, int]:
    """The most anonymous bytes and mapped file bytes of a merge, above those of its imports."""
    with _emptied(scratch):
        ended = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, str(recipe), str(scratch / "out")],
            check=True,
            capture_output=True,
            text=True,
        )
    anonymous, mapped = ended.stdout.split()
    return int(anonymous), int(mapped)


def report(
    options: argparse.Namespace,
    pair: Pair,
    small: Pair,
    seconds: dict[str, list[float]],
    memory: dict[str, list[tuple[int, int]]],
) -> None:
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    print(f"{machine()}\n")
    print(
        f"A pair of {options.shape}: {pair.num_bytes / 2e9:.2f} billion parameters in bfloat16, "
        f"{len(pair.shards)} files each; medians of {options.repeats}, fastest in brackets.\n"
    )
    print("| | time | output per second | × floor | bar |\n|---|---|---|---|---|")
    for name in ("floor", *options.methods):
        ratio = medians[name] / medians["floor"]
        bar = "≤ 1.5, aim 1.25" if name in MEASURED else ""
        print(
            f"| {name} | {medians[name]:.3f} s ({min(seconds[name]):.3f}) | "
            f"{pair.num_bytes / medians[name] / 1e9:.2f} GB | **{ratio:.2f}** | {bar} |"
        )
    ours = medians["evomerge process"]
    print("\n| whole process, task_arithmetic | time | × ours | bar |\n|---|---|---|---|")
    for name in ("evomerge process", "mergekit process"):
        if name in medians:
            bar = "≥ 4" if name == "mergekit process" else ""
            print(f"| {name} | {medians[name]:.2f} s | **{medians[name] / ours:.1f}** | {bar} |")
    print(
        "\n| peak memory above the imports' | anonymous | mapped files | anonymous, "
        f"{small.num_bytes / pair.num_bytes:.0%} of the model | bar, anonymous |"
    )
    print("|---|---|---|---|---|")
    for name, ((anonymous, mapped), (of_small, _)) in memory.items():
        bar = "≤ 1 GB, the same for both" if name in MEASURED else ""
        print(
            f"| {name} | {anonymous / 1e6:.0f} MB | {mapped / 1e6:.0f} MB | "
            f"{of_small / 1e6:.0f} MB | {bar} |"
        )


def machine() -> str:
    """The processor, its cores and memory, and the versions that a figure belongs to."""
    names = [f"{package} {version(package)}" for package in ("evomerge", "torch")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}; "
        f"Python {platform.python_version()}, {', '.join(names)}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
