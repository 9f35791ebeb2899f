"""Mixtures of experts as mergekit-moe's YAML describes them, read strictly.

Which dense models become experts of which base, and how the gates that choose among them are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from evomerge.errors import ConfigError, nearest, shown
from evomerge.recipe import DtypeName, ModelName, Say
from evomerge.settings import CUTOFF
from evomerge.strict_yaml import load_yaml
from evomerge.wording import Location, complaint, only_follows

RANDOM_MODES = ("random", "uniform_random")
# `hidden` is mergekit's name for `hidden_last`.
HIDDEN_MODES = ("hidden", "hidden_last", "hidden_avg")
GATE_MODES = (*HIDDEN_MODES, "cheap_embed", *RANDOM_MODES)
# A prefix of mergekit's for a model in this place; plain names mean the same.
_MODEL_PREFIX = "model:"


def _nothing_as_empty(value: object) -> object:
    return () if value is None else value


def _check_gate_mode(name: str) -> str:
    if name not in GATE_MODES:
        raise ValueError(
            f"unknown gate mode {shown(name)}{nearest(name, GATE_MODES, cutoff=CUTOFF)}"
        )
    return name


def _check_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; write what the expert is to be asked for")
    return prompts


Prompts = Annotated[
    tuple[Annotated[str, Field(strict=True)], ...],
    BeforeValidator(_nothing_as_empty),
    AfterValidator(_check_prompts),
]
Scale = Annotated[float, Field(allow_inf_nan=False)]


# The key of a mixture's file that says how it is evaluated: none of mergekit-moe's.
REPRODUCE = "reproduce"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expert(_Strict):
    """A dense model whose MLPs become one expert of every layer.

    `noise_scale` is the standard deviation of normal noise on all of its MLP weights,
    `residual_scale` a factor on its down projections.
    """

    source_model: ModelName
    positive_prompts: Prompts = ()
    negative_prompts: Prompts = ()
    noise_scale: Annotated[Scale, Field(ge=0)] | None = None
    residual_scale: Scale | None = None

    @property
    def makes(self) -> tuple[object, ...]:
        """What decides the expert's weights but for noise."""
        return self.source_model, self.residual_scale


class MoEConfig(_Strict):
    """A mixture of experts in mergekit-moe's format; unknown keys are refused."""

    base_model: ModelName
    experts: Annotated[tuple[Expert, ...], Field(min_length=1)]
    shared_experts: Annotated[tuple[Expert, ...], BeforeValidator(_nothing_as_empty)] = ()
    gate_mode: Annotated[str, AfterValidator(_check_gate_mode)] = "hidden"
    experts_per_token: Annotated[int, Field(ge=1, strict=True)] = 2
    architecture: str | None = None
    dtype: DtypeName = None
    tokenizer_source: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> MoEConfig:
        if self.experts_per_token > len(self.experts):
            raise ValueError(
                f"experts_per_token: {self.experts_per_token} is more than the "
                f"{_count(len(self.experts), 'expert')} that there are"
            )
        if self.has_learned_gates:
            self._check_prompts()
        return self

    @property
    def has_learned_gates(self) -> bool:
        """Whether the gates are made from prompts; they are random else."""
        return self.gate_mode not in RANDOM_MODES

    @property
    def tokenizer_model(self) -> str | None:
        """The model whose tokenizer goes with the output; None for the base's.

        A union is the base's too: it must not have other tokens.
        """
        if self.tokenizer_source in (None, "base", "union"):
            return None
        assert self.tokenizer_source is not None
        return self.tokenizer_source.removeprefix(_MODEL_PREFIX)

    def _check_prompts(self) -> None:
        for index, expert in enumerate(self.experts):
            if not expert.positive_prompts:
                raise ValueError(
                    f"experts.{index}: positive_prompts: gate_mode {self.gate_mode} needs at least "
                    "one prompt for every expert; or write gate_mode: random"
                )
        prompts = {(expert.positive_prompts, expert.negative_prompts) for expert in self.experts}
        if len(prompts) == 1 and len(self.experts) > 1:
            raise ValueError(
                "all experts have the same prompts, so that their gates would be the same; say in "
                "positive_prompts what each expert is for"
            )

    def model_names(self) -> tuple[str, ...]:
        """Every model whose weights are used, once: the base, then the experts as listed."""
        experts = [expert.source_model for expert in (*self.experts, *self.shared_experts)]
        return tuple(dict.fromkeys([self.base_model, *experts]))

    def with_models(self, names: Mapping[str, str]) -> MoEConfig:
        """The same configuration with models renamed; names that are no key stay as they are."""

        def renamed(experts: Sequence[Expert]) -> tuple[Expert, ...]:
            return tuple(
                expert.model_copy(
                    update={"source_model": names.get(expert.source_model, expert.source_model)}
                )
                for expert in experts
            )

        source = self.tokenizer_model
        return self.model_copy(
            update={
                "base_model": names.get(self.base_model, self.base_model),
                "experts": renamed(self.experts),
                "shared_experts": renamed(self.shared_experts),
                "tokenizer_source": self.tokenizer_source
                if source is None
                else names.get(source, source),
            }
        )


