"""A study resolved against what is there: models found, tasks read, the search space built."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evomerge.database import check_writable
from evomerge.engine import vllm_is_installed
from evomerge.errors import ConfigError
from evomerge.evaluate.graders import check_graders, needs_judge, shares_gpu
from evomerge.evaluate.suite import Suite, Task, load_suite, split_holdout
from evomerge.merge.architecture import layer_count
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.inputs import InputModels
from evomerge.merge.plan import make_plan
from evomerge.optimizer import defaults
from evomerge.optimizer.history import Part
from evomerge.optimizer.names import COURSE, SamplerName, resolved_sampler
from evomerge.search.held_out import HeldOutSuite
from evomerge.search.study import StudyConfig, study_directory
from evomerge.space import SearchSpace, SpaceConfig

Result = TypeVar("Result")

_SIGMA0_AT_FIRST = 0.25
# What the first version of the course had no choice of.
_LATER_KEYS = (
    *("tasks_per_candidate", "sweep", "warm_start", "smoothing", "futility_stop"),
    "selection",
)
# These cannot change an answer: where the weights come in, and how much memory may be taken.
_HARMLESS_OPTIONS = ("load", "gpu_memory_utilization", "cpu_offload_gb")


@dataclass(frozen=True)
class ResolvedStudy:
    """A study with its models found, its tasks read and its search space built.

    `base` and `models` are absolute folders; `fingerprint` says of everything that counts what it
    is, under names that a user knows: two studies with the same one make the same search.
    `held_out` is the suite of the held-out tasks, where it is another one than `suite`.
    `course` is the version of the search's course that the study began with (`names.COURSE`).
    """

    config: StudyConfig
    storage: Path
    base: Path
    models: tuple[Path, ...]
    space: SearchSpace
    suite: Suite
    search_tasks: tuple[Task, ...]
    holdout_tasks: tuple[Task, ...]
    held_out: HeldOutSuite | None
    fingerprint: Mapping[str, str]
    course: int

    @property
    def name(self) -> str:
        """The study's name."""
        return self.config.study

    @property
    def sampler(self) -> SamplerName:
        """The sampler that proposes."""
        return resolved_sampler(self.config.sampler.name, self.course)

    @property
    def sigma0(self) -> float:
        """The sampler's first step."""
        return _sigma0(self.config, self.course)

    @property
    def population(self) -> int:
        """The candidates of a generation."""
        return self.config.sampler.population_for(self.space.dimension)

    @property
    def tasks_per_candidate(self) -> int:
        """How many of the search tasks the candidates of a generation answer."""
        asked, tasks = self.config.tasks_per_candidate, len(self.search_tasks)
        if asked is None:
            return defaults.tasks_per_candidate(tasks)
        number = math.ceil(asked * tasks) if asked <= 1 else int(asked)
        return min(tasks, max(2, number))

    @property
    def suites(self) -> tuple[Suite, ...]:
        """The suite that is searched on, and that of the held-out tasks if it is another one."""
        return (self.suite,) if self.held_out is None else (self.suite, self.held_out.suite)

    def suite_of(self, part: Part) -> Suite:
        """The suite whose tasks are answered in this part of a search."""
        return self.suites[-1] if part == "holdout" else self.suite

    def answer_limits(self, part: Part, task_ids: Sequence[str]) -> tuple[int, ...]:
        """`Suite.answer_limits` of the tasks of these names, which are answered in this part."""
        if part == "holdout" and self.held_out is not None:
            task_ids = self.held_out.own_ids(task_ids)
        return self.suite_of(part).answer_limits(task_ids)

    @property
    def directory(self) -> Path:
        """The study's own folder in the storage."""
        return study_directory(self.storage, self.name)


