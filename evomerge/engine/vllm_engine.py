"""vLLM as an engine: a model inside this process (or its own), switched by recipes."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evomerge.engine.base import Completion, Engine, EngineConfig, GenerationSettings, Loaded
from evomerge.engine.planning import Planner, update_message
from evomerge.engine.tokenizer import Tokenizer
from evomerge.engine.vllm_private import (
    check_vllm_version,
    end_engine,
    engine_failures,
    while_alive,
)
from evomerge.errors import CandidateError, ConfigError, EngineDiedError, EvomergeError
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe

CPU_KV_CACHE_BYTES = 1 << 30


class VLLMEngine(Engine):
    """A `vllm.LLM` with the evomerge weight-transfer backend.

    With `config.repeatable` the engine runs in this process, where a batch forms from all prompts
    of a call: the same call gives the same answers. Otherwise it has a process of its own.
    """

    name = "vllm"

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.planner = Planner(config.model, config.sources, config.dtype)
        self.tokenizer = Tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        self._version = "default"  # vLLM's own name for the weights that it was started with
        self._wrote_nan = False
        self._on_disk = config.load == "disk"
        self._llm = None if self._on_disk else self._start(config.model, live=True)

    def _start(self, directory: str, *, live: bool) -> Any:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        with environment(engine_variables(self.config)):
            import vllm

            check_vllm_version(vllm.__version__)
            try:
                return vllm.LLM(**engine_arguments(self.config, directory, live=live))
            except (RuntimeError, ValueError, TypeError, MemoryError) as error:
                raise ConfigError(f"vLLM does not start on {directory}: {error}") from error

    def supports(self, recipe: Recipe) -> str | None:
        return self.planner.obstacle(self.planner.plan(recipe))

    def load(self, recipe: Recipe) -> Loaded:
        start = time.perf_counter()
        plan = self.planner.plan(recipe)
        if self._on_disk or self.planner.obstacle(plan) is not None:
            self._load_from_disk(recipe, plan)
            return Loaded(plan.digest, "disk", time.perf_counter() - start)
        if self._llm is None:
            self._llm = self._start(self.config.model, live=True)
        self._version = "in between"  # so that no answer of a switch that failed is believed
        with candidate_errors():
            while_alive(self._llm, lambda: self._switch(recipe, plan))
        self._version = plan.digest
        return Loaded(plan.digest, "live", time.perf_counter() - start)

    def _switch(self, recipe: Recipe, plan: MergePlan) -> None:
        assert self._llm is not None
        self._llm.start_weight_update()
        message = update_message(recipe, plan, clear=self._wrote_nan)
        self._llm.update_weights({"update_info": message})
        self._llm.finish_weight_update(weight_version=plan.digest)
        self._llm.reset_prefix_cache()
        self._wrote_nan = False

    def _load_from_disk(self, recipe: Recipe, plan: MergePlan) -> None:
        """Writes the model under `scratch` and starts an engine on it in place of this one."""
        if self.config.scratch is None:
            raise ConfigError("engine: load: disk needs a directory for its models (scratch)")
        directory = Path(self.config.scratch) / "candidate"
        materialize(recipe, directory, overwrite=True)
        self._stop()
        self._on_disk = True  # a live engine and one per model do not fit beside each other
        self._llm = self._start(str(directory), live=False)
        self._llm.update_weight_version(plan.digest)
        self._version = plan.digest

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.tokenizer.render(messages)

    def has_chat_template(self) -> bool:
        return self.tokenizer.has_chat_template

    def count_tokens(self, prompt: str, *, add_special_tokens: bool) -> int:
        return len(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

    @property
    def max_model_len(self) -> int:
        if self._llm is None:
            self._llm = self._start(self.config.model, live=False)
        return int(self._llm.model_config.max_model_len)

    def generate(
        self, prompts: Sequence[str], settings: GenerationSettings, *, add_special_tokens: bool
    ) -> list[Completion]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=list(settings.stop),
            seed=settings.seed,
        )
        outputs = self._run(prompts, sampling, add_special_tokens=add_special_tokens)
        return [self._completion(output) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        answer = output.outputs[0]
        if output.metrics.is_corrupted:
            self._wrote_nan = True
            raise CandidateError("its logits are NaN: activations overflow")
        versions = {span.version for span in answer.weight_versions or []}
        if versions - {self._version}:
            raise EngineDiedError(f"an answer came from {versions}, not from {self._version}")
        return Completion(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            finish_reason=str(answer.finish_reason),
            prompt_tokens=len(output.prompt_token_ids),
            version=self._version,
        )

    def log_probabilities(
        self, prompts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[float]]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._run(prompts, sampling, add_special_tokens=add_special_tokens)
        return [
            [
                position[token].logprob
                for token, position in zip(
                    output.prompt_token_ids, output.prompt_logprobs, strict=True
                )
                if position is not None
            ]
            for output in outputs
        ]

    def _run(self, prompts: Sequence[str], sampling: Any, *, add_special_tokens: bool) -> list[Any]:
        if self._llm is None:
            raise EngineDiedError("no model is loaded")
        llm = self._llm
        inputs = [
            {"prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=add_special_tokens)}
            for text in prompts
        ]
        try:
            with environment(engine_variables(self.config)):
                outputs = while_alive(llm, lambda: llm.generate(inputs, sampling, use_tqdm=False))
            return list(outputs)
        except engine_failures() as error:
            raise EngineDiedError(f"vLLM failed while generating: {error}") from error

    def parameter_checksums(self) -> list[dict[str, str]]:
        """Per worker the SHA-256 of every live parameter's bytes, as vLLM itself computes it."""
        assert self._llm is not None
        checksums: list[dict[str, str]] = self._llm.collective_rpc("compute_weight_checksums")
        return checksums

    def _stop(self) -> None:
        if self._llm is not None:
            end_engine(self._llm)
        self._llm = None
        gc.collect()

    def close(self) -> None:
        self._stop()
        if self.config.scratch is not None:
            shutil.rmtree(Path(self.config.scratch) / "candidate", ignore_errors=True)


@contextlib.contextmanager
def candidate_errors() -> Iterator[None]:
    """Tells a candidate without a model from an engine that broke.

    An error in a worker process arrives as a bare Exception that only quotes the original one.
    """
    try:
        yield
    except EvomergeError:
        raise
    except Exception as error:
        if quoted := re.search(r"\S+ has NaN or infinite values", str(error)):
            raise CandidateError(quoted.group().lstrip("'")) from error
        raise EngineDiedError(f"vLLM failed while switching: {error}") from error


def engine_variables(config: EngineConfig) -> dict[str, str]:
    """The environment variables that vLLM reads at its start, for what has no argument."""
    threads = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    return threads | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.repeatable else "1",
        # Pinned threads of engines (or of anything else) that share a core wait for each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A forked engine would inherit this process's locks and its half-used thread pool.
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    }


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """`variables` in the environment for the block, where the user has not set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def engine_arguments(config: EngineConfig, directory: str, *, live: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a model directory, the user's own options last."""
    arguments: dict[str, Any] = {
        "model": directory,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "disable_log_stats": False,  # they tell of every answer whether its logits had a NaN
        "seed": 0,
    }
    if live:
        arguments["weight_transfer_config"] = {"backend": "evomerge"}
        arguments["additional_config"] = {"evomerge": {"models": list(config.sources)}}
    if not has_gpu():
        # The default is a share of the whole machine's memory, taken at once.
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        # Compiling the model there takes 20 s, wants a C++ compiler, and wins nothing measurable.
        arguments["enforce_eager"] = True
    return arguments | dict(config.options)


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    return bool(torch.cuda.is_available())
