"""A published mixture in one file: built, evaluated, drawn, described, converted, step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from evomerge.engine.live_models import LiveSettings
from evomerge.errors import ConfigError, OutputExistsError, nearest
from evomerge.evaluate.graders import check_graders, needs_judge
from evomerge.evaluate.judge import reach_judge
from evomerge.evaluate.judge_config import JudgeConfig
from evomerge.evaluate.suite import Suite, SuiteConfig, load_suite
from evomerge.evaluate.suite_config import suite_complaints
from evomerge.evaluate.task import Task
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.gguf import TYPES, check_gguf_output, write_gguf
from evomerge.merge.gguf_vocabulary import read_vocabulary
from evomerge.merge.inputs import InputModels
from evomerge.merge.streaming import Progress
from evomerge.moe_config import REPRODUCE, MoEConfig, mixture_text, parse_moe_config
from evomerge.optimizer.tasks import draw_tasks
from evomerge.report.charts import check_charts
from evomerge.report.moe import build_moe
from evomerge.report.radar import draw_radar
from evomerge.report.results import MODEL_FOLDER
from evomerge.report.side_by_side import (
    check_radar_categories,
    evaluation_markdown,
    evaluation_radar,
)
from evomerge.search.resolve import engine_name, resolve_study
from evomerge.search.side_by_side import Contestant, Measured, evaluation_json, measure_models
from evomerge.search.storage import write_whole
from evomerge.search.study import EngineSettings, StudyConfig, check_study_name
from evomerge.strict_yaml import read_yaml

Say = Callable[[str], None]

EVALUATION = "evaluation.json"
TABLE = "evaluation.md"
CHARTS = ("radar.png", "radar.svg")
_STATE = "reproduction.json"
_CARD = "README.md"


def _suite_form(suite: object) -> str:
    return "inline" if isinstance(suite, Mapping | SuiteConfig) else "reference"


class ReproduceConfig(BaseModel):
    """The key `reproduce:` of a mixture's file: what is compared with it, on what, by whom.

    `name` is the mixture's; `models` come before it in the comparison, the first is what all
    others are compared with. `gguf` is the type of the GGUF file, null for none. `published` has
    scores to show beside ours, by model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    suite: Annotated[
        Annotated[str, Field(min_length=1), Tag("reference")]
        | Annotated[SuiteConfig, Tag("inline")],
        Discriminator(_suite_form),
    ]
    judge: JudgeConfig | None = None
    engine: EngineSettings = Field(default_factory=EngineSettings)
    gguf: str | None = "q8_0"
    published: Mapping[str, float] = {}

    @field_validator("name")
    @classmethod
    def _can_name_a_folder(cls, name: str) -> str:
        try:
            check_study_name(name)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("gguf")
    @classmethod
    def _is_written_here(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in TYPES:
            raise ValueError(f"{kind!r} is not written here{nearest(kind, TYPES)}")
        return kind


@dataclass(frozen=True)
class MixtureFile:
    """A mixture and how it is evaluated, as a file says; `text` is that of the mixture alone.

    `suite` is the suite as a reader knows it.
    """

    path: Path
    mixture: MoEConfig
    text: str
    reproduce: ReproduceConfig
    suite: str
    trusted: bool = False

    def live(self, name: str | None = None) -> LiveSettings:
        """What the engines are started with; `name` in place of the file's engine."""
        return live_settings(self.reproduce.engine, name)

    def with_gguf(self, kind: str | None) -> MixtureFile:
        """The same with another type of GGUF file, or none; ConfigError where it is not written."""
        if kind is not None and kind not in TYPES:
            raise ConfigError(f"--gguf: {kind!r} is not written here{nearest(kind, TYPES)}")
        return replace(self, reproduce=self.reproduce.model_copy(update={"gguf": kind}))


def live_settings(engine: EngineSettings, name: str | None = None) -> LiveSettings:
    """What engines are started with by an `engine:`; `name` in place of its own.

    Without a dtype each model has its own.
    """
    if name not in {None, "auto", "vllm", "transformers"}:
        raise ConfigError(f"--engine: {name!r} is none; there are auto, vllm and transformers")
    dtype = engine.dtype if "dtype" in engine.model_fields_set else None
    return LiveSettings(engine_name(name or engine.name), dtype, engine.threads, engine.options)


@dataclass(frozen=True)
class Reproduced:
    """What lies in the folder at the end; `document` is that of `evomerge eval --json`."""

    model: Path
    gguf: Path | None
    table: Path
    charts: tuple[Path, ...]
    document: Mapping[str, Any]


def is_mixture_file(path: Path) -> bool:
    """Whether a file describes a mixture with its evaluation; ConfigError where it is no YAML."""
    content = _mapping(path)
    if "experts" in content and REPRODUCE not in content:
        raise ConfigError(
            f"{path}: has no key {REPRODUCE}: {{name, models, suite, …}}, which says how the "
            f"mixture is evaluated; evomerge moe {path} OUT builds it alone"
        )
    return REPRODUCE in content


def read_mixture_file(path: Path, *, trust_code: bool = False) -> MixtureFile:
    """The mixture and its evaluation; ConfigError names every wrong key of the file.

    `trust_code` allows its suite scorers that are code of somebody's own, and any engine option.
    """
    text = path.read_text(encoding="utf-8")
    mixture = parse_moe_config(text, str(path))
    section = _mapping(path)[REPRODUCE]
    try:
        config = ReproduceConfig.model_validate(
            section, context={"folder": path.parent, "trust_code": trust_code}
        )
    except ValidationError as error:
        lines = _complaints(error.errors(include_url=False))
        raise ConfigError("\n".join(f"{path}: {REPRODUCE}.{line}" for line in lines)) from error
    suite = section["suite"]
    named = suite if isinstance(suite, str) else str(suite.get("like", path.stem))
    return MixtureFile(path, mixture, mixture_text(text), config, named, trust_code)


@dataclass
class Reproduction:
    """The steps of one reproduction into the folder `out`; what is done already is left as it is.

    `judge` and `live` may be others than the file's. `say` is told what takes its time, what
    `display` opens shows how far the mixture is.
    """

    file: MixtureFile
    out: Path
    storage: Path
    live: LiveSettings
    judge: JudgeConfig | None
    environment: Mapping[str, str]
    data: Path | None = None
    limit: int | None = None
    overwrite: bool = False
    say: Say = lambda line: None
    display: Callable[[], AbstractContextManager[Progress | None]] = nullcontext
    _tasks: tuple[Task, ...] = field(default=(), init=False)

    def run(self) -> Reproduced:
        """All steps. Raises ConfigError for what can be found wrong before the first one."""
        inputs = InputModels(self.storage, dtype=self.live.dtype or "bfloat16", say=self.say)
        suite = self._check(inputs)
        known, mistakes = inputs.resolve_all(self._names)
        if mistakes:
            raise ConfigError("\n".join(f"{self.file.path}: {one}" for one in mistakes.values()))
        if self.file.reproduce.gguf is not None:
            check_gguf_tokenizer(known[self.file.mixture.base_model])
        self._reach_judge(suite)
        model = self._build(inputs, known)
        contestants = [
            *(Contestant(name, known[name]) for name in self.file.reproduce.models),
            Contestant(self.file.reproduce.name, model),
        ]
        measured = measure_models(
            suite,
            self._tasks,
            contestants,
            live=self.live,
            judge=self.judge,
            storage=self.storage,
            folder=self.file.path.parent,
            environment=self.environment,
            say=self.say,
            trust_code=self.file.trusted,
        )
        document = self._document(suite, measured)
        charts = write_evaluation(self.out, document, self.file.reproduce.name, self.say)
        self._write_card(model, document, charts)
        return Reproduced(model, self._convert(model), self.out / TABLE, charts, document)

    @property
    def _names(self) -> list[str]:
        """Every model that is needed, once."""
        return list(dict.fromkeys([*self.file.mixture.model_names(), *self.file.reproduce.models]))

    def _check(self, inputs: InputModels) -> Suite:
        """The suite; everything else that the steps need is looked at, too."""
        config = self.file.reproduce
        try:
            suite = load_suite(
                config.suite,
                self.file.path.parent,
                data=self.data,
                trust_code=self.file.trusted,
                find_model=inputs.resolve,
            )
        except ConfigError as error:
            hint = "" if self.data else "; --data FILE names its tasks, too"
            raise ConfigError(f"{self.file.path}: {REPRODUCE}.suite: {error}{hint}") from error
        if needs_judge(suite) and self.judge is None:
            raise ConfigError(
                f"{self.file.path}: {REPRODUCE}.judge: is missing, and the suite is graded by one; "
                "--judge-model NAME --judge-url URL --judge-key-env VAR name it, too"
            )
        try:
            check_graders(
                suite, self.judge, trust_code=self.file.trusted, environment=self.environment
            )
        except ConfigError as error:
            raise ConfigError(f"{self.file.path}: {REPRODUCE}: {error}") from error
        self._tasks = _limited(suite, self.limit)
        state = self._state()
        begun = state.get("mixture") or state.get("building")
        if state and begun != self._mixture_digest and not self.overwrite:
            raise OutputExistsError(
                f"{self.out}: holds the reproduction of another mixture; choose another --out, or "
                "--overwrite"
            )
        if not state and self.out.exists() and any(self.out.iterdir()) and not self.overwrite:
            raise OutputExistsError(f"{self.out}: exists already; --overwrite writes into it")
        check_charts([self.out / name for name in CHARTS], overwrite=True)
        if config.gguf is not None:
            check_gguf_output(self._gguf, config.gguf, overwrite=True)
        return suite

    def _reach_judge(self, suite: Suite) -> None:
        """Raises ConfigError where the judge cannot be had: before the mixture is built for it."""
        if self.judge is None or not needs_judge(suite):
            return
        try:
            reach_judge(
                self.judge,
                folder=self.file.path.parent,
                environment=self.environment,
                say=lambda line: None,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.file.path}: {REPRODUCE}: {error}") from error

    def _build(self, inputs: InputModels, known: Mapping[str, Path]) -> Path:
        """Step 1: the mixture's folder, unless it is there."""
        model = self.out / self.file.reproduce.name
        sources = [Checkpoint.open(known[name]).fingerprint() for name in sorted(known)]
        made_of = hashlib.sha256("\n".join(sources).encode()).hexdigest()
        state = self._state()
        if model.is_dir() and (state.get("mixture"), state.get("sources")) == (
            self._mixture_digest,
            made_of,
        ):
            self.say(f"the mixture is there: {model}")
            return model
        self.out.mkdir(parents=True, exist_ok=True)
        self._remember({"building": self._mixture_digest})
        self.say(f"building the mixture {model}")
        with self.display() as progress:
            build_moe(
                self.file.mixture,
                model,
                inputs,
                verbatim=self.file.text,
                overwrite=True,
                progress=progress,
                say=self.say,
            )
        self._remember({"mixture": self._mixture_digest, "sources": made_of})
        return model

    def _document(self, suite: Suite, measured: Sequence[Measured]) -> dict[str, Any]:
        document = evaluation_json(self.file.suite, suite, measured, self.judge, judging=False)
        for row in document["models"]:
            row["published"] = self.file.reproduce.published.get(row["model"])
        return document

    def _write_card(self, model: Path, document: Mapping[str, Any], charts: Sequence[Path]) -> None:
        """Step 4: the evaluation at the end of the mixture's card, its chart beside."""
        card = (model / _CARD).read_text(encoding="utf-8").partition("\n## Evaluation\n")[0]
        picture = ""
        for chart in charts[:1]:
            (model / chart.name).write_bytes(chart.read_bytes())
            picture = _picture(chart)
        text = f"{card}\n## Evaluation\n\n{evaluation_text(document)}{picture}"
        write_whole(model / _CARD, text)

    def _convert(self, model: Path) -> Path | None:
        """Step 5: the GGUF file, unless it is there and of this model."""
        kind = self.file.reproduce.gguf
        if kind is None:
            return None
        made_of = [Checkpoint.open(model).fingerprint(), kind]
        state = self._state()
        if self._gguf.is_file() and state.get("gguf") == made_of:
            self.say(f"the GGUF file is there: {self._gguf}")
            return self._gguf
        self.say(f"writing {self._gguf}")
        for note in write_gguf(
            model, self._gguf, kind, overwrite=True, name=self.file.reproduce.name
        ):
            self.say(f"note: {note}")
        self._remember(state | {"gguf": made_of})
        return self._gguf

    @property
    def _gguf(self) -> Path:
        return self.out / f"{self.file.reproduce.name}.{self.file.reproduce.gguf}.gguf"

    @property
    def _mixture_digest(self) -> str:
        return hashlib.sha256(self.file.mixture.model_dump_json().encode()).hexdigest()

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.out / _STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, state: Mapping[str, Any]) -> None:
        write_whole(self.out / _STATE, json.dumps(state, indent=2) + "\n")