def resolve_study(
    config: StudyConfig,
    storage: Path,
    course: int = COURSE,
    environment: Mapping[str, str] | None = None,
) -> ResolvedStudy:
    """The study with everything it names found and checked, headers only.

    Raises ConfigError for whatever can be found wrong before an engine starts. What hub names,
    adapters and GGUF files become is kept in `storage`; `environment` is to hold the judge's keys
    (None: nobody will be asked).
    """
    check_writable(storage)
    inputs = InputModels(storage, config.folder, config.engine.dtype)
    suite = _in_file(
        config,
        lambda: load_suite(
            config.suite,
            config.folder,
            trust_code=config.trust_code,
            find_model=inputs.resolve,
        ),
    )
    held_out = _held_out_suite(config, inputs)
    suites = [suite] if held_out is None else [suite, held_out.suite]
    _check_graders(config, suites, environment)
    _check_turns(config, suites)
    search, holdout = _split(config, suite, held_out)
    base, *models = _model_folders(config, inputs)
    checkpoints = {str(folder): Checkpoint.open(folder) for folder in (base, *models)}
    space = _in_file(
        config,
        lambda: SearchSpace.build(
            config.space,
            base_model=str(base),
            models=[str(model) for model in models],
            num_layers=layer_count(checkpoints[str(base)]),
            dtype=config.engine.dtype,
        ),
    )
    _in_file(config, lambda: _check_scaled(config, checkpoints[str(base)]))
    _check_layer_counts(config, [checkpoints[str(folder)] for folder in (base, *models)])
    # Plans the merge once: models that do not fit together are found before an engine starts.
    _in_file(config, lambda: make_plan(space.uniform_recipe(), checkpoints))
    return ResolvedStudy(
        config=config,
        storage=storage,
        base=base,
        models=tuple(models),
        space=space,
        suite=suite,
        search_tasks=tuple(search),
        holdout_tasks=tuple(holdout),
        held_out=held_out,
        fingerprint=_fingerprint(
            config,
            space,
            suites,
            # By folder: in a linear merge the base may be one of the models, too.
            [checkpoints[str(folder)].fingerprint() for folder in (base, *models)],
            course,
        ),
        course=course,
    )


def what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for each part of a fingerprint that is not what it was."""
    return [
        f"{key}: was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]


def _check_graders(
    config: StudyConfig, suites: Sequence[Suite], environment: Mapping[str, str] | None
) -> None:
    """Raises ConfigError where the judge cannot grade the answers of one of the suites."""
    for key, suite in zip(("", "holdout: "), suites, strict=False):
        try:
            check_graders(
                suite, config.judge, trust_code=config.trust_code, environment=environment
            )
        except ConfigError as error:
            raise ConfigError(f"{config.where}: {key}{error}") from error


def _check_turns(config: StudyConfig, suites: Sequence[Suite]) -> None:
    """Raises ConfigError where the judge is to have the GPU of an engine that cannot rest."""
    engine = config.engine
    rests = engine_name(engine.name) == "vllm" and engine.url is None and engine.repeatable
    if any(shares_gpu(suite, config.judge) for suite in suites) and not rests:
        raise ConfigError(
            f"{config.where}: judge.sleep: takes turns with vLLM in this process alone: "
            "engine: {name: vllm, repeatable: true} without url; leave sleep out, or change that"
        )


def _held_out_suite(config: StudyConfig, inputs: InputModels) -> HeldOutSuite | None:
    """The second suite that `holdout` names, read; None where it is a share of the first one."""
    wanted = config.holdout
    if isinstance(wanted, float):
        return None

    def load() -> HeldOutSuite:
        try:
            suite = load_suite(
                wanted,
                config.folder,
                trust_code=config.trust_code,
                key="holdout",
                find_model=inputs.resolve,
            )
        except ConfigError as error:
            raise ConfigError(f"holdout: {error}") from error
        return HeldOutSuite(suite)

    return _in_file(config, load)


def _split(
    config: StudyConfig, suite: Suite, held_out: HeldOutSuite | None
) -> tuple[Sequence[Task], Sequence[Task]]:
    share = config.holdout
    if held_out is not None:
        _in_file(config, lambda: held_out.check_apart_from(suite))
        return suite.tasks, held_out.tasks
    if not isinstance(share, float) or not share:
        return suite.tasks, ()
    return _in_file(config, lambda: split_holdout(suite.tasks, share))


def _model_folders(config: StudyConfig, inputs: InputModels) -> list[Path]:
    """The folders of the base and of the models; every reference that is wrong is told at once."""
    references = {"base_model": config.base_model}
    references |= {f"models.{index}": model for index, model in enumerate(config.models)}
    folders, mistakes = inputs.resolve_all(references.values())
    if mistakes:
        raise ConfigError(
            "\n".join(
                f"{config.where}: {key}: {mistakes[reference]}"
                for key, reference in references.items()
                if reference in mistakes
            )
        )
    return [folders[reference] for reference in references.values()]


def _check_layer_counts(config: StudyConfig, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises ConfigError where a model has not as many layers as the base, whose slices are cut."""
    base, *others = (layer_count(checkpoint) for checkpoint in checkpoints)
    mistakes = [
        f"{config.where}: models.{index}: {model} has {count} layers, "
        f"{config.base_model} has {base}"
        for index, (model, count) in enumerate(zip(config.models, others, strict=True))
        if count != base
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes) + "\nall models of a search need as many as the base")


