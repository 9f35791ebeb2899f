"""lm-evaluation-harness tasks on a live engine, through the harness's own model interface."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evomerge.engine.base import Engine, GenerationSettings
from evomerge.errors import CandidateError, ConfigError
from evomerge.evaluate.suite_config import HarnessConfig, HarnessTask
from evomerge.evaluate.task import ScorerGrade, Task, TaskResult

NAME = "lm-eval"
_FEW_SHOT_SEED = 1234  # the harness's own
_ANSWER_TOKENS = 256  # where a task says nothing: the harness's own, too
_NAMED_AT_MOST = 5

TokenRequest = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True, eq=False)
class HarnessTasks:
    """The documents of the harness's tasks that an objective names, loaded.

    `documents` maps the id of each of our tasks (`name/place`) to the harness's task and the place
    of the document in it; `objectives` maps the harness's tasks to what is wanted of them.
    """

    config: HarnessConfig
    loaded: Mapping[str, Any]
    objectives: Mapping[str, HarnessTask]
    documents: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """What a document's value is multiplied with, so that all values' mean is the objective.

        That is Σ weight · metric / Σ weight over the objectives, however many documents each has.
        """
        wanted = self.objectives[name]
        weights = math.fsum(one.weight for one in self.config.tasks)
        number = sum(self.objectives[task] == wanted for task, _ in self.documents.values())
        return wanted.weight / weights * len(self.documents) / number

    def places(self, task_ids: Sequence[str]) -> dict[str, list[int]]:
        """harness task -> sorted places of its documents among these tasks of ours."""
        found: dict[str, list[int]] = {}
        for task_id in task_ids:
            name, place = self.documents[task_id]
            found.setdefault(name, []).append(place)
        return {name: sorted(places) for name, places in found.items()}

    def requests(
        self, engine: Engine, system: str | None, task_ids: Sequence[str]
    ) -> dict[str, list[Instance]]:
        """Our task ids -> what the harness asks of the model about that document."""
        lm = EngineLM(engine)
        places = self.places(task_ids)
        found: dict[str, list[Instance]] = {}
        with _quiet():
            for name, some in places.items():
                task = self.loaded[name]
                _expect(task, some)
                task.build_all_requests(samples=some, **self._asking(lm, system))
                for instance in task.instances:
                    number = instance.doc_id
                    found.setdefault(f"{name}/{some[number]}", []).append(instance)
        return found

    def first_prompt(self, engine: Engine, system: str | None) -> str:
        """The prompt of the first document as the model reads it."""
        (asked,) = self.requests(engine, system, list(self.documents)[:1]).values()
        return str(asked[0].args[0])

    def check_lengths(
        self, engine: Engine, system: str | None, task_ids: Sequence[str], where: str
    ) -> None:
        """Raises ConfigError that names documents which do not fit the engine's context."""
        asked = self.requests(engine, system, task_ids)
        lm = EngineLM(engine)
        allowed = engine.max_model_len
        too_long = {
            task_id: most - allowed
            for task_id, instances in asked.items()
            if (most := max(map(lm.tokens_of, instances))) > allowed
        }
        if too_long:
            named = ", ".join(
                f"{task_id} ({excess} too many)"
                for task_id, excess in list(too_long.items())[:_NAMED_AT_MOST]
            )
            more = f" and {len(too_long) - _NAMED_AT_MOST} more"
            raise ConfigError(
                f"{where}: {len(too_long)} of {len(asked)} documents do not fit the context of "
                f"{allowed} tokens: {named}{more * (len(too_long) > _NAMED_AT_MOST)}; lower "
                "num_fewshot or, if the model takes more, raise engine.max_model_len "
                "(--max-model-len)"
            )

    def answered(
        self, engine: Engine, task_ids: Sequence[str], system: str | None, sampling: Sampling
    ) -> dict[str, Mapping[str, Any]]:
        """Our task ids -> the harness's own record of that document, in the wanted filter.

        With `finish_reason` of what was written, or "none".
        """
        places = self.places(task_ids)
        lm = EngineLM(engine, sampling, needs_greedy=self._needs_greedy(places))
        for name, some in places.items():
            _expect(self.loaded[name], some)
        with _quiet():
            results = evaluate(
                lm=lm,
                task_dict={
                    "tasks": {name: self.loaded[name] for name in places},
                    "groups": {},
                    "group_map": {},
                },
                samples=places,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=system,
                apply_chat_template=self.config.apply_chat_template,
                fewshot_as_multiturn=self.config.fewshot_as_multiturn,
            )
        assert results is not None
        return {
            f"{name}/{sample['doc_id']}": {
                **sample,
                "finish_reason": lm.finish_reasons.get(sample["arguments"][0][0], "none"),
            }
            for name, samples in results["samples"].items()
            for sample in samples
            if sample["filter"] == self.objectives[name].filter
        }

    def value(self, name: str, sample: Mapping[str, Any]) -> float:
        """What the wanted metric says of one document; higher is better.

        Raises CandidateError where that is no number.
        """
        metric = self.objectives[name].metric_name
        value = float(sample[metric])
        if math.isnan(value):
            raise CandidateError(f"{name}: {metric} of document {sample['doc_id']} is NaN")
        return value if self.loaded[name].higher_is_better().get(metric, True) else -value

    def _needs_greedy(self, names: Mapping[str, object]) -> bool:
        """Whether any metric asks if a text is what would be written (another call of vLLM)."""
        return any(
            self.loaded[name].OUTPUT_TYPE == "loglikelihood"
            or self.objectives[name].metric_name == "exact_match"
            for name in names
        )

    def _asking(self, lm: EngineLM, system: str | None) -> dict[str, Any]:
        with_chat = self.config.apply_chat_template
        return {
            "system_instruction": system,
            "apply_chat_template": with_chat,
            "fewshot_as_multiturn": self.config.fewshot_as_multiturn,
            "chat_template": lm.apply_chat_template if with_chat else None,
            "tokenizer_name": lm.tokenizer_name if with_chat else "",
        }


