"""The study file: what a search is asked to do, read strictly."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigError, nearest
from evomerge.evaluate.judge_config import JudgeConfig, JudgeServer, Panel, Prices
from evomerge.evaluate.suite import SuiteConfig
from evomerge.evaluate.suite_config import suite_complaints, suite_from_mapping
from evomerge.optimizer import defaults
from evomerge.optimizer.names import SamplerName
from evomerge.resources import locate
from evomerge.space import SPACE_KEYS, Bounds, GenomeConfig, SpaceConfig, StackConfig
from evomerge.strict_yaml import load_yaml, read_yaml

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplerConfig(_Strict):
    """The `sampler:` of a study; `sigma0` is in the weights' own units.

    `name` "auto" is xnes; `population` None is `defaults.population`.
    """

    name: SamplerName = "auto"
    sigma0: Annotated[float, Field(gt=0, allow_inf_nan=False)] = defaults.SIGMA0
    population: Annotated[int, Field(ge=4)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def population_for(self, dimension: int) -> int:
        """How many candidates a generation has in a space of `dimension` genes."""
        return self.population or defaults.population(dimension)


class BudgetConfig(_Strict):
    """The `budget:` of a study, a total: of the sampler's candidates, or of tasks answered.

    `task_evaluations` counts everything that is paid: start, search, selection, held-out tasks.
    """

    trials: Annotated[int, Field(ge=1)] | None = None
    task_evaluations: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _is_one_total(self) -> BudgetConfig:
        if (self.trials is None) == (self.task_evaluations is None):
            raise ValueError("is either {trials: N} or {task_evaluations: N}")
        return self


class SelectionConfig(_Strict):
    """The `selection:` of a study: how often those who may win are measured afresh at the end.

    0: not at all; then the best observed wins, whose score flatters it.
    """

    attempts: Annotated[int, Field(ge=0, le=100)] = 3


_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


# Strict, so that a quoted number or `true` is not taken for a number.
_Count = Annotated[int, Field(ge=1, strict=True)]
_Switch = Annotated[bool, Field(strict=True)]


class EngineOptions(BaseModel):
    """Settings of vLLM (fields of its `EngineArgs`) that a file from somebody else may carry.

    They load no code and open no path. None: as vLLM has it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    max_model_len: _Count | None = None
    max_num_seqs: _Count | None = None
    max_num_batched_tokens: _Count | None = None
    tensor_parallel_size: _Count | None = None
    block_size: _Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    cpu_offload_gb: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)] | None = None
    enforce_eager: _Switch | None = None
    enable_prefix_caching: _Switch | None = None
    kv_cache_dtype: Annotated[str, Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] | None = None


class EngineSettings(EngineOptions):
    """The `engine:` of a study; `options` go to the engine as they are.

    `name` "auto" is vLLM where it is installed, else transformers. `threads`: of the CPU, None for
    one per core. `url`: a vLLM server that runs already, which no unit has to itself.
    """

    name: Literal["auto", "vllm", "transformers"] = "auto"
    repeatable: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    load: Literal["live", "disk"] = "live"
    threads: Annotated[int, Field(ge=1)] | None = None
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None

    @field_validator("url")
    @classmethod
    def _may_be_sent_recipes(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is not None:
            _check_url(url, _is_trusted(info))
        return url

    @model_validator(mode="after")
    def _promises_what_it_can(self) -> EngineSettings:
        if self.url is not None and (self.repeatable or self.name == "transformers"):
            raise ValueError("url: a vLLM server is shared; it needs name: vllm, repeatable: false")
        return self

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, settings: object, info: ValidationInfo) -> object:
        if isinstance(settings, Mapping):
            _check_engine_keys([str(key) for key in settings], _is_trusted(info))
        return settings

    @property
    def options(self) -> dict[str, object]:
        """The settings beyond those of evomerge itself."""
        known = {name: getattr(self, name) for name in EngineOptions.model_fields}
        asked = {name: value for name, value in known.items() if value is not None}
        return asked | (self.model_extra or {})


class StorageConfig(_Strict):
    """The `storage:` of a study; `database_env` names the variable with a database's URL."""

    directory: str | None = None
    database_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None


def _suite_form(suite: object) -> str:
    return "inline" if isinstance(suite, Mapping | SuiteConfig) else "reference"


def _holdout_form(holdout: object) -> str:
    return _suite_form(holdout) if isinstance(holdout, str | Mapping | SuiteConfig) else "share"


# What a mergekit-evolve file says of its tasks; without a suite of ours they are the suite.
_HARNESS_KEYS = ("tasks", "limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn")
# What a mergekit-evolve file says beside its genome: here a suite says it, and `sampler:`.
_EVOLVE_KEYS = (
    *("tasks", "limit", "num_fewshot", "shuffle", "random_init"),
    *("apply_chat_template", "fewshot_as_multiturn"),
)


