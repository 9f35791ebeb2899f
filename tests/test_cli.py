"""The command line end to end: what a user types, what comes back, what is left on disk."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.cli import main
from evomerge.commands.options import parse_size
from evomerge.database import open_database
from evomerge.errors import ConfigError
from evomerge.optimizer.events import opened, stopped
from evomerge.recipe import read_recipe
from evomerge.report.status import status_text
from evomerge.search.log import EventLog
from tests import tiny

STUDY: dict[str, Any] = {
    "study": "tiny",
    "base_model": "base",
    "models": ["expert"],
    "search_space": {"merge_method": "task_arithmetic", "layer_granularity": 1},
    "sampler": {"population": 4},
    "budget": {"trials": 4},
    "suite": {"scorer": "exact", "data": "tasks.jsonl", "max_tokens": 2},
    "engine": {"name": "transformers", "dtype": "float32"},
    "holdout": 0.5,
}
RECIPE: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "dtype": "float32",
    "slices": [
        {
            "sources": [
                {"model": "expert", "layer_range": [0, 2], "parameters": {"weight": 0.5}},
                {"model": "base", "layer_range": [0, 2]},
            ]
        }
    ],
}


@dataclass(frozen=True)
class Ran:
    """What a command left behind on the terminal."""

    status: int
    out: str
    err: str


def run(*arguments: object) -> Ran:
    """One command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Ran(status, out.getvalue(), err.getvalue())


