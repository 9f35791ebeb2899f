"""A judge that is a real language model behind vLLM's own server, over real HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sql
import torch
import yaml

from evomerge.cli import main
from evomerge.database import open_database
from evomerge.errors import ConfigError
from evomerge.evaluate.judge import Rubric, open_judge
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.local_judge import served
from evomerge.evaluate.task import GradeRequest, Task
from evomerge.schema import replies
from tests.evaluate import judge_server as faults
from tests.evaluate.judge_model import write_judge
from tests.evaluate.judge_server import Fault, ScriptedJudge, scripted

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"
RUBRIC: dict[str, Any] = {
    "prompt": "Grade {{ answer }}, which answers ?.",
    "low": 1,
    "high": 5,
}
LOCAL = {"reply_tokens": 64, "options": {**OPTIONS, "dtype": "float32", "max_num_seqs": 8}}


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "tiny-judge")


def write_study(folder: Path, judge: dict[str, Any]) -> Path:
    """The demo's models, whose words a judge can tell apart, as a short search with `judge`."""
    content = yaml.safe_load((DEMO / "demo.yaml").read_text())
    lines = (DEMO / "tasks.jsonl").read_text().splitlines()
    (folder / "tasks.jsonl").write_text("\n".join(lines[::10]) + "\n")
    content |= {
        "study": "judged",
        "base_model": str(DEMO / content["base_model"]),
        "models": [str(DEMO / model) for model in content["models"]],
        "sampler": content["sampler"] | {"population": 4},
        "budget": {"trials": 4},
        "engine": {"name": "transformers", "threads": 1},
        "suite": content["suite"] | {"scorer": "judge", "rubric": RUBRIC},
        "judge": judge,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_search_with_a_local_judge_runs_from_start_to_card(
    judge_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, {"local": str(judge_model), **LOCAL})
    storage = tmp_path / "storage"
    assert main(["search", str(study), "--storage", str(storage)]) == 0
    capsys.readouterr()
    assert main(["status", "judged", "--storage", str(storage), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "finished"
    assert all(1 <= trial["score"] <= 5 for trial in status["trials"])
    folder = storage / "studies" / "judged"
    assert "tiny-judge" in (folder / "report.md").read_text()
    assert (folder / "model" / "README.md").is_file()
    database = open_database(storage)
    with database.connect() as connection:
        rows = list(connection.execute(sql.select(replies)).mappings())
    database.dispose()
    assert len({row["grade"] for row in rows}) > 1
    # It keeps to the schema, and its whole reply is there.
    assert all(json.loads(row["reply"])["grade"] == row["grade"] for row in rows)
    assert {row["payer"] for row in rows} == {"judged"}
    assert all(row["prompt_tokens"] > 30 and row["completion_tokens"] > 10 for row in rows)
    assert _servers() == []


def test_faults_in_front_of_a_real_judge_change_no_grade(judge_model: Path, tmp_path: Path) -> None:
    server = judge_from_mapping({"local": str(judge_model), **LOCAL}, "study.yaml").first
    rubric = Rubric(RUBRIC["prompt"], 1, 5)
    tasks = [Task(str(number), "?", "", "all", "?") for number in range(12)]
    items = [GradeRequest(task, f"{number**7:x}", 0) for number, task in enumerate(tasks)]

    def grades(url: str, storage: Path) -> list[float | None]:
        config = judge_from_mapping(
            {
                "model": "judge",
                "base_url": url,
                "reply_tokens": 64,
                "timeout": 5.0,
                "concurrency": 4,
                "patience": 60.0,
            },
            "study.yaml",
        )
        with open_judge(
            config,
            rubric,
            open_database=lambda: open_database(storage),
            payer=None,
            folder=tmp_path,
            environment=os.environ,
            say=lambda line: None,
        ) as judge:
            return [one.grade for one in judge.grade_all(items).result(120)]

    with served(server, tmp_path, lambda line: None) as there:
        reached = there.server
        proxy = ScriptedJudge(upstream=reached.base_url)
        proxy.faults = [
            faults.BUSY,
            faults.BROKEN,
            faults.GARBAGE,
            faults.HALF_JSON,
            faults.HALF_BODY,
            faults.SILENCE,
            Fault(200, {}, json.dumps({"choices": []})),
        ]
        with scripted(proxy):
            found = grades(proxy.url, tmp_path / "behind")
        assert proxy.faults == []
        assert len(proxy.requests) == len(items) + 7
        assert found == grades(reached.base_url, tmp_path / "direct")
    assert None not in found
    assert len(set(found)) > 1


def test_a_judge_that_cannot_sleep_here_is_wrong_input(judge_model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    server = judge_from_mapping({"local": str(judge_model), "sleep": True, **LOCAL}, "x").first
    with (
        pytest.raises(ConfigError, match="judge: sleep: vLLM cannot give up memory on this"),
        served(server, tmp_path, lambda line: None),
    ):
        pass
    assert _servers() == []


def _servers() -> list[psutil.Process]:
    """vLLM servers that this process left behind; what has ended is none."""
    children = psutil.Process().children(recursive=True)
    running = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in running if any("api_server" in word for word in child.cmdline())]