class StudyConfig(_Strict):
    """A study file, or what was asked when a study began.

    `genome`, that of a mergekit-evolve file (or such a file's path), stands for `base_model`,
    `models` and `search_space`: the first two then repeat what it says. `tasks_per_candidate` is a
    share of the search tasks up to 1, a number of tasks above; None: as `defaults` has it. `sweep`:
    the scales of the uniform merges that the search starts from the best of; True: the usual ones,
    False: none. `warm_start`: where it may start from as well, the better merge on the same tasks:
    recipes' files (.yaml), or other studies' names for their winners. `smoothing` and
    `futility_stop` can be switched off. `holdout`: the share of the suite's tasks that has no say
    in the search, or a second suite, none of whose tasks has.
    """

    study: str
    base_model: Annotated[str, Field(min_length=1)]
    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    search_space: SpaceConfig = SpaceConfig()
    genome: GenomeConfig | None = None
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig
    suite: Annotated[
        Annotated[str, Field(min_length=1), Tag("reference")]
        | Annotated[SuiteConfig, Tag("inline")],
        Discriminator(_suite_form),
    ]
    judge: JudgeConfig | None = None
    tasks_per_candidate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    sweep: bool | tuple[_Scale, ...] = True
    warm_start: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    smoothing: bool = True
    futility_stop: bool = True
    selection: SelectionConfig = SelectionConfig()
    engine: EngineSettings = Field(default_factory=EngineSettings)
    holdout: Annotated[
        Annotated[float, Field(ge=0, lt=1), Tag("share")]
        | Annotated[str, Field(min_length=1), Tag("reference")]
        | Annotated[SuiteConfig, Tag("inline")],
        Discriminator(_holdout_form),
    ] = 0.0
    storage: StorageConfig = StorageConfig()

    _folder: Path = PrivateAttr(default_factory=Path)
    _where: str = PrivateAttr(default="study")
    _trust_code: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _takes_over_a_genome(cls, content: object, info: ValidationInfo) -> object:
        if not isinstance(content, Mapping) or content.get("genome") is None:
            return content
        folder = (info.context or {}).get("folder", Path())
        genome = _read_genome(content["genome"], folder)
        if "search_space" in content:
            raise ValueError("search_space: genome says it already; leave one of them out")
        if content.get("random_init"):
            raise ValueError("random_init: a search starts at equal weights here; leave it out")
        says = {"base_model": genome.served, "models": list(genome.models)}
        for key, value in says.items():
            if content.get(key, value) not in (value, tuple(value)):
                raise ValueError(f"{key}: genome says {value} already; leave it out")
        others = {key: value for key, value in content.items() if key not in _EVOLVE_KEYS}
        if "suite" not in content and (harness := _harness_tasks(content, folder)):
            others["suite"] = {"harness": harness}
        return {**others, **says, "genome": genome}

    @field_validator("study")
    @classmethod
    def _is_a_study_name(cls, name: str) -> str:
        check_study_name(name, error=ValueError)
        return name

    @field_validator("storage", mode="before")
    @classmethod
    def _may_be_a_directory_alone(cls, storage: object) -> object:
        if storage is None:
            return StorageConfig()
        return StorageConfig(directory=storage) if isinstance(storage, str) else storage

    @field_validator("warm_start", mode="before")
    @classmethod
    def _may_be_one(cls, start: object) -> object:
        if start is None:
            return ()
        return (start,) if isinstance(start, str) else start

    @field_validator("holdout", mode="before")
    @classmethod
    def _may_be_absent(cls, holdout: object) -> object:
        if isinstance(holdout, str):
            with suppress(ValueError):
                return float(holdout)  # a share in quotes is no name of a suite
        return 0.0 if holdout is None else holdout

    @field_validator("tasks_per_candidate")
    @classmethod
    def _is_a_share_or_a_number(cls, tasks: float | None) -> float | None:
        if tasks is not None and tasks > 1 and (tasks < 2 or tasks != int(tasks)):
            raise ValueError(f"{tasks:g} is neither a share up to 1 nor a number of tasks from 2")
        return tasks

    @field_validator("models")
    @classmethod
    def _are_different(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        repeated = [name for name in models if models.count(name) > 1]
        if repeated:
            raise ValueError(f"{repeated[0]} is listed twice")
        return models

    @property
    def space(self) -> SpaceConfig | GenomeConfig:
        """What is searched."""
        return self.genome or self.search_space

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the study start from: that of its file."""
        return self._folder

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self._where

    @property
    def trust_code(self) -> bool:
        """Whether code of somebody's own may run (scorers), and a judge be sent what it names."""
        return self._trust_code

    @property
    def has_typed_table(self) -> bool:
        """Whether the tasks are in a table that the user named in place of the file's."""
        return isinstance(self.suite, SuiteConfig) and self.suite.has_typed_table

    def with_seed(self, seed: int) -> StudyConfig:
        """The same study with another seed of its sampler."""
        sampler = self.sampler.model_copy(update={"seed": seed})
        return self.model_copy(update={"sampler": sampler})

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `study_from_mapping` makes the same study."""
        plain = self.model_dump(mode="json", exclude_none=True)
        if self.genome is not None:
            del plain["search_space"]
        if self.judge is not None:
            # As written: some keys exclude each other, and `temperature: null` says something.
            plain["judge"] = self.judge.model_dump(mode="json", exclude_unset=True)
        for key, suite in (("suite", self.suite), ("holdout", self.holdout)):
            if isinstance(suite, SuiteConfig) and suite.reference is None:
                plain[key]["reference"] = None  # there are none, and by default there are
        return plain


def read_study(reference: str, *, trust_code: bool = False) -> StudyConfig:
    """The study that a preset's bare name or a file's path means.

    Raises ConfigError with every mistake of the file at once. `trust_code` lets `engine:` have
    keys that are not known to be harmless, and suites scorers that are code of their own.
    """
    path = locate(reference, "search_spaces")
    content = read_yaml(path)
    return study_from_mapping(
        content, where=str(path), folder=path.resolve().parent, trust_code=trust_code
    )


def study_from_mapping(
    content: object, *, where: str, folder: Path, trust_code: bool = False
) -> StudyConfig:
    """The study in plain values; `where` names them in messages. Raises ConfigError."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: a study is a mapping with study, base_model, models …")
    _refuse_evolve_alone(content, where)
    context = {"trust_code": trust_code, "folder": folder}
    try:
        config = StudyConfig.model_validate(content, context=context)
    except ValidationError as error:
        lines = _complaints(error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error
    config._folder, config._where, config._trust_code = folder, where, trust_code
    return config


def _harness_tasks(content: Mapping[Any, Any], folder: Path) -> Mapping[str, Any] | None:
    """The tasks of a mergekit-evolve file, which the study is or names as its genome, if any."""
    genome = content["genome"]
    if not content.get("tasks") and isinstance(genome, str):
        content = _content_of(folder / Path(genome).expanduser())
    if not content.get("tasks"):
        return None
    return {key: content[key] for key in _HARNESS_KEYS if content.get(key) is not None}


def _refuse_evolve_alone(content: Mapping[object, object], where: str) -> None:
    """Raises ConfigError where a mergekit-evolve file has nothing that makes it a study."""
    if "genome" not in content or "study" in content or "budget" in content or "suite" in content:
        return
    suite = "" if content.get("tasks") else ", suite: {scorer: …, data: TASKS.jsonl, …}"
    raise ConfigError(
        f"{where}: this mergekit-evolve file says what is searched (genome), and not how far. Add "
        f"study: NAME{suite} and budget: {{trials: N}} to it, or write them into a study file of "
        f"their own beside genome: {Path(where).name}"
    )


def _read_genome(genome: object, folder: Path) -> GenomeConfig:
    """The genome in plain values, or in the file of this name. Raises ValueError."""
    if isinstance(genome, GenomeConfig):
        return genome
    place = ""
    if isinstance(genome, str):
        path = folder / Path(genome).expanduser()
        genome, place = _genome_in(path), f"{path}: "
    try:
        return GenomeConfig.model_validate(genome)
    except ValidationError as error:
        lines = [_complaint({**item, "loc": ("genome", *item["loc"])}) for item in error.errors()]
        raise ValueError("\n  ".join(f"{place}{line}" for line in lines)) from error


def _genome_in(path: Path) -> object:
    """The genome in a mergekit-evolve file, or in one that holds nothing else."""
    content = _content_of(path)
    return content.get("genome", content)


def _content_of(path: Path) -> Mapping[Any, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"genome: {path} cannot be read as YAML: {error}") from error
    return content if isinstance(content, Mapping) else {}


def check_study_name(name: str, error: type[Exception] = ConfigError) -> None:
    """Raises `error` unless `name` can name a study (and so a folder)."""
    if not STUDY_NAME.fullmatch(name):
        raise error(
            f"study: {name!r} is no name for a study; right are 1 to 100 of A–Z a–z 0–9 . _ - "
            "that start with a letter or digit"
        )


def with_options(
    config: StudyConfig,
    *,
    data: Path | None = None,
    judge: JudgeConfig | None = None,
    engine: str | None = None,
) -> StudyConfig:
    """The study with what the command line says in place of the file: tasks, judge, engine.

    Raises ConfigError where that is not possible.
    """
    changes: dict[str, Any] = {} if judge is None else {"judge": judge}
    if engine is not None:
        if engine not in {"auto", "vllm", "transformers"}:
            raise ConfigError(f"--engine: {engine!r} is none; there are vllm and transformers")
        changes["engine"] = config.engine.model_copy(update={"name": engine})
    if data is not None:
        suite = config.suite
        if isinstance(suite, str):
            suite = suite_from_mapping(
                {"like": suite},
                config.folder,
                f"{config.where}: suite",
                trust_code=config.trust_code,
            )
        changes["suite"] = suite.with_data(data)
    return config.model_copy(update=changes)


def study_directory(storage: Path, name: str) -> Path:
    """Where study `name` keeps what can be rebuilt from the database. ConfigError on a bad name."""
    check_study_name(name)
    return storage / "studies" / name


def _is_trusted(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("trust_code"))


def _check_url(url: str, trusted: bool) -> None:
    """Raises ValueError unless a server at `url` may be used: without trust, one on this machine.

    The server is sent recipes and prompts, and its answers decide the search.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no address of a server: {error}") from error
    if "@" in parts.netloc:
        raise ValueError("user and password do not belong into a study file; leave them out")
    if not (trusted or _is_this_machine(host)):
        raise ValueError(
            f"{host!r} is another machine, which needs --trust-code on the command line; "
            "without it right are localhost, 127.0.0.1 and [::1]"
        )


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_engine_keys(keys: Sequence[str], trusted: bool) -> None:
    """Raises ValueError that says of each key what is wrong with it."""
    known = tuple(EngineSettings.model_fields)
    mistakes = [
        f"unknown key {key!r}{nearest(key, known)}; other settings of vLLM need --trust-code "
        "on the command line"
        for key in keys
        if key not in known and key != "quantization" and not trusted
    ]
    if "quantization" in keys:
        mistakes.append("quantization: merged weights cannot be put into a quantised model")
    if mistakes:
        raise ValueError("\n  ".join(mistakes))


_SECTIONS: Mapping[str, Sequence[str]] = {
    "search_space": SPACE_KEYS,
    "stack": tuple(StackConfig.model_fields),
    "genome": tuple(GenomeConfig.model_fields),
    "sampler": tuple(SamplerConfig.model_fields),
    "budget": tuple(BudgetConfig.model_fields),
    "selection": tuple(SelectionConfig.model_fields),
    "judge": tuple(JudgeConfig.model_fields),
    "others": tuple(JudgeServer.model_fields),
    "finalists": tuple(Panel.model_fields),
    "prices": tuple(Prices.model_fields),
    "storage": tuple(StorageConfig.model_fields),
}
# Names in our models that are no keys of the file.
_SUITES = (("suite", "inline"), ("holdout", "inline"))
_UNWRITTEN = ("inline", "reference", "share", "numbers")


def _known_keys(location: Sequence[str]) -> Sequence[str]:
    """The keys that may stand where the last one of `location` does."""
    outer = [part for part in location[:-1] if not part.isdecimal()]  # those are places in lists
    if not outer:
        return tuple(StudyConfig.model_fields)
    if outer[0] == "search_space" and len(outer) > 1 and outer[-1] != "stack":
        return tuple(Bounds.model_fields)
    return _SECTIONS.get(outer[-1], tuple(StudyConfig.model_fields))


def _complaints(mistakes: Sequence[ErrorDetails]) -> list[str]:
    """What pydantic found wrong with a study, a line each."""
    lines: list[str] = []
    for suite, some in groupby(mistakes, _suite_of):
        if suite is None:
            lines += (_complaint(dict(one)) for one in some)
        else:
            below: list[ErrorDetails] = [{**one, "loc": one["loc"][2:]} for one in some]
            lines += (f"{suite}.{line}" for line in suite_complaints(below))
    return lines


def _suite_of(mistake: ErrorDetails) -> str | None:
    """The key whose suite has a mistake at one of its own keys; None for all other mistakes."""
    location = mistake["loc"]
    return str(location[0]) if location[:2] in _SUITES and len(location) > 2 else None


def _complaint(mistake: Mapping[str, Any]) -> str:
    """One mistake that pydantic found, in the words of the file."""
    location = [str(part) for part in mistake["loc"] if part not in _UNWRITTEN]
    place = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(location[-1], _known_keys(location))}"
    if mistake["type"] == "missing":
        return f"{place}: is missing"
    message = str(mistake["msg"]).removeprefix("Value error, ").removeprefix(f"{place}: ")
    if place == "suite" and mistake["type"] == "string_type":
        message = "should be a preset's name, a suite file, or a mapping of a suite's keys"
    given = "" if mistake["type"] == "value_error" else f" (given: {mistake['input']!r})"
    return f"{place}: {message}{given}" if place else f"{message}{given}"
