"""What a suite file says: where its tasks are, how they are asked and how they are graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from evomerge.errors import ConfigError, nearest, shown
from evomerge.evaluate.gates import GATES, Gate
from evomerge.evaluate.likelihood import LIKELIHOOD_SCORERS
from evomerge.evaluate.named_files import NamedFile
from evomerge.evaluate.own_scorers import entry_point_names, is_code
from evomerge.evaluate.scorers import SCORERS
from evomerge.evaluate.suite_layers import JUDGE, as_table, put_together, suite_content
from evomerge.evaluate.tables import read_text
from evomerge.resources import data_root
from evomerge.wording import Location, complaint, only_follows

# What grades where lm-evaluation-harness does.
HARNESS = "lm-eval"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# The two forms that some values have; pydantic names the one that it took in a mistake's place.
_TEXT, _MAPPING = _FORMS = ("<text>", "<mapping>")


def _form(value: object) -> str:
    return _TEXT if isinstance(value, str) else _MAPPING


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]


class DataSource(_Strict):
    """Where tasks come from that are not beside the suite.

    Files of the dataset repository `hub` (owner/name) at `revision`: those that are named, or those
    of `split` in `config` (without one the default). Without `hub` a file that has to be brought,
    and `source` says from where.
    """

    file: Names = ()
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    config: Annotated[str, Field(min_length=1)] | None = None
    split: Annotated[str, Field(min_length=1)] | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.hub is None and self.source is None:
            raise ValueError("hub (owner/name) or source (where to get the file) is missing")
        for key in ("revision", "config", "split"):
            if self.hub is None and getattr(self, key) is not None:
                raise ValueError(f"{key} is that of a hub repository, and hub is missing")
        if self.hub is None and not self.file:
            raise ValueError("file is missing: the name of what source has")
        if self.file and (self.split or self.config):
            raise ValueError("file or split (with config): each says which files; leave one out")
        if not self.file and self.split is None:
            raise ValueError("file (a name or several) or split (as split: test) is missing")
        outside = [name for name in self.file if ".." in Path(name).parts or name.startswith("/")]
        if self.hub is not None and outside:
            # The hub's cache would be left by it.
            raise ValueError(f"file: {outside[0]!r} is no name in a hub repository")
        if self.revision is not None and ".." in Path(self.revision).parts:
            raise ValueError(f"revision: {self.revision!r} is none of a hub repository")
        return self


class JoinConfig(_Strict):
    """A second table, whose columns every task gets from the row with the same value in `key`.

    `file` is looked for where the first table is; of several names the first that is there.
    """

    file: Names
    key: Annotated[str, Field(min_length=1)]


# The judge's server is told each of them.
_MOST_GRADES = 100


class RubricConfig(_Strict):
    """What a judge is told (a Jinja template, `evaluate.rubric.Rubric`) and may give.

    `empty` is the grade of an answer without words, for which the judge is not asked.
    """

    prompt: Annotated[str, Field(min_length=1)]
    low: int
    high: int
    empty: float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.high - self.low > _MOST_GRADES:
            raise ValueError(f"grades are whole numbers, at most {_MOST_GRADES + 1} different ones")
        if self.empty is not None and not self.low <= self.empty <= self.high:
            raise ValueError(f"empty {self.empty:g} is not in {self.low} to {self.high}")
        return self


class GenerationConfig(_Strict):
    """How the answers of one category are generated, where that differs from the suite's."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: Names | None = None


class RouterConfig(_Strict):
    """The table of examples that says how each task is asked (`evaluate.router`).

    Tasks are compared by their letters, or by the vectors of the model `embedding` (a folder, or
    owner/name[@revision] on the hub), with `embedding_prefix` before each text; under `threshold`
    the default row counts. `leave_one_out`: no task is compared with the example that it is itself.
    """

    table: Annotated[str, Field(min_length=1)]
    threshold: float | None = None
    embedding: Annotated[str, Field(min_length=1)] | None = None
    embedding_prefix: str = ""
    leave_one_out: bool = True


