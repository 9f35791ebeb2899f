"""What answering a suite costs beside the one call of vLLM that it comes down to.

    .venv/bin/python scripts/bench_suite.py [TASKS.csv] [--repeats 9] [--max-tokens 64]

100 tasks in a live engine: all of an evaluation (prompts by the chat template, one call, grades,
gates) against one plain `vllm.LLM.generate` on the same prompts, in the same engine, in turn, each
after the prefix cache was dropped. The model is a random Llama of some million parameters, so that
what is not generation shows. TASKS holds input and output columns; without it the tasks are made
up. Prints the ratio of the medians; exit status 1 where it is above 1.05.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import Engine
from evomerge.evaluate.evaluation import Evaluation
from evomerge.evaluate.prompts import ask
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite

TASKS, BAR = 100, 1.05

# Seconds, and CPU seconds of this process, which the engine is in: other programs spoil them less.
Times = tuple[float, float]

CHAT = (
    "{{ bos_token }}{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def main() -> int:
    """Prints the medians; 1 where the bar is missed."""
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        suite = _suite(options, folder)
        config = EngineConfig(
            model=str(write_model(folder / "model")),
            sources=(),
            threads=options.threads,
            options={"max_model_len": 4096, "enforce_eager": True},
        )
        with open_engine("vllm", config) as engine:
            plain, evaluated = measured(engine, suite, options.repeats)
    print(f"{len(suite.tasks)} tasks, {options.max_tokens} tokens each, {options.repeats} rounds")
    ratios = []
    for what, place in (("seconds", 0), ("CPU seconds", 1)):
        one, other = ([times[place] for times in some] for some in (plain, evaluated))
        ratios.append(statistics.median(other) / statistics.median(one))
        print(f"{what}: plain vllm.LLM.generate {_spread(one)}, as a suite {_spread(other)}")
        print(f"  ratio of medians {ratios[-1]:.3f}, of the fastest {min(other) / min(one):.3f}")
    print(f"bar: {BAR} (seconds, medians)")
    return int(ratios[0] > BAR)


def measured(engine: Engine, suite: Suite, repeats: int) -> tuple[list[Times], list[Times]]:
    """The times of the plain call and of the evaluation, in turn, after a round that warms up."""
    from vllm import SamplingParams

    llm: Any = vars(engine)["_llm"]
    prompts = [ask(engine, suite.chat, task) for task in suite.tasks]
    sampling = SamplingParams(max_tokens=suite.config.max_tokens, temperature=0.0)
    evaluation = Evaluation(engine, suite)
    ids = [task.id for task in suite.tasks]

    def times(call: Callable[[], object]) -> Times:
        llm.reset_prefix_cache()
        start, spent = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - start, time.process_time() - spent

    plain, evaluated = [], []
    for _ in range(repeats + 1):
        plain.append(times(lambda: llm.generate(prompts, sampling, use_tqdm=False)))
        evaluated.append(times(lambda: evaluation.begin(ids).result()))
    return plain[1:], evaluated[1:]


def write_model(folder: Path) -> Path:
    """A random Llama with a byte-level tokenizer, which reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    ).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    architecture: Any = LlamaForCausalLM
    architecture(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _suite(options: argparse.Namespace, folder: Path) -> Suite:
    config = SuiteConfig(
        scorer={"chrf": 0.5, "exact": 0.5}, data="tasks.jsonl", max_tokens=options.max_tokens
    )
    if options.tasks is None:
        # As long as those of elyza-tasks-100 are in the median.
        rows = [
            {"input": f"{number}番目の質問です。" * 10, "output": "模範となる回答です。" * 15}
            for number in range(TASKS)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
    return load_suite(config, folder, options.tasks)


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="?", type=Path, metavar="TASKS.csv")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
