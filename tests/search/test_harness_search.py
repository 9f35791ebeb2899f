"""A search whose objective are tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.search.evaluator import Evaluators
from evomerge.search.loop import run_search
from evomerge.search.study import read_study

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_a_mergekit_evolve_file_is_searched_on_its_own_tasks(
    models: Path,
    study_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [
        {"question": f"{n} + {n} =", "options": ["0", "7", "x", "?"], "label": n % 4}
        for n in range(12)
    ]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.replace("DATA", str(data)))
    harness = {"tasks": [{"name": "tiny_choice", "metric": "acc,none"}], "include_path": "tasks"}
    path = study_file(suite={"harness": harness}, budget={"trials": 6})
    config = read_study(str(path), trust_code=True)
    with Evaluators() as evaluators:
        outcome = run_search(config, storage=tmp_path / "storage", open_evaluator=evaluators.open)
    status = dict(outcome.status)
    assert status["state"] == "finished"
    assert all(0 <= trial["score"] <= 1 for trial in status["trials"])
    assert "  | 0 + 0 =" in capsys.readouterr().err