class KnownExamples:
    """The examples that go before each document, drawn once, as the harness draws them.

    It draws anew whenever it builds a prompt, so that candidates would be asked different prompts.
    Here the first build, of all documents in their order, draws; later ones, of the documents in
    the places that `expect` says, get what was drawn for those.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._drawn: list[Any] = []
        self._places: Iterator[int] | None = None

    def expect(self, places: Sequence[int]) -> None:
        """The next build is of the documents in these places."""
        self._places = iter(places)

    def sample(self, *given: Any, **named: Any) -> Any:
        """The examples for the next document."""
        if self._places is not None:
            return self._drawn[next(self._places)]
        self._drawn.append(self._sampler.sample(*given, **named))
        return self._drawn[-1]

    def set_rnd(self, seed: int | None) -> None:
        """Sets the seed of what is still to be drawn."""
        self._sampler.set_rnd(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled where a task's own settings are greedy."""

    temperature: float = 0.0
    seed: int | None = None


class EngineLM(TemplateLM):
    """One of the harness's language models that is whatever an engine now is.

    `finish_reasons` are those of the texts that were written, by prompt.
    """

    def __init__(
        self, engine: Engine, sampling: Sampling | None = None, *, needs_greedy: bool = True
    ) -> None:
        super().__init__()
        self._engine = engine
        self._sampling = sampling or Sampling()
        self._needs_greedy = needs_greedy
        self.finish_reasons: dict[str, str] = {}

    @property
    def eot_token_id(self) -> int:
        token = self._engine.bos_token_id
        token = self._engine.eos_token_id if token is None else token
        if token is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS to begin a text with")
        return token

    @property
    def tokenizer_name(self) -> str:
        return self._engine.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._engine.render(chat_history, cue=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        with_special = add_special_tokens is not False
        (ids,) = self._engine.encode([string], add_special_tokens=with_special)
        bos = self._engine.bos_token_id
        # A chat template's text begins with it already.
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def tokens_of(self, request: Instance) -> int:
        """The most tokens that the engine needs room for."""
        if request.request_type == "generate_until":
            context, settings = request.args
            return len(self.tok_encode(context)) + _answer_tokens(settings)
        if request.request_type == "loglikelihood_rolling":
            return 0  # it is cut into windows
        context, continuation = request.args
        return len(self.tok_encode(context + continuation)) + 1

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The sum of log-probabilities (nats), and whether greedy decoding writes just that."""
        if not requests:
            return []
        whole = [context + continuation for _, context, continuation in requests]
        logs = self._engine.log_probabilities(whole, add_special_tokens=False)
        totals = [
            math.fsum(some[len(some) - len(continuation) :])
            for some, (_, _, continuation) in zip(logs, requests, strict=True)
        ]
        if any(map(math.isnan, totals)):
            raise CandidateError("the model's probabilities are not numbers (NaN)")
        greedy = self._are_greedy(requests) if self._needs_greedy else [False] * len(requests)
        return list(zip(totals, greedy, strict=True))

    def _are_greedy(self, requests: Sequence[TokenRequest]) -> list[bool]:
        written = self._engine.generate(
            [context for _, context, _ in requests],
            [GenerationSettings(max_tokens=max(1, len(text))) for _, _, text in requests],
            add_special_tokens=False,
        )
        return [
            list(one.token_ids)[: len(text)] == text
            for one, (_, _, text) in zip(written, requests, strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.eot_token_id,
                    max_seq_len=self._engine.max_model_len - 1,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        asked = [(("", ""), list(a), list(b)) for some in windows for a, b in some]
        greedy, self._needs_greedy = self._needs_greedy, False
        found = iter(self._loglikelihood_tokens(asked))
        self._needs_greedy = greedy
        return [math.fsum(next(found)[0] for _ in some) for some in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        if not requests:
            return []
        written = self._engine.generate(
            [self.tok_encode(request.args[0]) for request in requests],
            [self._settings(request.args[1]) for request in requests],
            add_special_tokens=False,
        )
        for request, one in zip(requests, written, strict=True):
            self.finish_reasons[request.args[0]] = one.finish_reason
        return [one.text for one in written]

    def _settings(self, wanted: Mapping[str, Any]) -> GenerationSettings:
        until = wanted.get("until") or ()
        own = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
        temperature = own or self._sampling.temperature
        return GenerationSettings(
            max_tokens=_answer_tokens(wanted),
            temperature=temperature,
            top_p=float(wanted.get("top_p") or 1.0) if own else 1.0,
            stop=(until,) if isinstance(until, str) else tuple(until),
            seed=self._sampling.seed if temperature else None,
        )


def load_harness(
    config: HarnessConfig, folder: Path, where: str
) -> tuple[HarnessTasks, list[Task]]:
    """The harness's tasks that `config` names, and ours: one for each document, in their order.

    Raises ConfigError where there is no such task, its documents cannot be had, or a metric is not
    a mean over documents.
    """
    extra = None if config.include_path is None else _own_tasks(config.include_path, folder, where)
    loaded: dict[str, Any] = {}
    objectives: dict[str, HarnessTask] = {}
    ours: list[Task] = []
    documents: dict[str, tuple[str, int]] = {}
    with _quiet():
        manager = _manager(extra, [one.name for one in config.tasks])
        for wanted in config.tasks:
            for name, task in _load(manager, wanted, where).items():
                if name in loaded:
                    raise ConfigError(f"{where}: harness.tasks: {name} is named twice")
                _set_up(task, wanted, config)
                _check_metric(task, wanted, f"{where}: {name}")
                _draw_examples(task, wanted.limit or config.limit)
                loaded[name], objectives[name] = task, wanted
                for place, document in _documents(task, wanted.limit or config.limit):
                    one = _task(task, wanted.name, f"{name}/{place}", document)
                    documents[one.id] = (name, place)
                    ours.append(one)
    return HarnessTasks(config, loaded, objectives, documents), ours


class HarnessEvaluation:
    """Documents of the harness's tasks, asked in `engine`; as `Evaluation` for other suites.

    The grade of a document is its metric's value times its objective's share, so that the mean is
    the weighted mean of the metrics.
    """

    def __init__(
        self,
        engine: Engine,
        harness: HarnessTasks,
        system: str | None,
        sampling: Callable[[int], Sampling],
    ) -> None:
        self._engine = engine
        self._harness = harness
        self._system = system
        self._sampling = sampling
        self.generation_seconds = 0.0

    def begin(self, task_ids: Sequence[str], attempt: int = 0) -> Future[list[TaskResult]]:
        """The results of these tasks, in their order; see `Evaluation.begin`."""
        harness, sampling = self._harness, self._sampling(attempt)
        started = time.perf_counter()
        samples = harness.answered(self._engine, task_ids, self._system, sampling)
        taken = time.perf_counter() - started
        self.generation_seconds += taken
        done: Future[list[TaskResult]] = Future()
        done.set_result(
            [
                self._result(task_id, samples[task_id], taken / len(task_ids), attempt)
                for task_id in task_ids
            ]
        )
        return done

    def _result(
        self, task_id: str, sample: Mapping[str, Any], seconds: float, attempt: int
    ) -> TaskResult:
        name, _ = self._harness.documents[task_id]
        value = self._harness.value(name, sample)
        metric = self._harness.objectives[name].metric
        return TaskResult(
            task_id=task_id,
            prompt=str(sample["arguments"][0][0]),
            answer=_answer(sample),
            finish_reason=sample["finish_reason"],
            grade=value * self._harness.share(name),
            seconds=seconds,
            version=self._engine.version,
            attempt=attempt,
            details=(ScorerGrade(metric, value),),
        )


def _own_tasks(path: str, folder: Path, where: str) -> str:
    """The folder `harness.include_path`. ConfigError where there is none: nobody else looks."""
    found = folder / Path(path).expanduser()
    if not found.is_dir():
        raise ConfigError(f"{where}: harness.include_path: there is no folder {found}")
    return str(found)


def _manager(folder: str | None, names: Sequence[str]) -> TaskManager:
    """What knows the tasks of these names: where the user's own folder has all, without the rest.

    The harness reads thousands of files to find its own.
    """
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)


def _load(manager: TaskManager, wanted: HarnessTask, where: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load([wanted.name])["tasks"]
    # Whatever a task's own file or the hub brings.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{where}: lm-evaluation-harness cannot load the task {wanted.name}: {reason} (its "
            "documents come from the Hugging Face hub, unless the task's file says otherwise)"
        ) from error
    return tasks


def _set_up(task: Any, wanted: HarnessTask, config: HarnessConfig) -> None:
    """The number of examples, as the harness's command sets it: a task's own 0 stays."""
    number = config.num_fewshot if wanted.num_fewshot is None else wanted.num_fewshot
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config(key="num_fewshot", value=number)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEW_SHOT_SEED)


def _draw_examples(task: Any, limit: int | None) -> None:
    """Draws the examples for each document, once and for all."""
    if task.get_config("num_fewshot") and hasattr(task, "sampler"):
        task.sampler = KnownExamples(task.sampler)
        task.build_all_requests(limit=limit)


def _expect(task: Any, places: Sequence[int]) -> None:
    if isinstance(sampler := getattr(task, "sampler", None), KnownExamples):
        sampler.expect(places)


def _check_metric(task: Any, wanted: HarnessTask, where: str) -> None:
    aggregations = task.aggregation()
    means = [name for name, function in aggregations.items() if function is mean]
    metric = wanted.metric_name
    if metric not in aggregations:
        raise ConfigError(
            f"{where}: metric {metric!r} is none of the task's: {', '.join(aggregations)}"
        )
    if metric not in means:
        raise ConfigError(
            f"{where}: metric {metric} is not a mean over documents, as an objective has to be; "
            f"such are {', '.join(means) or 'none of this task'}"
        )


def _documents(task: Any, limit: int | None) -> Iterator[tuple[int, Any]]:
    for place, document in enumerate(task.eval_docs):
        if limit is not None and place >= limit:
            return
        yield place, document


def _task(task: Any, category: str, name: str, document: Any) -> Task:
    text = str(task.doc_to_text(document))
    return Task(
        id=name,
        input=json.dumps(document, ensure_ascii=False, sort_keys=True, default=str),
        reference=str(task.doc_to_target(document)),
        category=category,
        user=text,
    )


def _answer(sample: Mapping[str, Any]) -> str:
    """What was written, or the likeliest of several texts."""
    asked, found = sample["arguments"], [some[0] for some in sample["resps"]]
    if isinstance(found[0], str):
        return str(found[0])
    if len(asked) < 2 or not isinstance(found[0], tuple):
        return ""
    likeliest = max(range(len(found)), key=lambda place: found[place][0])
    return str(asked[likeliest][1])


def _answer_tokens(wanted: Mapping[str, Any]) -> int:
    return int(wanted.get("max_gen_toks") or _ANSWER_TOKENS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own progress bars and information."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