def check_study(
    config: StudyConfig, storage: Path, gguf: str | None, environment: Mapping[str, str]
) -> None:
    """Raises ConfigError for what can be found wrong before a study is searched and evaluated.

    First what is cheap to look at: models may have to be fetched. `gguf` and `environment` are as
    for `evaluate_study`.
    """
    if gguf is not None:
        check_gguf_output(storage / f"{config.study}.gguf", gguf, overwrite=True)
    study = resolve_study(config, storage, environment=environment)
    if gguf is not None:
        check_gguf_tokenizer(study.base)


def evaluate_study(
    config: StudyConfig,
    storage: Path,
    live: LiveSettings,
    *,
    gguf: str | None,
    environment: Mapping[str, str],
    say: Say,
) -> Reproduced:
    """A finished study's winner beside its base and models, on the tasks held out of the search.

    On all of them where none were held out: the table then says so. The files go into the study's
    folder; `gguf` is the type of the winner's GGUF file, None for none.
    """
    study = resolve_study(config, storage)
    folder = study.directory
    model = folder / MODEL_FOLDER
    suite = study.suite_of("holdout")
    held_out = study.holdout_tasks if study.held_out is None else suite.tasks
    tasks = held_out or suite.tasks
    models = {config.base_model: study.base, **dict(zip(config.models, study.models, strict=True))}
    measured = measure_models(
        suite,
        tasks,
        [*(Contestant(name, path) for name, path in models.items()), Contestant(study.name, model)],
        live=live,
        judge=config.judge,
        storage=storage,
        folder=config.folder,
        environment=environment,
        say=say,
        trust_code=config.trust_code,
    )
    named = config.suite if study.held_out is None else config.holdout
    which = "held out of the search" if held_out else "that the search saw, too"
    title = f"{named if isinstance(named, str) else study.name}, {len(tasks)} tasks {which}"
    document = evaluation_json(title, suite, measured, config.judge, judging=False)
    charts = write_evaluation(folder, document, study.name, say)
    if gguf is None:
        return Reproduced(model, None, folder / TABLE, charts, document)
    file = folder / f"{study.name}.{gguf}.gguf"
    say(f"writing {file}")
    for note in write_gguf(model, file, gguf, overwrite=True, name=study.name):
        say(f"note: {note}")
    return Reproduced(model, file, folder / TABLE, charts, document)