class HarnessTask(_Strict):
    """A task or group of lm-evaluation-harness as an objective.

    `metric` is a name and a filter as the harness's tables have them ("exact_match,strict-match"),
    a name alone is that of the filter "none". `limit` is the number of documents.
    """

    name: Annotated[str, Field(min_length=1)]
    metric: Annotated[str, Field(min_length=1)] = "acc,none"
    weight: Annotated[float, Field(gt=0)] = 1.0
    limit: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None

    @property
    def metric_name(self) -> str:
        """The metric without its filter."""
        return self.metric.partition(",")[0]

    @property
    def filter(self) -> str:
        """The filter of the answers that the metric is taken of."""
        return self.metric.partition(",")[2] or "none"


class HarnessConfig(_Strict):
    """Tasks of lm-evaluation-harness, as a mergekit-evolve file lists them.

    `include_path` is a folder of task files of one's own.
    """

    tasks: Annotated[tuple[HarnessTask, ...], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    include_path: str | None = None

    @field_validator("include_path")
    @classmethod
    def _is_trusted(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and not (info.context or {}).get("trust_code"):
            raise ValueError("task files may run code, which needs --trust-code")
        return path


@dataclass(frozen=True)
class _Origin:
    """Where a suite's texts come from: what is the same otherwise is the same suite."""

    files: tuple[NamedFile, ...] = field(default=(), compare=False)


class SuiteConfig(_Strict):
    """What a suite file, or the key `suite:` of a study, says.

    `like` (a preset's name or a suite file) gives every key that is not said here; lists and
    mappings of it are left out by `null`, and so is one key of `by_category` or `fields`.

    `harness` are tasks of lm-evaluation-harness, which need none of the keys for tables, prompts
    and scorers.

    `data` is a table (JSONL, CSV, TSV, Parquet, XLSX) or a `DataSource`; `join` adds columns from a
    second one; `only` keeps the rows with these values. `splits` are named ones of such rows, and
    `split` is the one to take (once read, it stands in `only`), or that of a dataset of the hub
    whose `data:` names no file. `id`, `input`, `reference` and `category`
    name its columns; `turns.0` is the first of a list. Without `id` the column "id", "task_id" or
    "question_id" is taken where there is one, else the row's number; without `category` all tasks
    are of one; `reference: null` means that there are none, and only tasks of the categories
    `reference_for` have one where that is said. `fields` are further columns, by the names that
    templates use; `turns` the columns of later user turns and `turn_references` of their right
    answers; `choices` the columns of the answers to choose from, or one with a list of them, and
    `choice_index` says that `reference` is the place of the right one, from 0. `delimiter` stands
    between a prompt and a choice or reference whose likelihood is asked for.

    `prompt` is a jinja template that may use input, id, category and the fields. `chat`: None means
    through the tokenizer's chat template if it has one; `chat_template` is one to use in its place:
    the name of one that ships, or its text. `by_category` changes the settings of generation,
    `router` prompt, system message and settings task by task.
    `scorer` is the name of one, or a mapping of several to their weights: each is then scaled to
    [0, 1] by its range, and the grade is their weighted mean. `rubric` is what a judge is
    told (without one, what jsonl-judge tells it). `gates` are the highest grades that answers may
    have which a gate closes for (`evaluate.gates`), in the grade's own range. Repetitions of
    greedy answers are sampled with `selection_temperature`.
    """

    scorer: Annotated[
        Annotated[str, Tag(_TEXT)]
        | Annotated[Mapping[str, Annotated[float, Field(gt=0)]], Tag(_MAPPING)],
        Discriminator(_form),
    ] = "exact"
    rubric: RubricConfig | None = None
    data: (
        Annotated[
            Annotated[str, Field(min_length=1), Tag(_TEXT)] | Annotated[DataSource, Tag(_MAPPING)],
            Discriminator(_form),
        ]
        | None
    ) = None
    harness: HarnessConfig | None = None
    join: JoinConfig | None = None
    only: Mapping[str, Any] = {}
    id: str | None = None
    input: str = "input"
    reference: str | None = "output"
    reference_for: Names | None = None
    category: str | None = None
    fields: Mapping[str, str] = {}
    turns: Names = ()
    turn_references: Names = ()
    choices: Names = ()
    choice_index: bool = False
    delimiter: str = ""
    gates: Mapping[Gate, float] = {}
    prompt: str = "{{ input }}"
    system: str | None = None
    chat: bool | None = None
    chat_template: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    stop: Names = ()
    by_category: Mapping[str, GenerationConfig] = {}
    router: Annotated[RouterConfig, BeforeValidator(as_table)] | None = None
    selection_temperature: float = Field(default=0.7, gt=0.0)

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @model_validator(mode="wrap")
    @classmethod
    def _takes_over(
        cls, content: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if not isinstance(content, Mapping):
            return handler(content)
        folder = (info.context or {}).get("folder", Path())
        try:
            whole, files = put_together(content, folder)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        config = handler(whole)
        config._origin = _Origin(files)
        return config

    @field_validator("scorer")
    @classmethod
    def _names_known_scorers(
        cls, scorer: str | Mapping[str, float], info: ValidationInfo
    ) -> str | Mapping[str, float]:
        names = [scorer] if isinstance(scorer, str) else list(scorer)
        if not names:
            raise ValueError("a mapping of scorers needs at least one: {exact: 1.0}")
        known = [*SCORERS, *LIKELIHOOD_SCORERS, JUDGE, *entry_point_names()]
        for name in names:
            if is_code(name) and not (info.context or {}).get("trust_code"):
                raise ValueError(
                    f"scorer {name!r} runs code, which needs --trust-code on the command line"
                )
            if name not in known and not is_code(name):
                raise ValueError(f"no scorer {name!r}{nearest(name, known)}")
        return scorer

    @field_validator("prompt")
    @classmethod
    def _asks_each_task(cls, prompt: str) -> str:
        if "{{" not in prompt and "{%" not in prompt:
            raise ValueError("it says the same to every task; write {{ input }} where that belongs")
        return prompt

    @field_validator("only")
    @classmethod
    def _are_values(cls, only: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {key: tuple(one) if isinstance(one, list) else one for key, one in only.items()}
        for column, some in found.items():
            for value in some if isinstance(some, tuple) and some else (some,):
                if not isinstance(value, str | int | float):
                    raise ValueError(
                        f"{column}: should be a text, a number, true or false, or a list of such "
                        f"(given: {shown(only[column])})"
                    )
        return found

    @field_validator("fields")
    @classmethod
    def _leaves_the_names_of_others(cls, fields: Mapping[str, str]) -> Mapping[str, str]:
        taken = ("id", "input", "reference", "category", "answer", "turns")
        wrong = [name for name in fields if name in taken or not name.isidentifier()]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} cannot name a field: right is a word of letters, digits and _ "
                f"that is none of {', '.join(taken)}"
            )
        return fields

    @field_validator("chat_template")
    @classmethod
    def _by_name_or_text(cls, template: str | None) -> str | None:
        if template is None or "{{" in template or "{%" in template:
            return template
        return _shipped_template(template)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.chat is False and self.chat_template is not None:
            raise ValueError("chat: false leaves no use for chat_template; leave one of them out")
        if self.turns and (some := [name for name in self.weights if name in LIKELIHOOD_SCORERS]):
            raise ValueError(f"scorer {some[0]} grades the first turn alone; leave out turns")
        if self.harness is not None and self.data is not None:
            raise ValueError("harness brings its own tasks; leave out data")
        if len(self.turn_references) not in (0, len(self.turns)):
            raise ValueError(
                f"turn_references: {len(self.turn_references)} columns for {len(self.turns)} "
                "further turns; right is one each"
            )
        return self

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each scorer, by its name: one alone has the weight 1."""
        if self.harness is not None:
            return {HARNESS: 1.0}
        return {self.scorer: 1.0} if isinstance(self.scorer, str) else self.scorer

    @property
    def files(self) -> tuple[NamedFile, ...]:
        """The files that the suite and those that it is like name, as far as they count.

        A second table's (`JOINED`) are as they are written: it lies beside the first one.
        """
        return self._origin.files

    @property
    def has_typed_table(self) -> bool:
        """Whether its table is one that the user named, and no file (`with_data`)."""
        return isinstance(self.data, str) and all(one.key != "data" for one in self.files)

    def with_data(self, table: Path) -> SuiteConfig:
        """The same suite with a table of the user's own, which no file names."""
        changed = self.model_copy(update={"data": str(table.absolute())})
        changed._origin = _Origin(tuple(one for one in self.files if one.key != "data"))
        return changed


def read_suite_config(
    path: Path, *, split: str | None = None, trust_code: bool = False
) -> SuiteConfig:
    """The configuration in the YAML file `path`; ConfigError names every wrong key at once.

    `split` is taken in place of the file's. `trust_code` allows scorers that are code of somebody's
    own.
    """
    content = suite_content(path)
    if split is not None:
        content["split"] = split
    return suite_from_mapping(content, path.parent, str(path), trust_code=trust_code)


def suite_from_mapping(
    content: Mapping[str, Any], folder: Path, where: str, *, trust_code: bool = False
) -> SuiteConfig:
    """The configuration in plain values, whose files are beside `folder`; see `read_suite_config`.

    Messages begin with `where`.
    """
    try:
        return SuiteConfig.model_validate(
            content, context={"folder": folder, "trust_code": trust_code}
        )
    except ValidationError as error:
        lines = suite_complaints(error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def chat_template_names() -> list[str]:
    """The names of the chat templates that ship."""
    return sorted(path.stem for path in _templates().glob("*.jinja"))


def _templates() -> Path:
    return data_root() / "evaluators" / "chat_templates"


def _shipped_template(name: str) -> str:
    names = chat_template_names()
    if name not in names:
        raise ValueError(
            f"{name!r} is neither a Jinja text nor the name of a template{nearest(name, names)}"
        )
    # An editor's line break at the end of the file is none of the template's.
    return read_text(_templates() / f"{name}.jinja").removesuffix("\n")


def suite_complaints(mistakes: Sequence[ErrorDetails]) -> list[str]:
    """What pydantic found wrong with a suite's mapping, in the words of the file, a line each."""
    placed: list[ErrorDetails] = [
        {**one, "loc": tuple(part for part in one["loc"] if part not in _FORMS)} for one in mistakes
    ]
    return [_complaint(one) for one in placed if not only_follows(one, placed)]


# What keys should be whose values have several forms, or a form that is easily missed.
_RIGHT = {
    "data": "should be a table's file, or {hub: owner/name, file: NAME}",
    "scorer": "should be a scorer's name, or several with their weights: {judge: 0.9, chrf: 0.1}",
    "router": "should be a table's file, or a mapping: {table: FILE, threshold: 0.2}",
    "join": "should be a mapping: {file: FILE, key: COLUMN}",
    "only": "should be a mapping of columns to values: {level: [3, 4]}",
    "gates": "should be a mapping of gates to highest grades: {language: 2}",
    "fields": "should be a mapping of names to columns: {eval_aspect: aspect}",
    "by_category": "should be a mapping of categories to settings: {math: {temperature: 0.1}}",
}


def _complaint(mistake: ErrorDetails) -> str:
    key = str(mistake["loc"][0]) if len(mistake["loc"]) == 1 else ""
    if key in _RIGHT and mistake["type"] in ("string_type", "dict_type", "model_type"):
        return f"{key}: {_RIGHT[key]} (given: {shown(mistake['input'])})"
    return complaint(mistake, _keys_at)


def _keys_at(location: Location) -> Sequence[str]:
    """The keys that may stand below `location`, such as ("by_category", "math")."""
    models: Mapping[str, type[BaseModel]] = {
        "data": DataSource,
        "join": JoinConfig,
        "rubric": RubricConfig,
        "harness": HarnessTask if "tasks" in location else HarnessConfig,
        "by_category": GenerationConfig,
        "router": RouterConfig,
    }
    outer = str(location[0]) if location else ""
    if outer == "gates":
        return GATES
    return list(models[outer].model_fields) if outer in models else _keys()


def _keys() -> list[str]:
    return ["like", "splits", "split", *SuiteConfig.model_fields]
