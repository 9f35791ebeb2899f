from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge.errors import ConfigError
from evomerge.evaluate.suite import SuiteConfig
from evomerge.optimizer.defaults import SIGMA0
from evomerge.search.resolve import resolve_study, what_changed
from evomerge.search.study import EngineOptions, StudyConfig, read_study, study_from_mapping

MINIMAL = {
    "study": "s",
    "base_model": "owner/base",
    "models": ["owner/model"],
    "budget": {"trials": 10},
    "suite": "elyza-tasks-100",
}


def complaint(tmp_path: Path, content: object, *, trust_code: bool = False) -> str:
    """The message that a study file of this content gets."""
    path = tmp_path / "study.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        read_study(str(path), trust_code=trust_code)
    return str(caught.value).replace(str(path), "FILE")


def test_a_minimal_study_has_the_defaults_of_the_design(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(MINIMAL))
    study = read_study(str(tmp_path / "study.yaml"))
    assert study.search_space.to_fingerprint() == {
        "merge_method": "task_arithmetic",
        "layer_granularity": 0,
        "filters": [],
        "weight": [-0.5, 2.0],
    }
    assert study.sampler.model_dump() == {
        "name": "auto",
        "sigma0": SIGMA0,
        "population": None,
        "seed": 0,
    }
    assert (study.engine.repeatable, study.engine.dtype, study.engine.load) == (
        True,
        "bfloat16",
        "live",
    )
    assert study.holdout == 0.0
    assert study.folder == tmp_path


@pytest.mark.parametrize(("dimension", "population"), [(1, 8), (20, 24), (40, 30)])
def test_the_population_is_twice_the_textbooks(dimension: int, population: int) -> None:
    study = StudyConfig.model_validate(MINIMAL)
    assert study.sampler.population_for(dimension) == population


def test_all_mistakes_of_a_file_are_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    wrong = {
        **MINIMAL,
        "study": "a/b",
        "modles": [],
        "models": ["m", "m"],
        "search_space": {"merge_metod": "linear"},
        "sampler": {"name": "nes", "sigma0": 0},
        "budget": {"trials": 0},
        "suite": {"scorer": "exact", "data": "t.jsonl", "refrence": "x"},
        "holdout": 1.5,
    }
    lines = complaint(tmp_path, wrong).splitlines()
    assert [line.removeprefix("FILE: ").split(": ")[0] for line in lines] == [
        "study",
        "models",
        "search_space.merge_metod",
        "sampler.name",
        "sampler.sigma0",
        "budget.trials",
        "suite.refrence",
        "holdout",
        "modles",
    ]
    assert all(line.startswith("FILE: ") for line in lines)
    assert lines[0].startswith("FILE: study: 'a/b' is no name for a study; right are 1 to 100 of")
    assert "m is listed twice" in lines[1]
    assert "did you mean 'merge_method'?" in lines[2]
    assert "'xnes', 'gp', 'tpe', 'random' or 'quasi-random' (given: 'nes')" in lines[3]
    assert "did you mean 'reference'?" in lines[6]
    assert "(given: 1.5)" in lines[7]
    assert "did you mean 'models'?" in lines[8]


def test_reversed_bounds_are_refused(tmp_path: Path) -> None:
    message = complaint(tmp_path, {**MINIMAL, "search_space": {"weight": [2, 1]}})
    assert message == "FILE: search_space: weight: [2.0, 1.0] should be [low, high] with low < high"


def test_missing_keys_are_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, {"study": "s"}).splitlines() == [
        "FILE: base_model: is missing",
        "FILE: models: is missing",
        "FILE: budget: is missing",
        "FILE: suite: is missing",
    ]


@pytest.mark.parametrize("content", ["study: [", "- a\n", ""])
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    assert complaint(tmp_path, content).startswith("FILE: ")