def fill(folder: Path, models: Path) -> Path:
    """Makes `folder` a place to work in: models (linked), tasks, a study and a recipe."""
    folder.mkdir(exist_ok=True)
    for model in models.iterdir():
        (folder / model.name).symlink_to(model)
    rows = [{"id": f"t{n}", "input": f"say {n}", "output": str(n)} for n in range(4)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an expert of it, and models that do not fit them."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "base", layers=2, dtype=torch.float32)
    tiny.variant(folder / "base", folder / "expert", seed=1)
    tiny.qwen2(folder / "other_architecture", layers=2)
    tiny.llama(folder / "other_shape", layers=2, hidden=192)
    tiny.llama(folder / "other_vocabulary", layers=2, vocabulary=300)
    tiny.llama(folder / "more_layers", layers=3)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with everything that a study needs."""
    monkeypatch.chdir(fill(tmp_path, models))
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    return tmp_path


@dataclass(frozen=True)
class Finished:
    """A study that was run to its end, and what its command printed."""

    folder: Path
    storage: Path
    ran: Ran

    @property
    def study(self) -> Path:
        return self.storage / "studies" / "tiny"


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = fill(tmp_path_factory.mktemp("finished"), models)
    storage = folder / "storage"
    return Finished(folder, storage, run("search", folder / "study.yaml", "--storage", storage))


# A study that works ------------------------------------------------------------------------


def test_a_search_ends_with_a_table_of_all_models_and_the_files(finished: Finished) -> None:
    assert finished.ran.status == 0
    lines = finished.ran.out.splitlines()
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == ["base", "expert", "uniform merge", "evolved merge"]
    assert lines[-3:] == [
        f"recipe  {finished.study / 'best_config.yaml'}",
        f"model   {finished.study / 'model'}",
        f"report  {finished.study / 'report.md'}",
    ]


def test_a_search_tells_one_line_per_trial_on_stderr(finished: Finished) -> None:
    told = [line.partition(" |")[0] for line in finished.ran.err.splitlines()]
    assert [line for line in told if line.startswith("trial") and "," not in line] == [
        f"trial {number} gen 0" for number in range(4)
    ]


def test_the_status_of_a_finished_study_is_one_json_document(finished: Finished) -> None:
    ran = run("status", "tiny", "--storage", finished.storage, "--json")
    status = json.loads(ran.out)
    assert (status["study"], status["state"]) == ("tiny", "finished")
    assert [trial["number"] for trial in status["trials"]] == [0, 1, 2, 3]
    assert status["best"]["config"] == str(finished.study / "best_config.yaml")
    assert set(status["outcome"]["holdout"]["models"]) == {"expert"}
    assert ran.err == ""


def test_the_model_of_a_study_is_the_merge_of_its_recipe(
    finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert run("merge", finished.study / "best_config.yaml", out).status == 0
    again, model = tiny.read_tensors(out), tiny.read_tensors(finished.study / "model")
    assert again.keys() == model.keys()
    assert all(torch.equal(again[name], model[name]) for name in model)


def test_an_exported_trial_has_its_own_weights(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "trial.yaml"
    assert run(
        "export", "tiny", "--storage", finished.storage, "--trial", 2, "--yaml", file
    ) == Ran(0, f"{file}\n", "")
    status = json.loads(run("status", "tiny", "--storage", finished.storage, "--json").out)
    genome = status["trials"][2]["genome"]
    slices = read_recipe(file).slices or ()
    assert [part.sources[0].parameters["weight"] for part in slices] == genome


@pytest.mark.parametrize("taken", ["trial.yaml", "model"])
def test_an_export_writes_both_or_nothing(finished: Finished, tmp_path: Path, taken: str) -> None:
    if taken == "model":
        shutil.copytree(finished.study / "model", tmp_path / "model")
    else:
        (tmp_path / "trial.yaml").write_text("mine")
    before = tree(tmp_path)
    places = ("--yaml", tmp_path / "trial.yaml", "--model", tmp_path / "model")
    ran = run("export", "tiny", "--storage", finished.storage, *places)
    assert (ran.status, ran.out) == (2, "")
    assert f"{tmp_path / taken}: exists" in ran.err
    assert tree(tmp_path) == before
    ran = run("export", "tiny", "--storage", finished.storage, *places, "--overwrite")
    assert ran == Ran(0, f"{tmp_path / 'trial.yaml'}\n{tmp_path / 'model'}\n", "")
    assert read_recipe(tmp_path / "trial.yaml") == read_recipe(finished.study / "best_config.yaml")


def test_a_finished_study_is_not_run_again(finished: Finished) -> None:
    recipe = (finished.study / "best_config.yaml").read_bytes()
    again = run("search", finished.folder / "study.yaml", "--storage", finished.storage)
    assert (again.status, again.err) == (0, "")
    assert again.out == finished.ran.out
    assert (finished.study / "best_config.yaml").read_bytes() == recipe


def test_a_resumed_study_goes_on_to_a_new_total(finished: Finished, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    ran = run("resume", "tiny", "--storage", storage, "--trials", 8)
    assert ran.status == 0
    told = [line.partition(" |")[0] for line in ran.err.splitlines()]
    trials = [line for line in told if line.startswith("trial") and "held-out" not in line]
    assert trials == [f"trial {number} gen 1" for number in range(4, 8)]


def test_the_report_says_how_to_repeat_the_study(finished: Finished) -> None:
    report = (finished.study / "report.md").read_text()
    assert "evomerge search FILE --seed 0 --trials 4" in report
    assert "| evolved merge |" in report
    assert "| generation |" in report


def test_a_study_whose_file_changed_is_refused_with_what_changed(
    finished: Finished, tmp_path: Path
) -> None:
    before = tree(finished.storage)
    changed = STUDY | {"holdout": 0.25, "search_space": {"layer_granularity": 2}}
    file = finished.folder / "changed.yaml"
    file.write_text(yaml.safe_dump(changed))
    ran = run("search", file, "--storage", finished.storage)
    assert ran.status == 2
    assert "holdout: was 0.5, is 0.25" in ran.err
    assert "search_space.layer_granularity: was 1, is 2" in ran.err
    assert tree(finished.storage) == before


def test_a_linear_search_may_have_the_base_among_its_models(models: Path, here: Path) -> None:
    linear = STUDY | {"models": ["base", "expert"], "search_space": {"merge_method": "linear"}}
    (here / "study.yaml").write_text(yaml.safe_dump(linear))
    ran = run("search", "study.yaml")
    assert ran.status == 0
    best = here / "evol_merge_storage" / "studies" / "tiny" / "best_config.yaml"
    assert read_recipe(best).model_names() == (str(models / "base"), str(models / "expert"))


def test_a_genome_of_mergekit_evolve_is_searched_to_its_report(here: Path) -> None:
    own = {key: STUDY[key] for key in STUDY if key not in {"base_model", "models", "search_space"}}
    genome = {"models": ["expert"], "base_model": "base", "merge_method": "task_arithmetic"}
    (here / "study.yaml").write_text(yaml.safe_dump({**own, "genome": genome}))
    ran = run("search", "study.yaml", "--storage", "storage")
    assert ran.status == 0, ran.err
    report = (here / "storage" / "studies" / "tiny" / "report.md").read_text()
    assert "task_arithmetic of `expert` over `base`" in report


def test_studies_are_listed(finished: Finished, tmp_path: Path) -> None:
    assert "tiny" in run("status", "--storage", finished.storage).out
    listed = json.loads(run("status", "--storage", finished.storage, "--json").out)
    assert [(study["study"], study["trials"]) for study in listed["studies"]] == [("tiny", 4)]
    assert run("status", "--storage", tmp_path / "none").out == "no studies yet\n"


def test_a_study_that_cannot_be_read_does_not_hide_the_others(
    finished: Finished, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    (storage / "studies" / "gone").mkdir()
    elsewhere = {"study": {"storage": {"database_env": "NO_SUCH_VARIABLE"}}}
    (storage / "studies" / "gone" / "study.yaml").write_text(yaml.safe_dump(elsewhere))
    ran = run("status", "--storage", storage)
    assert (ran.status, ran.err) == (0, "")
    first, second = ran.out.splitlines()
    assert first.split()[:3] == ["tiny", "finished", "4"]
    assert second.split()[:2] == ["gone", "unreadable"]
    assert "the variable NO_SUCH_VARIABLE is not set" in second


def test_a_study_is_read_on_a_read_only_disk(finished: Finished) -> None:
    command = (
        'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && '
        f'{sys.executable} -m evomerge status --storage "$0"'
    )
    unshare = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("no user namespaces here")
    ran = subprocess.run(
        [*unshare, "sh", "-c", command, str(finished.storage)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout.split()[:3] == ["tiny", "finished", "4"]


def test_the_status_of_a_finished_study_has_its_table_and_verdict(finished: Finished) -> None:
    shown = run("status", "tiny", "--storage", finished.storage).out
    status = json.loads(run("status", "tiny", "--storage", finished.storage, "--json").out)
    assert status["tasks"] == {"search": 2, "holdout": 2, "holdout_suite": None}
    words = ("tiny: finished", "report.md", "search (2 tasks)", "evolved merge")
    assert [each for each in (*words, status["outcome"]["verdict"]) if each not in shown] == []


def test_the_status_says_why_a_study_stopped(finished: Finished, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    log = EventLog(open_database(storage), "tiny")
    log.append(
        opened(
            budget={"trials": 8, "task_evaluations": None},
            asked_budget={"trials": 4, "task_evaluations": None},
            process="1 on a",
            engine_start=0.0,
        ),
        stopped("the engine did not start again", []),
    )
    log.close()
    lines = run("status", "tiny", "--storage", storage).out.splitlines()
    assert lines[:2] == ["study   tiny: interrupted", "stopped the engine did not start again"]


def test_the_status_says_why_a_study_ended_below_its_budget(
    finished: Finished, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    found = json.loads(run("status", "tiny", "--storage", storage, "--json").out)
    population, trials = found["budget"]["population"], len(found["trials"])
    assert population > 1
    for more, told in ((population - 1, True), (population, False), (0, False)):
        found["budget"]["trials"] = trials + more
        (line,) = [one for one in status_text(found).splitlines() if one.startswith("trials")]
        assert ("no whole generation" in line) == told, line


def test_the_storage_of_a_study_file_starts_at_the_file(here: Path, models: Path) -> None:
    folder = fill(here / "folder", models)
    study(storage="kept")(folder)
    assert run("search", "folder/study.yaml").status == 0
    assert (folder / "kept" / "evomerge.db").exists()
    assert not (here / "kept").exists()


# Wrong input: exit status 2, one message, nothing left -----------------------------------------

Break = Callable[[Path], object]


def study(**changes: Any) -> Break:
    """Writes STUDY with other values; a mapping replaces single keys of a section."""

    def write(folder: Path) -> None:
        content = {
            **STUDY,
            **{
                key: {**STUDY[key], **value}
                if isinstance(value, dict) and isinstance(STUDY.get(key), dict)
                else value
                for key, value in changes.items()
            },
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(content))

    return write


def tasks(text: str) -> Break:
    return lambda folder: (folder / "tasks.jsonl").write_text(text)


def damaged(change: Callable[[Path], object]) -> Break:
    """Puts a damaged copy of the expert in its place."""

    def write(folder: Path) -> None:
        source = (folder / "expert").resolve()
        (folder / "expert").unlink()
        shutil.copytree(source, folder / "expert")
        change(folder / "expert")

    return write


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 5000)


def without_tokenizer(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()


BAD_STUDIES: dict[str, tuple[Break, list[str]]] = {
    "unknown key": (study(modles=["x"]), ["study.yaml: modles", "did you mean 'models'?"]),
    "unknown key of a section": (
        study(search_space={"layer_granularty": 1}),
        ["study.yaml: search_space.layer_granularty", "did you mean 'layer_granularity'?"],
    ),
    "unknown engine key": (
        study(engine={"max_modellen": 9}),
        ["study.yaml: engine", "'max_modellen'", "did you mean 'max_model_len'?"],
    ),
    "engine key that is not harmless": (
        study(engine={"hf_overrides": {}}),
        ["study.yaml: engine", "'hf_overrides'", "--trust-code"],
    ),
    "granularity that does not divide": (
        study(search_space={"layer_granularity": 3}),
        ["study.yaml: search_space.layer_granularity: 3", "2 layers", "1, 2 would"],
    ),
    "bounds reversed": (
        study(search_space={"weight": [2, -0.5]}),
        ["study.yaml: search_space", "[2.0, -0.5]", "low < high"],
    ),
    "study name with a slash": (study(study="a/b"), ["study.yaml: study", "'a/b'"]),
    "another architecture": (
        study(models=["other_architecture"]),
        ["study.yaml: ", "other_architecture", "base"],
    ),
    "another shape": (study(models=["other_shape"]), ["study.yaml: ", "other_shape", "base"]),
    "another vocabulary": (
        study(models=["other_vocabulary"]),
        ["study.yaml: ", "other_vocabulary", "300", "261"],
    ),
    "another number of layers": (
        study(models=["more_layers"]),
        ["study.yaml: models.0: more_layers has 3 layers, base has 2"],
    ),
    "a model that is nowhere": (
        study(models=["nowhere"]),
        ["study.yaml: models.0: nowhere", "neither a folder", "owner/name"],
    ),
    "a suite preset that is not there": (
        study(suite="elyza-tasks-10"),
        ["study.yaml", "elyza-tasks-10: no suite preset", "available:"],
    ),
    "safetensors missing": (
        damaged(lambda model: (model / "model.safetensors").unlink()),
        ["expert", "model.safetensors"],
    ),
    "safetensors truncated": (damaged(truncate), ["expert", "model.safetensors", "truncated"]),
    "no tokenizer": (damaged(without_tokenizer), ["expert", "tokenizer"]),
    "empty task file": (tasks(""), ["tasks.jsonl", "no task"]),
    "malformed task file": (
        tasks('{"id": "a", "input": "x", "output": "1"}\n{"id": }\n'),
        ["tasks.jsonl:2", "not a JSON object"],
    ),
    "task file without a column": (
        tasks('{"id": "a", "input": "x"}\n'),
        ["tasks.jsonl:1", "'output'"],
    ),
    "a budget under one generation": (
        study(budget={"trials": 3}),
        ["study.yaml: budget.trials: 3", "4"],
    ),
    "no YAML": (lambda folder: (folder / "study.yaml").write_text("a: ["), ["study.yaml"]),
}


@pytest.mark.parametrize("case", sorted(BAD_STUDIES))
def test_a_bad_study_ends_with_one_message_and_leaves_nothing(case: str, here: Path) -> None:
    damage, words = BAD_STUDIES[case]
    damage(here)
    before = tree(here)
    ran = run("search", "study.yaml")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("error: ") == 1
    assert [word for word in words if word not in ran.err] == []
    assert tree(here) == before


def recipe(**changes: Any) -> Break:
    return lambda folder: (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))


def slices(*ranges: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    return [
        {
            "sources": [
                {"model": "expert", "layer_range": expert, "parameters": {"weight": 0.5}},
                {"model": "base", "layer_range": base},
            ]
        }
        for expert, base in ranges
    ]


BAD_RECIPES: dict[str, tuple[Break, list[str]]] = {
    "unknown key": (recipe(merge_methd="x"), ["recipe.yaml: merge_methd", "'merge_method'"]),
    "unknown method": (
        recipe(merge_method="task_arithmetics"),
        ["recipe.yaml: merge_method", "'task_arithmetics'", "'task_arithmetic'"],
    ),
    "sources of different lengths": (
        recipe(slices=slices(([0, 2], [0, 1]))),
        ["recipe.yaml: slices.0", "expert [0, 2]", "base [0, 1]"],
    ),
    "slices beyond the model": (
        recipe(slices=slices(([1, 3], [1, 3]))),
        ["recipe.yaml: slices.0: layer_range [1, 3]", "2 layers"],
    ),
    "a weight that is no number": (
        recipe(
            merge_method="linear",
            slices=None,
            models=[{"model": "expert", "parameters": {"weight": float("nan")}}],
            parameters={"normalize": False, "weight": 1.0},
        ),
        ["recipe.yaml: model.embed_tokens.weight: weight nan is not a finite float32 number"],
    ),
    "a model that is nowhere": (
        recipe(base_model="none", slices=None, models=[{"model": "base"}]),
        [": none: this model is neither a folder", "neither a folder", "owner/name"],
    ),
    "output folder taken": (
        lambda folder: shutil.copytree(folder / "base", folder / "out"),
        ["out: exists and is not empty", "--overwrite"],
    ),
    "output is a file": (lambda folder: (folder / "out").write_text("x"), ["out: exists"]),
    "no such recipe": (lambda folder: (folder / "recipe.yaml").unlink(), ["recipe.yaml"]),
}


@pytest.mark.parametrize("case", sorted(BAD_RECIPES))
def test_a_bad_recipe_ends_with_one_message_and_leaves_nothing(case: str, here: Path) -> None:
    damage, words = BAD_RECIPES[case]
    damage(here)
    before = tree(here)
    ran = run("merge", "recipe.yaml", "out")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert [word for word in words if word not in ran.err] == []
    assert tree(here) == before


def test_an_output_never_replaces_a_model_that_an_adapter_is_applied_to(here: Path) -> None:
    assert run("extract-lora", "expert", "base", "lora", "--rank", "2").status == 0
    shutil.copytree(here / "base", here / "mine")
    recipe(slices=None, models=[{"model": "mine+lora"}], base_model="expert")(here)
    before = tree(here)
    ran = run("merge", "recipe.yaml", "mine", "--overwrite")
    assert (ran.status, ran.out) == (2, "")
    assert "mine, which goes into the merge" in ran.err
    assert tree(here) == before


def test_models_that_are_not_there_are_told_at_once_with_their_keys(here: Path) -> None:
    recipe(
        slices=None,
        models=[{"model": "nowhere/at/all", "parameters": {"weight": 1}}],
        base_model="lost.gguf",
        tokenizer_source="unoin",
    )(here)
    before = tree(here)
    ran = run("merge", "recipe.yaml", "out")
    assert (ran.status, ran.out) == (2, "")
    lines = ran.err.splitlines()
    assert [line.split(": ")[:4] for line in lines] == [
        ["error", "recipe.yaml", "base_model", "lost.gguf"],
        ["recipe.yaml", "models.0.model", "nowhere/at/all", lines[1].split(": ")[3]],
        ["recipe.yaml", "tokenizer_source", "unoin", lines[2].split(": ")[3]],
    ]
    assert lines[2].endswith("(or write base or union)")
    assert tree(here) == before


def test_gaps_overlaps_and_repetition_of_layers_are_legal(here: Path) -> None:
    recipe(slices=slices(([1, 2], [1, 2]), ([0, 2], [0, 2]), ([1, 2], [1, 2])))(here)
    assert run("merge", "recipe.yaml", "out").status == 0
    assert json.loads((here / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_storage_that_cannot_be_written_to_is_refused(here: Path) -> None:
    (here / "file").write_text("x")
    before = tree(here)
    ran = run("search", "study.yaml", "--storage", here / "file" / "storage")
    assert ran.status == 2
    assert str(here / "file") in ran.err
    assert tree(here) == before


def test_a_full_disk_is_refused_before_the_search(here: Path) -> None:
    """In a small file system of its own, where this user may mount one."""
    (here / "small").mkdir()
    command = (
        "mount -t tmpfs -o size=512k none small && dd if=/dev/zero of=small/full bs=1k count=508 "
        f"status=none && {sys.executable} -m evomerge search study.yaml --storage small/storage; "
        "status=$?; ls small; exit $status"
    )
    unshare = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("no user namespaces here")
    ran = subprocess.run(
        [*unshare, "sh", "-c", command], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "full\n")
    assert "small" in ran.stderr
    assert "No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resume", "nothing"], ["no study nothing"]),
        (["status", "nothing"], ["no study nothing"]),
        (["status", "../nothing"], ["'../nothing'"]),
        (["export", "nothing"], ["no study nothing"]),
        (["search", "nothing"], ["no study preset", "llm-jp-3-13b-task-arithmetic"]),
        (["search", "nothing.yaml"], ["nothing.yaml", "does not exist"]),
        (["merge", "recipe.yaml", "out", "--max-shard-size", "5 apples"], ["'5 apples'", "5GB"]),
        (["presets", "show", "nothing"], ["no preset", "llm-jp-3-13b-task-arithmetic"]),
        (["search", "study.yaml", "--trials", "0"], ["--trials"]),
        (["search", "study.yaml", "--trails", "9"], ["--trails", "--trials"]),
        (["serach", "study.yaml"], ["serach"]),
        (["merge", "recipe.yaml"], ["OUT"]),
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_right_is_refused(
    arguments: list[str], words: list[str], here: Path
) -> None:
    before = tree(here)
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert [word for word in words if word not in ran.err] == []
    assert tree(here) == before


def test_a_second_process_on_one_study_is_refused_by_name(finished: Finished) -> None:
    """Held by a process that is stopped: so it holds the lock for as long as the test takes."""
    holder = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from evomerge.search.storage import held\n"
        "with held(Path(sys.argv[1])):\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    command = [sys.executable, "-c", holder, str(finished.study)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        ran = run("search", finished.folder / "study.yaml", "--storage", finished.storage)
        os.kill(int(pid), signal.SIGKILL)
    assert ran.status == 2
    assert f"process {pid} on " in ran.err


def test_an_interrupted_search_exits_130_and_says_how_to_go_on(here: Path) -> None:
    content = STUDY | {"study": "long", "budget": {"trials": 40000}}
    (here / "study.yaml").write_text(yaml.safe_dump(content))
    arguments = ["search", "study.yaml", "--storage", "kept", "--trust-code"]
    command = [sys.executable, "-m", "evomerge", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trial 1 "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == (
        "interrupted; go on with: evomerge resume long --storage kept --trust-code"
    )
    status = json.loads(run("status", "long", "--storage", "kept", "--json").out)
    assert status["state"] == "interrupted"


def test_a_hub_that_cannot_be_reached_is_named(here: Path) -> None:
    """In a process of its own: the hub's address is read when its client is imported."""
    study(base_model="owner/name")(here)
    before = tree(here)
    ran = subprocess.run(
        [sys.executable, "-m", "evomerge", "search", "study.yaml"],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "study.yaml: base_model: owner/name: not a folder here" in ran.stderr
    assert "hub does not answer" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert tree(here) == before


# The rest ---------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from evomerge.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "numpy",
        "vllm",
        "transformers",
        "pydantic",
        "sqlalchemy",
        "optuna",
        "cma",
        "matplotlib",
    }
    assert heavy & set(ran.stderr.split()) == set()
    assert all(command in ran.stdout for command in ("search", "resume", "status", "export"))


def test_presets_are_listed_shown_and_copied(here: Path) -> None:
    name = "llm-jp-3-13b-task-arithmetic"
    assert name in run("presets").out
    assert run("presets", "list").out == run("presets").out
    shown = run("presets", "show", name).out
    assert yaml.safe_load(shown)["search_space"]["layer_granularity"] == 2
    assert run("presets", "copy", name) == Ran(0, f"{name}.yaml\n", "")
    assert (here / f"{name}.yaml").read_text() == shown
    assert run("presets", "copy", name).status == 2
    # A suite comes with the prompts that it names.
    prompt = Path("prompts") / "jsonl-judge.jinja"
    assert run("presets", "copy", "jsonl-judge") == Ran(0, f"jsonl-judge.yaml\n{prompt}\n", "")
    assert "# The answer to grade" in (here / prompt).read_text()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5k", 1500), ("7", 7)],
)
def test_sizes_are_decimal_unless_they_say_so(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1e9", "5 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)


def test_shards_are_as_small_as_asked(here: Path) -> None:
    assert run("merge", "recipe.yaml", "out", "--max-shard-size", "300kB").status == 0
    shards = sorted((here / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert run("merge", "recipe.yaml", "whole").status == 0
    one, many = tiny.read_tensors(here / "whole"), tiny.read_tensors(here / "out")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
