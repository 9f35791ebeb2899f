"""Mixtures of experts in vLLM: the same answers as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.engine import Engine, EngineConfig, open_engine
from evomerge.merge.inputs import InputModels
from evomerge.moe_config import parse_moe_config
from evomerge.recipe import recipe_from_mapping
from evomerge.report.moe import build_moe
from tests import tiny
from tests.engine.conftest import OPTIONS, PROMPTS, answers

pytest.importorskip("vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

SHARED = "shared_experts: [{source_model: first}]"
KINDS = {
    "mixtral": (tiny.llama, ""),
    "deepseek": (tiny.llama, f"architecture: deepseek\n{SHARED}"),
    "qwen2": (tiny.qwen2, SHARED),
    "qwen3": (tiny.qwen3, ""),
}


def write_mixture(kind: str, folder: Path) -> Path:
    """Three experts, two of them for each token, in float32."""
    write, more = KINDS[kind]
    write(folder / "first", layers=2, dtype=torch.float32)
    tiny.variant(folder / "first", folder / "second", seed=1)
    experts = "[{source_model: first}, {source_model: second}, {source_model: third}]"
    tiny.variant(folder / "first", folder / "third", seed=2)
    text = f"base_model: first\ngate_mode: random\nexperts: {experts}\n{more}\n"
    inputs = InputModels(folder / "storage", folder=folder)
    return build_moe(parse_moe_config(text, "moe"), folder / "out", inputs, verbatim=text)


def serve(name: str, model: Path) -> Engine:
    """An engine with `model` as its own loader reads it from disk."""
    config = EngineConfig(
        model=str(model),
        sources=(str(model),),
        dtype="float32",
        load="disk",
        scratch=str(model.with_name("scratch")),
        threads=1,
        options=OPTIONS if name == "vllm" else {},
    )
    engine = open_engine(name, config)
    as_it_is = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    engine.load(recipe_from_mapping(as_it_is, "as it is"))
    return engine


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_mixture_answers_in_vllm_as_in_transformers(kind: str, tmp_path: Path) -> None:
    mixture = write_mixture(kind, tmp_path)
    found, expected = [], []
    for name, kept in (("transformers", expected), ("vllm", found)):
        with serve(name, mixture) as engine:
            kept.append(answers(engine))
            kept.append(engine.log_probabilities(PROMPTS, add_special_tokens=True))
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