def test_unknown_engine_keys_need_trust(tmp_path: Path) -> None:
    study = {**MINIMAL, "engine": {"max_model_len": 64, "worker_cls": "evil:Worker"}}
    message = complaint(tmp_path, study)
    assert message.startswith("FILE: engine: unknown key 'worker_cls'; known are max_model_len, ")
    assert message.endswith("need --trust-code on the command line")
    path = tmp_path / "study.yaml"
    trusted = read_study(str(path), trust_code=True)
    assert trusted.engine.options == {"max_model_len": 64, "worker_cls": "evil:Worker"}
    near = complaint(tmp_path, {**MINIMAL, "engine": {"max_model_ln": 64}})
    assert "unknown key 'max_model_ln'; did you mean 'max_model_len'?" in near


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_model_len", "abc"),
        ("max_model_len", -5),
        ("max_num_seqs", True),
        ("gpu_memory_utilization", 1.5),
        ("enforce_eager", "yes"),
        ("kv_cache_dtype", 8),
        ("seed", 0.5),
    ],
)
def test_an_engine_option_of_the_wrong_kind_is_named(
    tmp_path: Path, key: str, value: object
) -> None:
    message = complaint(tmp_path, {**MINIMAL, "engine": {key: value}}, trust_code=True)
    assert message.startswith(f"FILE: engine.{key}: ")
    assert message.endswith(f"(given: {value!r})")


def test_the_engine_options_are_those_of_the_file(tmp_path: Path) -> None:
    options = {"max_model_len": 64, "gpu_memory_utilization": 1, "enforce_eager": False}
    engine = StudyConfig.model_validate({**MINIMAL, "engine": {"load": "disk", **options}}).engine
    assert engine.options == options


