"""A suite: named tasks, a prompt template, generation settings and a scorer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.engine.base import Engine, GenerationSettings
from evomerge.errors import ConfigError
from evomerge.evaluate.hub import name_in_dataset
from evomerge.evaluate.likelihood import LIKELIHOOD_SCORERS, LikelihoodScorer
from evomerge.evaluate.named_files import NamedFile
from evomerge.evaluate.own_scorers import code_digest, find_scorer
from evomerge.evaluate.prompts import Chat, ask, uses_chat
from evomerge.evaluate.routing import FindModel, routed_tasks
from evomerge.evaluate.rubric import Rubric
from evomerge.evaluate.scorers import SCORERS, Scorer
from evomerge.evaluate.suite_config import (
    HARNESS,
    DataSource,
    GenerationConfig,
    HarnessConfig,
    SuiteConfig,
    read_suite_config,
)
from evomerge.evaluate.suite_layers import JOINED, JUDGE
from evomerge.evaluate.task import GradeRequest, ScorerGrade, Task, TaskResult
from evomerge.evaluate.task_reading import find_tables, read_tasks
from evomerge.resources import is_bare_name, locate

if TYPE_CHECKING:
    from evomerge.evaluate.harness import HarnessTasks

__all__ = ["JUDGE", "ScorerGrade", "Suite", "SuiteConfig", "Task", "TaskResult"]

_NAMED_AT_MOST = 5
# A text that no task and no template holds.
_ANY_ANSWER = "Evomerge answers this."
_NOTHING_OF_ITS_OWN = GenerationConfig()


@dataclass(frozen=True)
class Suite:
    """Tasks with everything that decides their grades; ids are unique, the order is the file's.

    `where` names the suite in messages: a preset's name, a file, or "suite". `files` are those that
    it is made of and that a file names.
    """

    config: SuiteConfig
    tasks: tuple[Task, ...]
    where: str = "suite"
    harness: HarnessTasks | None = field(default=None, hash=False, compare=False)
    own_scorers: Mapping[str, Scorer] = field(default_factory=dict, hash=False, compare=False)
    files: tuple[NamedFile, ...] = field(default=(), hash=False, compare=False)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each scorer, by its name: one alone has the weight 1."""
        return self.config.weights

    @property
    def rubric(self) -> Rubric | None:
        """What the suite's judge is told; None where it needs none."""
        config = self.config.rubric
        if config is None or JUDGE not in self.weights:
            return None
        return Rubric(config.prompt, config.low, config.high, config.empty, self.where)

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The scorers that need nothing but the answer, by name.

        Others ask for likelihoods, or are graders (a judge).
        """
        known = {**SCORERS, **self.own_scorers}
        return {name: known[name] for name in self.weights if name in known}

    @property
    def likelihood_scorers(self) -> Mapping[str, LikelihoodScorer]:
        """The scorers that need no answer, by name."""
        return {name: LIKELIHOOD_SCORERS[name] for name in self.weights if _needs_no_answer(name)}

    @property
    def generates(self) -> bool:
        """Whether any scorer needs an answer to be written."""
        return self.harness is None and not all(map(_needs_no_answer, self.weights))

    @property
    def scorer_name(self) -> str:
        """What grades are called that come from this suite: `exact`, `0.9 judge + 0.1 chrf`."""
        scorer = self.config.scorer
        if self.config.harness is not None:
            return HARNESS
        if isinstance(scorer, str):
            return scorer
        return " + ".join(f"{weight:g} {name}" for name, weight in scorer.items())

    @property
    def grade_range(self) -> tuple[float, float]:
        """The lowest and the highest grade: one scorer's own, of several [0, 1].

        Infinite for lm-evaluation-harness, whose metrics do not say.
        """
        if self.harness is not None:
            return -math.inf, math.inf
        if len(self.weights) > 1:
            return 0.0, 1.0
        if self.rubric is not None:
            return float(self.rubric.low), float(self.rubric.high)
        scorers: list[Scorer | LikelihoodScorer] = [*self.scorers.values()]
        scorers += self.likelihood_scorers.values()
        return float(scorers[0].low), float(scorers[0].high)

    @property
    def chat(self) -> Chat:
        """How prompts become chats."""
        return Chat(self.config.chat, self.config.system, self.config.chat_template)

    def generation(self, task: Task, attempt: int = 0) -> GenerationSettings:
        """How the answer to `task` is generated.

        Sampled ones with a seed that is a function of `digest` and `attempt` alone: so a resumed
        search draws what an unbroken one does, and candidates are compared with the same random
        numbers. Where answers are greedy, attempts above 0 (wanted repetitions) are sampled with
        `selection_temperature`.
        """
        config = self.config
        of_category = config.by_category.get(task.category, _NOTHING_OF_ITS_OWN)
        own = of_category.model_copy(update=dict(task.settings))
        temperature = config.temperature if own.temperature is None else own.temperature
        if attempt and not temperature:
            temperature = config.selection_temperature
        return GenerationSettings(
            max_tokens=own.max_tokens or config.max_tokens,
            temperature=temperature,
            top_p=own.top_p or config.top_p,
            repetition_penalty=own.repetition_penalty or config.repetition_penalty,
            stop=config.stop if own.stop is None else own.stop,
            seed=_seed(self.digest, attempt) if temperature else None,
        )

    def answer_limits(self, task_ids: Sequence[str]) -> tuple[int, ...]:
        """The most tokens that answers to these tasks may have, each number once, rising.

        Empty where nothing is written, or lm-evaluation-harness says how much.
        """
        if not self.generates:
            return ()
        return tuple(sorted({self.generation(one).max_tokens for one in self.select(task_ids)}))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that can change a grade; the place of the file is not."""
        # What a router's table says is in the tasks.
        settings = self.config.model_dump(mode="json", exclude={"data", "join", "router"})
        content: list[object] = [settings, [_content(task) for task in self.tasks]]
        content += map(code_digest, self.own_scorers.values())
        text = json.dumps(content, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def select(self, task_ids: Sequence[str]) -> list[Task]:
        """The tasks of these ids, in the order of `task_ids`; KeyError for an unknown one."""
        by_id = {task.id: task for task in self.tasks}
        return [by_id[task_id] for task_id in task_ids]


def load_suite(
    suite: SuiteConfig | str,
    folder: Path,
    data: Path | None = None,
    *,
    trust_code: bool = False,
    typed: bool = False,
    key: str = "suite",
    split: str | None = None,
    find_model: FindModel | None = None,
) -> Suite:
    """The suite of a configuration, a preset's bare name or a suite file, with its tasks read.

    Paths are relative to `folder`, that of the study; `data` in a suite file to that file. The
    table `data` takes the place of the suite's own. `trust_code` allows a suite file scorers that
    are code of somebody's own (of a configuration that was asked when it was read). `typed`: the
    user named the suite file, no other file did; `key` is what a study names it by. `split` is
    taken of a suite file in place of its own. `find_model` gives the folder of a router's embedding
    that is none in `folder` (one of the hub).
    Raises ConfigError naming file and line on whatever is wrong.
    """
    where = "suite"
    by_name: tuple[NamedFile, ...] = ()
    if not isinstance(suite, SuiteConfig):
        path = locate(suite, "evaluators", folder=folder)
        where = suite if is_bare_name(suite) else str(path)
        by_name = () if typed else (NamedFile("suite", path, folder),)
        suite, folder = read_suite_config(path, split=split, trust_code=trust_code), path.parent
    if suite.harness is not None:
        return _with_harness(suite, suite.harness, folder, where)
    own = {
        name: find_scorer(name, folder)
        for name in suite.weights
        if name not in (*SCORERS, *LIKELIHOOD_SCORERS, JUDGE)
    }
    empty = Suite(suite, (), where, own_scorers=own)
    tables = find_tables(suite, folder, data, where, key)
    scorers: dict[str, Scorer | LikelihoodScorer] = {**empty.scorers, **empty.likelihood_scorers}
    tasks = read_tasks(suite, tables, scorers)
    if suite.router is not None:
        tasks = routed_tasks(suite.router, tasks, folder, where, find_model)
    found = replace(empty, tasks=tasks, files=(*by_name, *_files(suite, tables[0], data)))
    _check_rubric(found)
    _check_gates(found)
    return found


def _files(suite: SuiteConfig, table: Path, data: Path | None) -> Iterator[NamedFile]:
    """The files that the suite names; `data` in place of its own table is the user's word.

    What a dataset of the hub has is none of them.
    """
    joined = [
        replace(one, path=table.parent / one.path) for one in suite.files if one.key == JOINED
    ]
    of_hub = data is None and isinstance(suite.data, DataSource)
    for one in [one for one in joined if one.path.is_file()][:1]:
        if not of_hub or name_in_dataset(table, one.path) is None:
            yield one
    for one in suite.files:
        if one.key != JOINED and (one.key != "data" or data is None):
            yield one


def _content(task: Task) -> dict[str, object]:
    """All of a task, for a digest: without what a router would say, where it says nothing."""
    content = asdict(task)
    for key in ("system", "settings"):
        if not content[key] and content[key] != "":
            del content[key]
    return content


def _with_harness(suite: SuiteConfig, wanted: HarnessConfig, folder: Path, where: str) -> Suite:
    """The suite of tasks of lm-evaluation-harness; ConfigError where it is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"{where}: harness needs one more package: pip install 'evomerge[lm-eval]'"
        )
    from evomerge.evaluate.harness import load_harness

    harness, tasks = load_harness(wanted, folder, where)
    return Suite(suite, tuple(tasks), where, harness)


def split_holdout(tasks: Sequence[Task], share: float) -> tuple[list[Task], list[Task]]:
    """(search tasks, held-out tasks), `share` of each category held out, both in the given order.

    Depends on ids and categories alone, not on a seed or the order of the file. Each category's
    number is rounded so that the whole is round(share · tasks), at least one task on each side.
    Raises ConfigError where that is not possible.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"holdout: {share} is not a share between 0 and 1")
    if len(tasks) < 2:
        raise ConfigError("holdout: one task cannot be split; at least 2 are needed")
    categories: dict[str, list[str]] = {}
    for task in tasks:
        categories.setdefault(task.category, []).append(task.id)
    numbers = _held_out_numbers({name: len(ids) for name, ids in categories.items()}, share)
    held_out: set[str] = set()
    for name, ids in categories.items():
        held_out.update(sorted(ids, key=_shuffle_key)[: numbers[name]])
    search = [task for task in tasks if task.id not in held_out]
    return search, [task for task in tasks if task.id in held_out]


