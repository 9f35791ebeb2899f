"""vLLM as an engine: a model inside this process (or its own), switched by recipes."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from evomerge.engine.base import (
    Completion,
    Each,
    EngineConfig,
    GenerationSettings,
    Loaded,
    Prompt,
)
from evomerge.engine.planning import (
    ASK_WORKERS,
    PlanningEngine,
    failure_of,
    remove_candidate,
    update_message,
    write_candidate,
)
from evomerge.engine.plugin import OWNED_VARIABLE
from evomerge.engine.tokenizer import longest_context, read_config
from evomerge.engine.vllm_private import (
    check_vllm_version,
    end_engine,
    engine_failures,
    logits_had_nan,
    while_alive,
)
from evomerge.errors import CandidateError, ConfigError, EngineDiedError, EvomergeError
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe

CPU_KV_CACHE_BYTES = 1 << 30


class VLLMEngine(PlanningEngine):
    """A `vllm.LLM` with the evomerge weight-transfer backend.

    With `config.repeatable` the engine runs in this process, where a batch forms from all prompts
    of a call: the same call gives the same answers. Otherwise it has a process of its own.
    """

    name = "vllm"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
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
            except Exception as error:  # vLLM's workers raise all kinds
                raise ConfigError(f"vLLM does not start on {directory}: {error}") from error

    def load(self, recipe: Recipe) -> Loaded:
        start = time.perf_counter()
        plan = self.plan(recipe)
        if self._on_disk or self.obstacle(plan) is not None:
            self._load_from_disk(recipe, plan)
            return Loaded(plan.digest, "disk", time.perf_counter() - start)
        if self._llm is None:
            self._llm = self._start(self.config.model, live=True)
        self._version = "in between"  # so that no answer of a switch that failed is believed
        with engine_errors():
            while_alive(self._llm, lambda: self._switch(recipe, plan))
        self._version = plan.digest
        return Loaded(plan.digest, "live", time.perf_counter() - start)

    def _switch(self, recipe: Recipe, plan: MergePlan) -> None:
        assert self._llm is not None
        self._llm.start_weight_update()
        message = update_message(recipe, plan, clear=self._wrote_nan)
        self._llm.update_weights({"update_info": message})
        failure = failure_of(self._llm.collective_rpc(ASK_WORKERS))
        version = plan.digest if failure is None else f"failed {plan.digest}"
        self._llm.finish_weight_update(weight_version=version)
        if failure is not None:
            raise failure
        if not self._llm.reset_prefix_cache():
            raise EngineDiedError("vLLM still holds cached prefixes of the previous candidate")
        self._wrote_nan = False

    def _load_from_disk(self, recipe: Recipe, plan: MergePlan) -> None:
        """Writes the model under `scratch` and starts an engine on it in place of this one."""
        directory = write_candidate(recipe, self.config.scratch, self.statistics)
        self._stop()
        self._on_disk = True  # a live engine and one per model do not fit beside each other
        self._llm = self._start(str(directory), live=False)
        self._llm.update_weight_version(plan.digest)
        self._version = plan.digest
        self.use_tokenizer_of(plan, directory)

    @property
    def max_model_len(self) -> int:
        if self._llm is not None:
            return int(self._llm.model_config.max_model_len)
        if self.asked_context is not None:
            return self.asked_context
        model = self.config.model
        config = read_config(model, trust_remote_code=self.trusts_remote_code)
        return longest_context(config, model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        if isinstance(settings, GenerationSettings):
            sampling = sampling_params(settings)
        else:
            sampling = [sampling_params(one) for one in settings]
        if each is not None:
            return self._stream(prompts, sampling, each, add_special_tokens=add_special_tokens)
        outputs = self._run(prompts, sampling, add_special_tokens=add_special_tokens)
        return [self._completion(output) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        answer = output.outputs[0]
        if logits_had_nan(output):
            self._refuse_nan()
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

    def _refuse_nan(self) -> NoReturn:
        self._wrote_nan = True  # into the cache, too, which the next switch has cleared
        raise CandidateError("its logits are NaN: activations overflow")

    def log_probabilities(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool
    ) -> list[list[float]]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._run(prompts, sampling, add_special_tokens=add_special_tokens)
        for output in outputs:
            self._completion(output)  # whose weights wrote it, and whether they gave numbers
        logs = [
            [
                position[token].logprob
                for token, position in zip(
                    output.prompt_token_ids, output.prompt_logprobs, strict=True
                )
                if position is not None
            ]
            for output in outputs
        ]
        if any(math.isnan(log) for some in logs for log in some):
            self._refuse_nan()
        return logs

    def _run(
        self, prompts: Sequence[Prompt], sampling: Any, *, add_special_tokens: bool
    ) -> list[Any]:
        llm, inputs = self._inputs(prompts, add_special_tokens=add_special_tokens)
        return list(self._call(lambda: llm.generate(inputs, sampling, use_tqdm=False)))

    def _stream(
        self, prompts: Sequence[Prompt], sampling: Any, each: Each, *, add_special_tokens: bool
    ) -> list[Completion]:
        """`LLM.generate` step by step: all requests are there before the first, as they are there.

        So the same batches form, and the answers are the same bits.
        """
        llm, inputs = self._inputs(prompts, add_special_tokens=add_special_tokens)
        requests = self._call(lambda: llm.enqueue(inputs, sampling, use_tqdm=False))
        # Outputs bear the number before the random part of what `enqueue` names them.
        places = {name.partition("-")[0]: place for place, name in enumerate(requests)}
        found: dict[int, Completion] = {}
        try:
            while llm.llm_engine.has_unfinished_requests():
                for output in self._call(llm.llm_engine.step):
                    if output.finished:
                        place = places[output.request_id]
                        found[place] = self._completion(output)
                        each(place, found[place])
        except BaseException:
            with contextlib.suppress(Exception):  # the engine may be gone
                llm.llm_engine.abort_request(requests, internal=True)
            raise
        return [found[place] for place in range(len(prompts))]

    def _inputs(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool
    ) -> tuple[Any, list[dict[str, list[int]]]]:
        if self._llm is None:
            raise EngineDiedError("no model is loaded")
        encoded = self.encode(prompts, add_special_tokens=add_special_tokens)
        return self._llm, [{"prompt_token_ids": ids} for ids in encoded]

    def _call(self, work: Callable[[], Any]) -> Any:
        """What `work` makes of the engine; EngineDiedError where that fails."""
        try:
            with environment(engine_variables(self.config)):
                return while_alive(self._llm, work)
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

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        llm = self._llm
        if llm is None or not self.config.options.get("enable_sleep_mode"):
            yield
            return
        llm.sleep(level=1)
        try:
            yield
        finally:
            llm.wake_up()

    def close(self) -> None:
        self._stop()
        remove_candidate(self.config.scratch)


def sampling_params(settings: GenerationSettings) -> Any:
    """The `vllm.SamplingParams` of these settings."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        stop=list(settings.stop),
        seed=settings.seed,
    )


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """What vLLM raises while it switches means that the engine broke: workers keep their errors."""
    try:
        yield
    except EvomergeError:
        raise
    except Exception as error:
        raise EngineDiedError(f"vLLM failed while switching: {error}") from error