def check_gguf_tokenizer(folder: Path) -> None:
    """Raises ConfigError where llama.cpp has no such tokenizer as the model's in `folder`."""
    rows = Checkpoint.open(folder).architecture.embedding_header.shape[0]
    try:
        read_vocabulary(folder, rows)
    except ConfigError as error:
        raise ConfigError(f"{error}; --gguf none does without a GGUF file") from error


def write_evaluation(
    folder: Path, document: Mapping[str, Any], title: str, say: Say
) -> tuple[Path, ...]:
    """The evaluation as JSON and Markdown in `folder`, and its charts, whose paths come back.

    There are none where fewer than three categories have grades.
    """
    write_whole(folder / EVALUATION, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    text = f"# {title}\n\n{evaluation_text(document)}"
    charts = tuple(folder / name for name in CHARTS)
    try:
        check_radar_categories(name for row in document["models"] for name in row["categories"])
    except ConfigError as error:
        say(f"no radar chart: {error}")
        write_whole(folder / TABLE, text)
        return ()
    for note in draw_radar(evaluation_radar(document), charts, title=title):
        say(f"note: {note}")
    write_whole(folder / TABLE, f"{text}{_picture(charts[0])}")
    return charts


def _picture(chart: Path) -> str:
    return f"\n![Mean grades by category]({chart.name})\n"


def evaluation_text(document: Mapping[str, Any]) -> str:
    """The tables in Markdown, with what was published beside them where that is known."""
    known = {
        row["model"]: row["published"]
        for row in document["models"]
        if row.get("published") is not None
    }
    published = "".join(f"* {model}: {score:g}\n" for model, score in known.items())
    return evaluation_markdown(document) + (f"\nPublished:\n\n{published}" if published else "")


def _limited(suite: Suite, limit: int | None) -> tuple[Task, ...]:
    if limit is None:
        return suite.tasks
    drawn = set(draw_tasks({task.id: task.category for task in suite.tasks}, limit, 0, 0))
    return tuple(task for task in suite.tasks if task.id in drawn)


def _mapping(path: Path) -> Mapping[Any, Any]:
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: neither a mixture nor a study: both are mappings")
    return content


_SUITE = ("suite", "inline")


def _complaints(mistakes: Sequence[ErrorDetails]) -> list[str]:
    """What pydantic found wrong, a line each."""
    of_suite = [one for one in mistakes if one["loc"][:2] == _SUITE and len(one["loc"]) > 2]
    lines = [_complaint(one) for one in mistakes if one not in of_suite]
    below: list[ErrorDetails] = [{**one, "loc": one["loc"][2:]} for one in of_suite]
    return [*lines, *(f"suite.{line}" for line in suite_complaints(below))]


def _complaint(mistake: ErrorDetails) -> str:
    place = ".".join(str(part) for part in mistake["loc"] if part not in {"inline", "reference"})
    if mistake["type"] == "extra_forbidden":
        of_judge = mistake["loc"][0] == "judge" and len(mistake["loc"]) > 1
        level: type[BaseModel] = JudgeConfig if of_judge else ReproduceConfig
        return f"{place}: unknown key{nearest(str(mistake['loc'][-1]), level.model_fields)}"
    if mistake["type"] == "missing":
        return f"{place}: is missing"
    return f"{place}: {mistake['msg'].removeprefix('Value error, ')}"