def check_prompt_lengths(engine: Engine, suite: Suite, tasks: Sequence[Task]) -> None:
    """Raises ConfigError naming the tasks whose prompt and answer do not fit the context.

    In a conversation all turns have to fit, with answers of max_tokens each.
    """
    if suite.harness is not None:
        ids = [task.id for task in tasks]
        suite.harness.check_lengths(engine, suite.config.system, ids, suite.where)
        return
    allowed = engine.max_model_len
    needed = {task.id: _tokens_at_most(engine, suite, task) for task in tasks}
    too_long = {task_id: count for task_id, count in needed.items() if count > allowed}
    if too_long:
        named = ", ".join(
            f"{task_id} ({count - allowed} too many)"
            for task_id, count in list(too_long.items())[:_NAMED_AT_MOST]
        )
        more = f" and {len(too_long) - _NAMED_AT_MOST} more" * (len(too_long) > _NAMED_AT_MOST)
        limits = suite.answer_limits(list(too_long))
        answers = f", with answers of max_tokens {' or '.join(map(str, limits))}" * bool(limits)
        raise ConfigError(
            f"{suite.where}: {len(too_long)} of {len(tasks)} tasks do not fit the context of "
            f"{allowed} tokens{answers}: {named}{more}; shorten them, lower max_tokens or, if the "
            "model takes more, raise engine.max_model_len (--max-model-len)"
        )


