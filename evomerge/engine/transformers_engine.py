"""transformers as an engine: slower than vLLM, on every platform that torch runs on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.engine.base import (
    Completion,
    Each,
    EngineConfig,
    GenerationSettings,
    Loaded,
    Prompt,
)
from evomerge.engine.planning import (
    PlanningEngine,
    by_settings,
    remove_candidate,
    write_candidate,
)
from evomerge.engine.tokenizer import longest_context
from evomerge.errors import CandidateError, ConfigError, EngineDiedError
from evomerge.merge.kernels import compile_pays, merge_entry
from evomerge.merge.methods import has_overflow
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe

BATCH = 64


class TransformersEngine(PlanningEngine):
    """An `AutoModelForCausalLM` whose parameters a recipe is computed into, in place."""

    name = "transformers"

    def __init__(self, config: EngineConfig) -> None:
        if unknown := sorted(set(config.options) - {"max_model_len", "trust_remote_code"}):
            raise ConfigError(
                f"engine: {unknown[0]}: not an option of the transformers engine; it has "
                "max_model_len"
            )
        super().__init__(config)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model = self._open(config.model)
        elements = sum(parameter.numel() for parameter in self.model.parameters())
        self._compiled = compile_pays(elements, self.device)
        self._version = "default"
        self._is_from_disk = False

    def _open(self, directory: str) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                Path(directory),
                dtype=getattr(torch, self.config.dtype),
                trust_remote_code=self.trusts_remote_code,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers does not load {directory}: {error}") from error
        moved: Any = model
        return moved.to(self.device).eval()

    def obstacle(self, plan: MergePlan) -> str | None:
        if obstacle := super().obstacle(plan):
            return obstacle
        names = {entry.name for entry in plan.entries}
        if not self._is_from_disk and (foreign := names - self._parameters().keys()):
            return f"transformers keeps {min(foreign)} under another name"
        return None

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def load(self, recipe: Recipe) -> Loaded:
        start = time.perf_counter()
        plan = self.plan(recipe)
        live = self.config.load == "live" and self.obstacle(plan) is None
        self._version = "in between"  # what a load that fails leaves is no candidate's model
        if live:
            if self._is_from_disk:  # that one has its own layers and ties
                self.model, self._is_from_disk = self._open(self.config.model), False
            self._apply(plan)
            self.use_tokenizer_of(plan, None)
        else:
            self._load_from_disk(recipe, plan)
        self._version = plan.digest
        return Loaded(plan.digest, "live" if live else "disk", time.perf_counter() - start)

    def _apply(self, plan: MergePlan) -> None:
        parameters = self._parameters()
        for entry in plan.entries:
            inputs = [
                self.checkpoints[source.model].read(source.name).to(self.device)
                for source in entry.inputs
            ]
            into = parameters[entry.name].data
            # Some parameters are kept in a wider dtype than the model on disk has them in.
            rounded = into.dtype == entry.dtype.torch
            out = into if rounded else torch.empty_like(into, dtype=entry.dtype.torch)
            recall = self.statistics.of(entry.inputs)
            merge_entry(out, entry, inputs, recall=recall, compiled=self._compiled)
            if has_overflow(out):
                raise CandidateError(f"{entry.name} has NaN or infinite values")
            if not rounded:
                into.copy_(out)

    def _load_from_disk(self, recipe: Recipe, plan: MergePlan) -> None:
        directory = write_candidate(recipe, self.config.scratch, self.statistics)
        self.model, self._is_from_disk = self._open(str(directory)), True
        self.use_tokenizer_of(plan, directory)

    @property
    def max_model_len(self) -> int:
        if self.asked_context is not None:
            return self.asked_context
        return longest_context(self.model.config, self.config.model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        return by_settings(
            prompts,
            settings,
            lambda some, alike: self._generate(some, alike, add_special_tokens=add_special_tokens),
            each,
        )

    def _generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, *, add_special_tokens: bool
    ) -> Iterator[Completion]:
        for start in range(0, len(prompts), BATCH):
            batch = self.encode(
                prompts[start : start + BATCH], add_special_tokens=add_special_tokens
            )
            yield from self._generate_batch(batch, settings)

    def _generate_batch(
        self, prompts: list[list[int]], settings: GenerationSettings
    ) -> list[Completion]:
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        ids, mask = self._padded(prompts)
        sampled = settings.temperature > 0
        arguments: dict[str, Any] = {"max_new_tokens": settings.max_tokens, "do_sample": sampled}
        if sampled:
            arguments |= {"temperature": settings.temperature, "top_p": settings.top_p}
        if settings.repetition_penalty != 1.0:
            arguments["repetition_penalty"] = settings.repetition_penalty
        if settings.stop:
            stop = list(settings.stop)
            arguments |= {"stop_strings": stop, "tokenizer": self.tokenizer.inner}
        watch = _NaNWatch()
        try:
            output = self.model.generate(
                ids,
                attention_mask=mask,
                pad_token_id=self._padding(),
                logits_processor=[watch],
                **arguments,
            )
        except (RuntimeError, MemoryError) as error:
            if not watch.seen:  # of which nothing can be sampled
                raise EngineDiedError(f"transformers failed while generating: {error}") from error
        if watch.seen:
            raise CandidateError("its logits are NaN: activations overflow")
        answers = output[:, ids.shape[1] :].tolist()
        return [
            self._completion(prompt, answer, settings)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _completion(
        self, prompt: list[int], answer: list[int], settings: GenerationSettings
    ) -> Completion:
        ends = [place for place, token in enumerate(answer) if token in self._end_tokens()]
        finished = bool(ends)
        written = answer[: ends[0] + 1] if finished else answer
        text = self.tokenizer.decode(written[:-1] if finished else written)
        for stop in settings.stop:
            before, found, _ = text.partition(stop)
            text, finished = before, finished or bool(found)
        return Completion(
            text=text,
            token_ids=tuple(written),
            finish_reason="stop" if finished else "length",
            prompt_tokens=len(prompt),
            version=self._version,
        )

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both of shape (prompts, longest prompt), padded left."""
        longest = max(len(prompt) for prompt in prompts)
        ids = [[self._padding()] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _padding(self) -> int:
        padding = self.tokenizer.inner.pad_token_id
        return int(padding) if padding is not None else min(self._end_tokens(), default=0)

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.inner.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    @torch.inference_mode()
    def log_probabilities(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool
    ) -> list[list[float]]:
        encoded = self.encode(prompts, add_special_tokens=add_special_tokens)
        return [self._scored(ids) for ids in encoded]

    def _scored(self, ids: list[int]) -> list[float]:
        tokens_1T = torch.tensor([ids], device=self.device)  # 1 = one prompt, T = its tokens
        logits_TV = self.model(tokens_1T).logits[0, :-1].float()
        values = logits_TV.log_softmax(-1).gather(1, tokens_1T[0, 1:, None])
        scored: list[float] = values[:, 0].tolist()
        return scored

    def close(self) -> None:
        del self.model
        remove_candidate(self.config.scratch)


class _NaNWatch:
    """A logits processor that changes nothing and remembers whether it saw a NaN."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen = self.seen or bool(torch.isnan(scores).any())
        return scores