def test_engine_options_are_arguments_that_vllm_has() -> None:
    """Read from its source: importing it takes half a minute."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text())
    (arguments,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    fields = {
        node.target.id
        for node in arguments.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(EngineOptions.model_fields) - fields == set()


SERVER = {"name": "vllm", "repeatable": False}


@pytest.mark.parametrize(
    "url", ["http://localhost:8000", "https://127.1.2.3/v1", "http://[::1]:8000"]
)
def test_a_server_on_this_machine_needs_no_trust(url: str) -> None:
    study = StudyConfig.model_validate({**MINIMAL, "engine": {**SERVER, "url": url}})
    assert study.engine.url == url


@pytest.mark.parametrize(
    "url", ["http://example.org:8000", "http://10.0.0.1", "http://localhost.example.org"]
)
def test_a_server_elsewhere_needs_trust(tmp_path: Path, url: str) -> None:
    study = {**MINIMAL, "engine": {**SERVER, "url": url}}
    message = complaint(tmp_path, study)
    assert message.startswith("FILE: engine.url: ")
    assert "is another machine, which needs --trust-code" in message
    assert read_study(str(tmp_path / "study.yaml"), trust_code=True).engine.url == url


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1", "http://127.0.0.1:port", "http://a b", "ftp://localhost"]
)
def test_an_address_that_is_none_is_refused_even_with_trust(tmp_path: Path, url: str) -> None:
    study = {**MINIMAL, "engine": {**SERVER, "url": url}}
    assert complaint(tmp_path, study, trust_code=True).startswith("FILE: engine.url: ")


def test_quantised_engines_are_refused_even_with_trust(tmp_path: Path) -> None:
    study = {**MINIMAL, "engine": {"quantization": "fp8"}}
    assert "quantization" in complaint(tmp_path, study, trust_code=True)


def test_a_study_in_plain_values_comes_back_the_same(study: Callable[..., StudyConfig]) -> None:
    asked = study(engine={"name": "vllm", "max_model_len": 64}, storage="there")
    mapping = json.loads(json.dumps(asked.to_mapping()))
    assert study_from_mapping(mapping, where=asked.where, folder=asked.folder) == asked


def test_reading_a_study_imports_no_torch() -> None:
    code = (
        "import sys, evomerge.search.study, evomerge.search.status\n"
        "print([name for name in ('torch', 'cma', 'optuna', 'vllm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_relative_paths_start_from_the_studys_folder(
    study_file: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    base = os.path.relpath(models / "base", tmp_path)
    asked = read_study(str(study_file(base_model=base)))
    study = resolve_study(asked, tmp_path / "storage")
    assert study.base == models / "base"
    assert [task.id for task in study.suite.tasks] == [str(number) for number in range(10)]
    assert len(study.holdout_tasks) == 3


def test_resolving_finds_every_wrong_model_and_leaves_nothing(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    asked = study(base_model="./nowhere", models=["./neither", "./nor"])
    with pytest.raises(ConfigError) as caught:
        resolve_study(asked, tmp_path / "storage")
    lines = str(caught.value).splitlines()
    starts = [line.removeprefix(asked.where).split(": ")[1] for line in lines]
    assert starts == ["base_model", "models.0", "models.1"]
    assert not (tmp_path / "storage").exists()


def test_a_granularity_that_does_not_divide_names_the_file(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    asked = study(search_space={"layer_granularity": 3})
    with pytest.raises(ConfigError, match=r"study\.yaml: search_space\.layer_granularity: 3 does"):
        resolve_study(asked, tmp_path / "storage")


def fingerprint(asked: StudyConfig, storage: Path) -> dict[str, str]:
    return dict(resolve_study(asked, storage).fingerprint)


def test_what_cannot_change_an_answer_does_not_change_the_study(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    before = fingerprint(study(), tmp_path)
    same = study(
        budget={"trials": 999},
        storage="elsewhere",
        sampler={"name": "xnes", "population": 6, "seed": 3},
        search_space={"layer_granularity": 2, "weight": [-0.5, 2.0]},
        engine={"name": "transformers", "load": "disk", "gpu_memory_utilization": 0.5},
    )
    assert what_changed(before, fingerprint(same, tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"holdout": 0.4}, "holdout: was 0.3, is 0.4"),
        ({"sampler": {"population": 6, "seed": 4}}, "sampler.seed: was 3, is 4"),
        ({"sampler": {"population": 8, "seed": 3}}, "sampler.population: was 6, is 8"),
        (
            {"search_space": {"layer_granularity": 4}},
            "search_space.layer_granularity: was 2, is 4",
        ),
        (
            {"search_space": {"layer_granularity": 2, "weight": [-0.5, 1.0]}},
            "search_space.weight.1: was 2.0, is 1.0",
        ),
        (
            {"engine": {"name": "transformers", "max_num_seqs": 4}},
            "engine.max_num_seqs: was absent, is 4",
        ),
        ({"engine": {"name": "vllm"}}, "engine.name: was transformers, is vllm"),
    ],
)
def test_what_decides_a_search_changes_the_study(
    study: Callable[..., StudyConfig], tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    before = fingerprint(study(), tmp_path)
    assert what_changed(before, fingerprint(study(**changes), tmp_path)) == [line]


def test_other_tasks_and_other_weights_change_the_study(
    study: Callable[..., StudyConfig], tmp_path: Path, models: Path
) -> None:
    asked = study()
    before = fingerprint(asked, tmp_path)
    weights = models / "left" / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    (tmp_path / "tasks.jsonl").write_text(
        (tmp_path / "tasks.jsonl").read_text().replace('"!"', '"?"', 1)
    )
    changed = what_changed(before, fingerprint(asked, tmp_path))
    assert [line.split(": was")[0] for line in changed] == [
        "suite (tasks, prompt, scorer, settings)",
        "models.0 (its files)",
    ]


@pytest.mark.parametrize("inline", [True, False])
def test_a_scorer_that_is_code_needs_trust_wherever_it_stands(
    study_file: Callable[..., Path], tmp_path: Path, inline: bool
) -> None:
    (tmp_path / "own.py").write_text("def one(task, answer):\n    return 1\n")
    suite = {"scorer": "own.py:one", "data": "tasks.jsonl"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    path = str(study_file(suite=suite if inline else "suite.yaml"))
    with pytest.raises(ConfigError, match="runs code, which needs --trust-code"):
        resolve_study(read_study(path), tmp_path / "storage")
    found = resolve_study(read_study(path, trust_code=True), tmp_path / "storage")
    assert found.suite.scorers["own.py:one"].grade(found.suite.tasks[0], "x") == 1


def test_a_study_takes_a_preset_with_its_own_tasks_and_stays_so_when_stored(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    judge = {"model": "m", "base_url": "http://127.0.0.1:9/v1"}
    path = study_file(suite={"like": "jsonl-judge", "data": "tasks.jsonl"}, judge=judge)
    config = read_study(str(path))
    again = study_from_mapping(config.to_mapping(), where="stored", folder=tmp_path)
    assert again.suite == config.suite
    assert isinstance(again.suite, SuiteConfig)
    assert again.suite.rubric is not None