def _check_rubric(suite: Suite) -> None:
    """Raises ConfigError where the judge's prompt cannot be made of one of the tasks.

    Or where it does not show the answer.
    """
    if suite.rubric is not None:
        for task in suite.tasks:
            for turn in range(1 + len(task.turns)):
                earlier = (_ANY_ANSWER,) * turn
                request = GradeRequest(task.at_turn(turn), _ANY_ANSWER, 0, earlier)
                if _ANY_ANSWER not in suite.rubric.question(request):
                    raise ConfigError(
                        f"{suite.where}: rubric.prompt: it does not show the judge the answer; "
                        "write {{ answer }} where it belongs"
                    )


def _check_gates(suite: Suite) -> None:
    """Raises ConfigError where a gate leaves a grade that the suite does not have."""
    low, high = suite.grade_range
    for gate, highest in suite.config.gates.items():
        if not low <= highest <= high:
            raise ConfigError(
                f"{suite.where}: gates.{gate}: {highest:g} is no grade of this suite; its grades "
                f"are {low:g} to {high:g}"
            )


def _needs_no_answer(scorer: str) -> bool:
    return scorer in LIKELIHOOD_SCORERS


def _tokens_at_most(engine: Engine, suite: Suite, task: Task) -> int:
    """The tokens of all prompts of a task and of answers as long as they may become."""
    prompt = ask(engine, suite.chat, task, [""] * len(task.turns))
    texts = [prompt + suite.config.delimiter + text for text in continuations_of(suite, task)]
    written = suite.generation(task).max_tokens * (1 + len(task.turns)) if suite.generates else 0
    add_special_tokens = not uses_chat(engine, suite.chat)
    encoded = engine.encode([prompt, *texts], add_special_tokens=add_special_tokens)
    # An engine that is asked for likelihoods writes one token.
    return max(len(encoded[0]) + written, *(len(each) + 1 for each in encoded[1:]), 0)


def continuations_of(suite: Suite, task: Task) -> list[str]:
    """The texts whose likelihood the suite's scorers ask for, each once, without the delimiter."""
    asked = [scorer.continuations(task) for scorer in suite.likelihood_scorers.values()]
    return list(dict.fromkeys(text for some in asked for text in some))


def _held_out_numbers(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """How many tasks of each category are held out: largest remainders, ties by name."""
    tasks = sum(sizes.values())
    wanted = min(max(round(share * tasks), 1), tasks - 1)
    numbers = {name: int(share * size) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (numbers[name] - share * sizes[name], name))
    while sum(numbers.values()) < wanted:
        for name in by_remainder[: wanted - sum(numbers.values())]:
            numbers[name] += numbers[name] < sizes[name]
    return numbers


def _seed(digest: str, attempt: int) -> int:
    """32 bits out of a suite's digest and the number of an attempt."""
    text = digest if attempt == 0 else hashlib.sha256(f"{digest} {attempt}".encode()).hexdigest()
    return int(text[:8], 16)


def _shuffle_key(task_id: str) -> str:
    return hashlib.sha256(task_id.encode()).hexdigest()
