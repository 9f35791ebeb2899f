"""The same live merges with vLLM in a process of its own, on two ranks, and behind HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.planning import ASK_WORKERS, update_message
from evomerge.engine.vllm_engine import VLLMEngine
from evomerge.errors import CandidateError, ConfigError, EngineDiedError
from evomerge.merge.materialize import materialize
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import tiny
from tests.engine.conftest import (
    OPTIONS,
    SETTINGS,
    Family,
    answers_as_told,
    answers_one_by_one,
    overflowing,
    start,
)

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_in_processes_of_their_own_are_the_model_on_disk(
    ranks: int, family: Family, tmp_path: Path
) -> None:
    recipes = [family.recipe(seed) for seed in range(2)]
    broken = tiny.variant(family.base, tmp_path / "broken", seed=3)
    tiny.rewrite(broken, _put_a_nan_into_the_last_rows)
    sources = [str(path) for path in (*family.tuned, broken)]
    options = {"repeatable": False, "tensor_parallel_size": ranks}
    with start("vllm", family.base, sources, **options) as engine:
        assert isinstance(engine, VLLMEngine)
        states = []
        for number in (0, 1, 0):
            engine.load(recipes[number])
            states.append((engine.parameter_checksums(), answers_one_by_one(engine)))
        assert answers_as_told(engine) == states[0][1]
        if ranks == 2:
            _fail_on_the_second_rank_alone(engine, recipes[1], as_it_is(broken))
            engine.load(recipes[0])
            assert (engine.parameter_checksums(), answers_one_by_one(engine)) == states[0]
        if ranks == 1:
            _kill_children()
            with pytest.raises(EngineDiedError):
                answers_as_told(engine)
            with pytest.raises(EngineDiedError):
                answers_one_by_one(engine)
    assert states[0] == states[2] != states[1]
    assert len(states[0][0]) == ranks
    materialize(recipes[0], tmp_path / "merged")
    # One rank is the same model in this process, too, and its start takes a fifth of the time.
    options = {"repeatable": ranks == 1, "tensor_parallel_size": ranks}
    with start("vllm", tmp_path / "merged", [], **options) as fresh:
        assert isinstance(fresh, VLLMEngine)
        assert (fresh.parameter_checksums(), answers_one_by_one(fresh)) == states[0]


def _put_a_nan_into_the_last_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 5] = float("nan")  # the second rank has those


def as_it_is(model: Path) -> Recipe:
    mapping = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return recipe_from_mapping(mapping | {"dtype": "bfloat16"}, "test")


def _fail_on_the_second_rank_alone(engine: VLLMEngine, good: Recipe, broken: Recipe) -> None:
    """By numbers that only it has, and by a message that only it cannot take."""
    for _ in range(2):
        with pytest.raises(CandidateError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
            engine.load(broken)
        with pytest.raises(CandidateError, match="logits are NaN"):
            answers_one_by_one(engine)
    message = update_message(good, engine.plan(good), clear=False)
    engine._llm.start_weight_update()
    engine._llm.update_weights({"update_info": [message, message | {"digest": "another"}]})
    replies = engine._llm.collective_rpc(ASK_WORKERS)
    engine._llm.finish_weight_update()
    assert replies[0] is None
    assert "plans" in replies[1]["message"]


OWNER = """
import sys, time
from pathlib import Path
from tests.engine.conftest import start

if __name__ == "__main__":
    engine = start("vllm", Path(sys.argv[1]), [], repeatable=False)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_an_engine_ends_with_the_search_that_was_killed(family: Family, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen(
        [sys.executable, str(script), str(family.base)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert owner.stdout is not None
    assert any(line == "ready\n" for line in owner.stdout)
    engine = psutil.Process(owner.pid).children(recursive=True)
    assert engine
    owner.kill()
    owner.wait(30)
    owner.stdout.close()
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert alive == []


def _kill_children() -> None:
    """SIGKILL for every process that this one started and that still runs."""
    children = psutil.Process().children(recursive=True)
    assert children
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def server(family: Family) -> Iterator[str]:
    """The address of an ordinary vLLM server whose environment has evomerge installed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {
        "--model": str(family.base),
        "--dtype": "bfloat16",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--max-model-len": str(OPTIONS["max_model_len"]),
        "--kv-cache-memory-bytes": str(OPTIONS["kv_cache_memory_bytes"]),
        "--weight-transfer-config": json.dumps({"backend": "evomerge"}),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    process = subprocess.Popen(
        [*command, *(word for pair in arguments.items() for word in pair)],
        env=os.environ
        | {
            "VLLM_SERVER_DEV_MODE": "1",
            "EVOMERGE_MODELS": os.pathsep.join(map(str, family.tuned)),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
    )
    try:
        yield _ready(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str, process: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        assert process.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return url
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError("the server was not ready after five minutes")


def test_a_server_is_the_model_on_disk(server: str, family: Family, tmp_path: Path) -> None:
    sources = tuple(map(str, family.tuned))
    recipes = [family.recipe(seed) for seed in range(2)]
    states = []
    config = EngineConfig(str(family.base), sources, url=server)
    with open_engine("vllm", config) as engine:
        for number in (0, 1, 0):
            engine.load(recipes[number])
            states.append((_checksums(server), answers_one_by_one(engine)))
        assert answers_as_told(engine) == states[0][1]
        written = engine.generate(["One"], SETTINGS, add_special_tokens=True)
        assert written[0].version == engine.load(recipes[0]).version
        with pytest.raises(CandidateError, match="NaN or infinite"):
            engine.load(overflowing(family))
        with pytest.raises(CandidateError, match="logits are NaN"):
            answers_one_by_one(engine)
        engine.load(recipes[0])
        assert answers_one_by_one(engine) == states[0][1]
    assert states[0] == states[2] != states[1]
    materialize(recipes[0], tmp_path / "merged")
    with start("vllm", tmp_path / "merged", []) as fresh:
        assert isinstance(fresh, VLLMEngine)
        (checksums,) = fresh.parameter_checksums()
        assert list(states[0][0].values()) == list(checksums.values())
        assert answers_one_by_one(fresh) == states[0][1]


def _checksums(server: str) -> dict[str, str]:
    answer = httpx.post(f"{server}/weight_checker", json={"action": "checksum"}, timeout=60)
    checksums: dict[str, str] = answer.raise_for_status().json()["checksums"]
    return checksums


def test_a_server_opens_only_what_it_was_started_with(server: str, family: Family) -> None:
    sources = (*map(str, family.tuned), str(family.base.parent))
    answer = httpx.post(
        f"{server}/init_weight_transfer_engine",
        json={"init_info": {"models": list(sources)}},
        timeout=60,
    )
    # The route tells success, so that no rank of a server with several gets out of step.
    assert answer.is_success
    (reply,) = httpx.post(
        f"{server}/collective_rpc", json={"method": ASK_WORKERS}, timeout=60
    ).json()["results"]
    assert "no declared source" in reply["message"]
    config = EngineConfig(str(family.base), sources, url=server)
    with pytest.raises(ConfigError):
        open_engine("vllm", config)


def test_a_server_that_does_not_answer_is_one_clear_error(family: Family) -> None:
    config = EngineConfig(str(family.base), (), url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9.*VLLM_SERVER_DEV_MODE"):
        open_engine("vllm", config)