def _check_scaled(config: StudyConfig, base: Checkpoint) -> None:
    """Raises ConfigError where the scales of a stack would scale nothing."""
    stack = config.search_space.stack
    if stack is None or stack.scale is None:
        return
    idle = [one for one in stack.scale_filters if not any(one in name for name in base.tensors)]
    if idle:
        raise ConfigError(
            f"search_space.stack.scale_filters: no tensor of {config.base_model} has {idle[0]!r} "
            "in its name; name what layers add to the hidden states with, as [o_proj, down_proj]"
        )


def _in_file(config: StudyConfig, make: Callable[[], Result]) -> Result:
    """What `make` gives; its ConfigErrors get the study's file in front."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{config.where}: {error}") from error


def _fingerprint(
    config: StudyConfig,
    space: SearchSpace,
    suites: Sequence[Suite],
    sources: Sequence[str],
    course: int,
) -> dict[str, str]:
    """Everything that decides a search, by the name a user knows it under; defaults filled in."""
    mapping = config.to_mapping()
    if course == 0:
        for later in _LATER_KEYS:
            if getattr(config, later) == StudyConfig.model_fields[later].default:
                mapping.pop(later, None)
    for other in ("study", "budget", "storage", "suite", "judge"):
        mapping.pop(other, None)
    if len(suites) > 1:
        del mapping["holdout"]
    for option in _HARMLESS_OPTIONS:
        mapping["engine"].pop(option, None)
    mapping["engine"]["name"] = engine_name(config.engine.name)
    if isinstance(space.config, SpaceConfig):
        mapping["search_space"] = space.config.to_fingerprint()
    mapping["sampler"]["name"] = resolved_sampler(config.sampler.name, course)
    mapping["sampler"]["sigma0"] = _sigma0(config, course)
    mapping["sampler"]["population"] = config.sampler.population_for(space.dimension)
    parts = dict(_flattened(mapping))
    parts["suite (tasks, prompt, scorer, settings)"] = suites[0].digest[:16]
    for held_out in suites[1:]:
        parts["holdout (tasks, prompt, scorer, settings)"] = held_out.digest[:16]
    if config.judge is not None and any(map(needs_judge, suites)):
        parts |= config.judge.fingerprint(config.folder)
    names = ["base_model", *(f"models.{index}" for index in range(len(config.models)))]
    for name, source in zip(names, sources, strict=True):
        parts[f"{name} (its files)"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return parts


def _sigma0(config: StudyConfig, course: int) -> float:
    """As asked, else the default of this version of the course."""
    asked = "sigma0" in config.sampler.model_fields_set
    return config.sampler.sigma0 if asked or course else _SIGMA0_AT_FIRST


def engine_name(asked: str) -> str:
    """The engine that serves a study: for "auto" vLLM if it is installed, else transformers."""
    if asked != "auto":
        return asked
    return "vllm" if vllm_is_installed() else "transformers"


def _flattened(mapping: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield from _flattened(dict(enumerate(value)), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
