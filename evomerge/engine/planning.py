"""What every engine over local checkpoints does alike: plan recipes, render and count prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.engine.base import (
    Completion,
    Each,
    Engine,
    EngineConfig,
    GenerationSettings,
    Prompt,
)
from evomerge.engine.tokenizer import Tokenizer
from evomerge.errors import CandidateError, ConfigError, EngineDiedError, EvomergeError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.dtypes import dtype_of
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import MergePlan, make_plan
from evomerge.merge.recall import Statistics
from evomerge.recipe import Recipe, recipe_from_mapping

# The remote call of vLLM that asks every worker's backend what its last message came to
# (`MergeBackend.__call__`): the name of the attribute under which a vLLM worker holds its backend.
ASK_WORKERS = "weight_transfer_engine"
_CANDIDATE = "candidate"


class PlanningEngine(Engine):
    """An engine that serves `config.model` and becomes merges of it and `config.sources`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        names = dict.fromkeys([config.model, *config.sources])
        self.checkpoints: Mapping[str, Checkpoint] = {
            name: Checkpoint.open(Path(name)) for name in names
        }
        self._served_tokenizer = Tokenizer(config.model, trust_remote_code=self.trusts_remote_code)
        self.tokenizer = self._served_tokenizer
        self.statistics = Statistics()
        self._dtype = dtype_of(config.dtype)
        self._served = _shapes(self.plan(self._plain_recipe()))

    @property
    def asked_context(self) -> int | None:
        """The tokens, prompt and answer together, that the user allows; None: as the model does."""
        asked = self.config.options.get("max_model_len")
        return None if asked is None else int(str(asked))

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the user turned on code that comes with a model."""
        return bool(self.config.options.get("trust_remote_code", False))

    def _plain_recipe(self) -> Recipe:
        mapping = {"merge_method": "passthrough", "models": [{"model": self.config.model}]}
        return recipe_from_mapping(mapping, self.config.model)

    def plan(self, recipe: Recipe) -> MergePlan:
        """The plan of `recipe`; ConfigError or CandidateError where there is none."""
        return make_plan(recipe, self.checkpoints)

    def obstacle(self, plan: MergePlan) -> str | None:
        """Why the served model cannot become that of `plan` in place; None if it can."""
        if plan.dtype != self._dtype:
            return f"its dtype is {plan.dtype}, the engine's {self._dtype}"
        if _has_own_tokenizer(plan):
            return "its tokenizer or chat template is not the served model's"
        wanted = _shapes(plan)
        if differing := wanted.keys() ^ self._served.keys():
            return f"it and the served model do not both have the tensor {min(differing)}"
        for name, shape in wanted.items():
            if shape != self._served[name]:
                return f"{name} has shape {shape}, in the served model {self._served[name]}"
        return None

    def use_tokenizer_of(self, plan: MergePlan, directory: Path | None) -> None:
        """Reads and writes text as the candidate of `plan` does; `directory` has its model's files.

        That is as the served model does, wherever the recipe does not say otherwise.
        """
        if directory is None or not _has_own_tokenizer(plan):
            self.tokenizer = self._served_tokenizer
        else:
            self.tokenizer = Tokenizer(str(directory), trust_remote_code=self.trusts_remote_code)

    def supports(self, recipe: Recipe) -> str | None:
        return self.obstacle(self.plan(recipe))

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        return self.tokenizer.render(messages, template=template, cue=cue)

    def has_chat_template(self) -> bool:
        return self.tokenizer.has_chat_template

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    def encode(self, prompts: Sequence[Prompt], *, add_special_tokens: bool) -> list[list[int]]:
        return [
            self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]


def by_settings(
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings],
    generate: Callable[[Sequence[Prompt], GenerationSettings], Iterable[Completion]],
    each: Each | None = None,
) -> list[Completion]:
    """One completion per prompt: `generate` is called once for all that are sampled alike.

    `each` is told every one as `generate` gives it.
    """
    if isinstance(settings, GenerationSettings):
        settings = [settings] * len(prompts)
    groups: dict[GenerationSettings, list[int]] = {}
    for place, own in enumerate(settings):
        groups.setdefault(own, []).append(place)
    found: dict[int, Completion] = {}
    for shared, places in groups.items():
        completions = generate([prompts[place] for place in places], shared)
        for place, completion in zip(places, completions, strict=True):
            found[place] = completion
            if each is not None:
                each(place, completion)
    return [found[place] for place in range(len(prompts))]


def _has_own_tokenizer(plan: MergePlan) -> bool:
    return plan.vocabulary is not None or plan.chat_template is not None


def _shapes(plan: MergePlan) -> dict[str, tuple[int, ...]]:
    return {entry.name: tuple(entry.shape) for entry in plan.entries}


def write_candidate(recipe: Recipe, scratch: str | None, statistics: Statistics) -> Path:
    """The model of `recipe` in a folder under `scratch`, in place of the previous one there."""
    if scratch is None:
        raise ConfigError("engine: load: disk needs a directory for its models (scratch)")
    return materialize(recipe, Path(scratch) / _CANDIDATE, overwrite=True, statistics=statistics)


def remove_candidate(scratch: str | None) -> None:
    """Removes what `write_candidate` left."""
    if scratch is not None:
        shutil.rmtree(Path(scratch) / _CANDIDATE, ignore_errors=True)


def update_message(recipe: Recipe, plan: MergePlan, *, clear: bool) -> dict[str, Any]:
    """What the backend in vLLM's workers is sent for one candidate: some kilobytes of JSON.

    `clear` has the key-value cache emptied, after a candidate that left NaN in it.
    """
    return {"recipe": recipe.to_mapping(), "digest": plan.digest, "clear": clear}


def failure_of(replies: Sequence[Mapping[str, Any] | None]) -> EvomergeError | None:
    """What the workers' replies to ASK_WORKERS say of the last message; None if all took it.

    A CandidateError where every failure is the candidate's own, else an EngineDiedError.
    """
    failures = [reply for reply in replies if reply is not None]
    if not failures:
        return None
    message = "; ".join(dict.fromkeys(str(failure["message"]) for failure in failures))
    if all(failure["of_candidate"] for failure in failures):
        return CandidateError(message)
    return EngineDiedError(f"vLLM failed while switching: {message}")