def read_moe_config(path: Path, *, lenient: bool = False, say: Say | None = None) -> MoEConfig:
    """The configuration in a YAML file. Raises ConfigError with every mistake of the file.

    `lenient` drops unknown keys, takes the base's tokenizer for one that cannot be had, and lets
    all experts be one model, telling `say` of each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_moe_config(text, str(path), lenient=lenient, say=say)


def mixture_text(text: str) -> str:
    """The text of a mixture's file without what only `evomerge reproduce` reads."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines(keepends=True):
        if line.startswith(f"{REPRODUCE}:"):
            inside = True
        elif inside and line.strip() and not line[0].isspace():
            inside = False
        if not inside:
            kept.append(line)
    return "".join(kept)


def parse_moe_config(
    text: str, where: str, *, lenient: bool = False, say: Say | None = None
) -> MoEConfig:
    """The configuration in YAML `text`; `where` names it in messages."""
    try:
        mapping = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: a mixture is a mapping with base_model and experts")
    # How the mixture is evaluated (`evomerge reproduce`) makes no other mixture.
    mapping = {key: value for key, value in mapping.items() if key != REPRODUCE}
    notes: list[str] = []
    if lenient:
        mapping = _forgiven(mapping, notes)
    try:
        config = MoEConfig.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(_describe_mistakes(error, where)) from error
    if (mistake := _lack_of_difference(config)) is not None:
        if not lenient:
            raise ConfigError(f"{where}: {mistake}, or say --lenient (to train it)")
        notes.append(mistake)
    for note in notes:
        if say is not None:
            say(f"{where}: warning: {note}")
    return config


def _lack_of_difference(config: MoEConfig) -> str | None:
    """What is wrong where learned gates would choose among equal experts."""
    makes = {expert.makes for expert in config.experts}
    noisy = any(expert.noise_scale for expert in config.experts)
    if not config.has_learned_gates or len(config.experts) == 1 or len(makes) > 1 or noisy:
        return None
    return (
        f"experts: all are {config.experts[0].source_model}: the mixture answers as that model "
        "does, at a higher price; name different models"
    )


def _forgiven(mapping: Mapping[object, object], notes: list[str]) -> dict[object, object]:
    """A copy without unknown keys, and without a tokenizer that no mixture can have."""
    kept = _known_part(mapping, list(MoEConfig.model_fields), "", notes)
    if kept.get("tokenizer_source") == "union":
        notes.append("tokenizer_source: union: the base model's tokenizer is taken")
        del kept["tokenizer_source"]
    for key in ("experts", "shared_experts"):
        experts = kept.get(key)
        if isinstance(experts, list):
            kept[key] = [
                _known_part(expert, list(Expert.model_fields), f"{key}.{index}.", notes)
                if isinstance(expert, Mapping)
                else expert
                for index, expert in enumerate(experts)
            ]
    return kept


def _known_part(
    mapping: Mapping[object, object], known: Sequence[str], place: str, notes: list[str]
) -> dict[object, object]:
    notes += [f"unknown key {place}{key} is ignored" for key in mapping if key not in known]
    return {key: value for key, value in mapping.items() if key in known}


def _describe_mistakes(error: ValidationError, where: str) -> str:
    mistakes = error.errors(include_url=False)
    return "\n".join(
        f"{where}: {complaint(mistake, _keys_at, cutoff=CUTOFF)}"
        for mistake in mistakes
        if not only_follows(mistake, mistakes)
    )


def _keys_at(location: Location) -> list[str]:
    return list((Expert if len(location) > 1 else MoEConfig).model_fields)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
