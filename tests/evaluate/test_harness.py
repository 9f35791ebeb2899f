"""lm-evaluation-harness tasks of local files, on a live engine and on the harness's own model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.engine import Engine, EngineConfig, open_engine
from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import evaluation_of
from evomerge.evaluate.self_test import self_test
from evomerge.evaluate.suite import Suite, SuiteConfig, check_prompt_lengths, load_suite
from evomerge.evaluate.task import TaskResult
from evomerge.search.study import study_from_mapping
from tests import tiny

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """\
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
doc_to_text: "{{question}}"
doc_to_target: "{{options[0]}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu}
"""
CLOZE = """\
task: tiny_cloze
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{options[0]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
OPTIONS = ["4", "11", "a long text", "?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, their documents, and a model."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"What is {n} plus {n + 1}?", "options": OPTIONS, "label": n % 4}
        for n in range(9)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "choice.jsonl").write_text(lines)
    (folder / "tasks").mkdir()
    absent = CHOICE.replace("choice.jsonl", "absent.jsonl").replace("tiny_choice", "tiny_absent")
    for name, text in {"a": absent, "c": CHOICE, "w": WRITTEN, "l": CLOZE, "r": ROLLING}.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    tiny.llama(folder / "model", layers=2)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    # The harness's own model rounds its log-probabilities to the dtype.
    config = EngineConfig(str(folder / "model"), (), dtype="float32", threads=1)
    with open_engine("transformers", config) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def suite_of(folder: Path, *tasks: dict[str, Any], **settings: Any) -> Suite:
    harness = {"tasks": tasks, "include_path": "tasks", **settings}
    config = SuiteConfig.model_validate({"harness": harness}, context={"trust_code": True})
    return load_suite(config, folder)


def results_of(engine: Engine, suite: Suite) -> list[TaskResult]:
    return evaluation_of(engine, suite).begin([task.id for task in suite.tasks]).result()