def engine_variables(config: EngineConfig) -> dict[str, str]:
    """The environment variables that vLLM is to read, for what has no argument.

    What an engine's promises depend on is set whatever the user's environment says; the rest are
    defaults that it may override.
    """
    threads = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Pinned threads of engines (or of anything else) that share a core wait for each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return {
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        **threads,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if config.repeatable else "1",
        # A forked engine would inherit this process's locks and its half-used thread pool.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
        OWNED_VARIABLE: "1",
    }


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """`variables` in the environment for the block; then it is as it was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def engine_arguments(config: EngineConfig, directory: str, *, live: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a model directory, the user's own options last."""
    arguments: dict[str, Any] = {
        "model": directory,
        "dtype": config.dtype,
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
        # A prompt cut between two steps ends the engine there where answers are sampled with a
        # seed: torch's generators for CPUs know no offset to go back to (vLLM 0.32). Uncut ones
        # need steps as long as the longest, which vLLM sees to unless it is told how long they are.
        if "max_num_batched_tokens" not in config.options:
            arguments["enable_chunked_prefill"] = False
    # Last what must not be overridden: the statistics tell of every answer whether its logits had
    # a NaN.
    return arguments | dict(config.options) | {"disable_log_stats": False}


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    return bool(torch.cuda.is_available())