def harness_results(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    """What the harness's own model says."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    return dict(found["samples"] | {"results": found["results"][name]})


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("tiny_choice", "acc,none"),
        ("tiny_choice", "acc_norm"),
        ("tiny_written", "exact_match,none"),
        ("tiny_cloze", "acc"),
    ],
)
def test_documents_are_graded_as_by_the_harness_itself(
    engine: Engine, folder: Path, name: str, metric: str
) -> None:
    suite = suite_of(folder, {"name": name, "metric": metric}, num_fewshot=2)
    results = results_of(engine, suite)
    expected = harness_results(folder, name, num_fewshot=2)
    metric_name = metric.partition(",")[0]
    assert [result.grade for result in results] == [each[metric_name] for each in expected[name]]
    assert [result.prompt for result in results] == [
        each["arguments"][0][0] for each in expected[name]
    ]
    mean = sum(result.grade or 0.0 for result in results) / len(results)
    assert mean == pytest.approx(expected["results"][f"{metric_name},none"])


def test_likelihoods_are_those_of_the_harness_itself(engine: Engine, folder: Path) -> None:
    from evomerge.evaluate.harness import EngineLM

    suite = suite_of(folder, {"name": "tiny_choice"}, limit=2)
    assert suite.harness is not None
    expected = harness_results(folder, "tiny_choice", limit=2)["tiny_choice"]
    asked = suite.harness.requests(engine, None, ["tiny_choice/1"])
    ours = EngineLM(engine).loglikelihood(asked["tiny_choice/1"])
    theirs = [tuple(some[0]) for some in expected[1]["resps"]]
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], rel=1e-4)
    assert [one[1] for one in ours] == [one[1] for one in theirs]


def test_rolling_likelihoods_are_those_of_the_harness_itself(engine: Engine, folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evomerge.evaluate.harness import EngineLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=engine.max_model_len - 1)
    # The second is longer than the context.
    texts = ["A short text.", "x" * (2 * engine.max_model_len + 7)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert EngineLM(engine).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)


def test_the_mean_of_grades_is_the_weighted_mean_of_metrics(engine: Engine, folder: Path) -> None:
    tasks = [
        {"name": "tiny_choice", "weight": 3, "limit": 8},
        {"name": "tiny_written", "weight": 1, "metric": "exact_match", "limit": 2},
    ]
    suite = suite_of(folder, *tasks)
    results = results_of(engine, suite)
    assert len(results) == 10
    values = {"tiny_choice": [], "tiny_written": []}  # type: ignore[var-annotated]
    for task, result in zip(suite.tasks, results, strict=True):
        values[task.category].append(result.details[0].grade)
    means = {name: sum(some) / len(some) for name, some in values.items()}
    score = sum(result.grade or 0.0 for result in results) / len(results)
    assert score == pytest.approx((3 * means["tiny_choice"] + means["tiny_written"]) / 4)


def test_some_tasks_in_any_order_get_what_they_get_among_all(engine: Engine, folder: Path) -> None:
    suite = suite_of(folder, {"name": "tiny_choice"}, num_fewshot=2)
    everything = {result.task_id: result.prompt for result in results_of(engine, suite)}
    some = ["tiny_choice/7", "tiny_choice/2"]
    found = evaluation_of(engine, suite).begin(some).result()
    assert [result.task_id for result in found] == some
    assert [result.prompt for result in found] == [everything[name] for name in some]


def test_the_first_prompt_is_shown_and_long_documents_are_named(
    engine: Engine, folder: Path
) -> None:
    suite = suite_of(folder, {"name": "tiny_choice"}, num_fewshot=1)
    assert self_test(engine, suite).endswith("What is 0 plus 1?\nAnswer:")
    check_prompt_lengths(engine, suite, suite.tasks)
    long = suite_of(folder, {"name": "tiny_choice"}, num_fewshot=8)
    with pytest.raises(ConfigError, match=r"documents do not fit .*tiny_choice/0 \(\d+ too many"):
        check_prompt_lengths(_Short(engine), long, long.tasks)  # type: ignore[arg-type]


def test_prompts_go_through_the_chat_template_where_that_is_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    model = tiny.llama(tmp_path / "chat", layers=1, chat=True)
    suite = suite_of(
        folder,
        {"name": "tiny_written", "metric": "exact_match"},
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    with open_engine("transformers", EngineConfig(str(model), (), threads=1)) as engine:
        result = evaluation_of(engine, suite).begin(["tiny_written/0"]).result()[0]
        assert self_test(engine, suite) == result.prompt
    assert result.prompt.endswith("<|user|>What is 0 plus 1?</s><|assistant|>")
    assert "<|assistant|>4</s>" in result.prompt


class _Short:
    """An engine with room for little."""

    max_model_len = 64

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "tiny_absent"}, "cannot load the task tiny_absent: .*absent.jsonl"),
        ({"name": "tiny_choice", "metric": "f1"}, "metric 'f1' is none of the task's: acc"),
        ({"name": "tiny_written", "metric": "bleu"}, "bleu is not a mean over documents"),
        ({"name": "tiny_rolling", "metric": "word_perplexity"}, "not a mean over documents"),
    ],
)
def test_tasks_that_cannot_be_an_objective_are_refused(
    folder: Path, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(folder, task)


def test_task_files_stay_beside_the_suite_that_names_them(folder: Path) -> None:
    (folder / "suite.yaml").write_text(
        "{harness: {tasks: [{name: tiny_choice}], include_path: tasks, limit: 2}}"
    )
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "one.yaml").write_text("{like: ../suite.yaml, system: Be brief.}")
    (folder / "mine" / "two.yaml").write_text("{like: one.yaml}")
    suite = load_suite("mine/two.yaml", folder, trust_code=True)
    assert [task.id for task in suite.tasks] == ["tiny_choice/0", "tiny_choice/1"]
    (folder / "mine" / "three.yaml").write_text(
        "{harness: {tasks: [{name: tiny_choice}], include_path: tasks}}"
    )
    with pytest.raises(ConfigError, match=r"include_path: there is no folder .*mine/tasks"):
        load_suite("mine/three.yaml", folder, trust_code=True)


def test_task_files_of_ones_own_need_trust() -> None:
    harness = {"tasks": [{"name": "x"}], "include_path": "tasks"}
    with pytest.raises(ValueError, match="needs --trust-code"):
        SuiteConfig.model_validate({"harness": harness})


def test_the_tasks_of_a_mergekit_evolve_file_are_the_suite(tmp_path: Path) -> None:
    evolve = {
        "genome": {"models": ["o/a", "o/b"], "merge_method": "linear"},
        "tasks": [{"name": "gsm8k", "weight": 0.5, "metric": "exact_match,strict-match"}],
        "limit": 50,
        "num_fewshot": 3,
    }
    mapping = {**evolve, "study": "s", "budget": {"trials": 20}}
    for content in (mapping, {k: v for k, v in mapping.items() if k != "limit"}):
        study = study_from_mapping(content, where="x.yaml", folder=tmp_path)
        assert isinstance(study.suite, SuiteConfig)
        assert study.suite.harness is not None
        assert study.suite.harness.tasks[0].metric_name == "exact_match"
        assert study.suite.harness.tasks[0].filter == "strict-match"
        assert study.suite.harness.limit == content.get("limit")
        again = study_from_mapping(study.to_mapping(), where="stored", folder=tmp_path)
        assert again.suite == study.suite
