"""The live engine against a model loaded fresh from disk, with the real vLLM in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from evomerge.engine import EngineConfig
from evomerge.engine.vllm_engine import VLLMEngine
from evomerge.errors import CandidateError, EvomergeError
from evomerge.merge.materialize import materialize
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import tiny
from tests.engine.conftest import (
    OPTIONS,
    PROMPTS,
    SETTINGS,
    WRITERS,
    Family,
    answers,
    completions,
    make_family,
    overflowing,
    start,
)
from tests.merge import decoders

pytest.importorskip("vllm")
# vLLM and what it imports warn of their own deprecations.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


def plain(model: Path, dtype: str = "bfloat16") -> Recipe:
    """The recipe of one whole model as it is."""
    mapping = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return recipe_from_mapping(mapping | {"dtype": dtype}, "test")


@pytest.mark.parametrize("kind", WRITERS)
def test_the_live_engine_is_the_model_that_lands_on_disk(kind: str, tmp_path: Path) -> None:
    family = make_family(kind, tmp_path)
    recipes = [family.recipe(seed) for seed in range(3)]
    seen: dict[int, object] = {}
    with family.open() as engine:
        assert isinstance(engine, VLLMEngine)
        for number in (0, 1, 0, 2, 1, 0):
            assert engine.load(recipes[number]).how == "live"
            now = (answers(engine), log_probabilities(engine), engine.parameter_checksums())
            assert seen.setdefault(number, now) == now, f"switching back to {number} left a residue"
    assert len({str(state) for state in seen.values()}) == 3
    materialize(recipes[0], tmp_path / "merged")
    with start("vllm", tmp_path / "merged", []) as fresh:
        assert isinstance(fresh, VLLMEngine)
        state = (answers(fresh), log_probabilities(fresh), fresh.parameter_checksums())
    assert state == seen[0]


def log_probabilities(engine: VLLMEngine) -> list[list[float]]:
    return engine.log_probabilities(PROMPTS, add_special_tokens=True)


@pytest.fixture(scope="module")
def engine_and_family(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[VLLMEngine, Family]:
    family = make_family("tied llama", tmp_path_factory.mktemp("shared"))
    broken = tiny.variant(family.base, family.base.with_name("broken"), seed=3)
    tiny.rewrite(broken, _put_a_nan)
    sources = [*map(str, family.tuned), str(broken)]
    engine = start("vllm", family.base, sources, scratch=family.base.with_name("scratch"))
    assert isinstance(engine, VLLMEngine)
    return engine, family


def _put_a_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")


def test_every_answer_bears_the_version_of_its_candidate(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    first = engine.load(family.recipe(1)).version
    assert {answer.version for answer in completions(engine)} == {first}
    second = engine.load(family.recipe(2)).version
    assert second != first
    assert {answer.version for answer in completions(engine)} == {second}


def test_a_switch_drops_what_the_previous_candidate_cached(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    long = ["one and the same beginning " * 6 + prompt for prompt in PROMPTS]  # > 1 cache block

    def answer() -> list[tuple[int, ...]]:
        written = engine.generate(long, SETTINGS, add_special_tokens=True)
        return [completion.token_ids for completion in written]

    engine.load(family.recipe(1))
    answer()
    engine.load(family.recipe(2))
    after_another = answer()
    engine._llm.reset_prefix_cache()
    assert answer() == after_another


def test_nan_in_a_source_fails_the_candidate_and_not_the_engine(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    before = answers(engine)
    with pytest.raises(CandidateError, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        engine.load(plain(family.base.with_name("broken")))
    # Whoever asks all the same gets no answer, and what the broken weights wrote into the cache
    # does not reach the next candidate.
    with pytest.raises(CandidateError, match="logits are NaN"):
        answers(engine)
    engine.load(family.recipe(1))
    assert answers(engine) == before


def test_no_answer_of_a_switch_that_failed_is_believed(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    with pytest.raises(CandidateError):
        engine.load(overflowing(family))
    with pytest.raises(EvomergeError):
        answers(engine)


def test_weights_that_overflow_fail_the_candidate(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    with pytest.raises(CandidateError, match="NaN or infinite"):
        engine.load(overflowing(family))


def test_a_message_cannot_open_what_was_not_declared(
    engine_and_family: tuple[VLLMEngine, Family], tmp_path: Path
) -> None:
    engine, family = engine_and_family
    other = tiny.llama(tmp_path / "other", layers=4, tied=True)
    message = {"recipe": plain(other).to_mapping(), "digest": "0"}
    engine.load(family.recipe(1))
    engine._llm.start_weight_update()
    with pytest.raises(EvomergeError, match="no declared source"):
        engine._llm.update_weights({"update_info": message})


def test_a_worker_whose_plan_differs_refuses(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    message = {"recipe": family.recipe(1).to_mapping(), "digest": "something else"}
    engine._llm.start_weight_update()
    with pytest.raises(EvomergeError, match="a source model changed"):
        engine._llm.update_weights({"update_info": message})


def test_a_recipe_with_another_layer_count_is_loaded_from_disk(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family  # the last test with it: it becomes an engine from disk
    sources = [{"sources": [{"model": str(family.base), "layer_range": [0, 3]}]}] * 2
    mapping = {"merge_method": "passthrough", "slices": sources, "dtype": "bfloat16"}
    recipe = recipe_from_mapping(mapping, "test")
    assert "model.layers.4" in str(engine.supports(recipe))
    loaded = engine.load(recipe)
    assert loaded.how == "disk"
    assert {answer.version for answer in completions(engine)} == {loaded.version}
    own = recipe_from_mapping(mapping | {"tokenizer": {"tokens": {"<|im_start|>": {}}}}, "test")
    assert engine.count_tokens("<|im_start|>", add_special_tokens=False) == 12
    assert engine.load(own).how == "disk"
    assert engine.count_tokens("<|im_start|>", add_special_tokens=False) == 1
    assert len(completions(engine)) == len(PROMPTS)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_merged_live(kind: str, tmp_path: Path) -> None:
    # 48 inner units: the experts' kernel pads them to 64.
    base = decoders.write(tmp_path / "base", kind, hidden_size=128, head_dim=64)
    tuned = tiny.variant(base, tmp_path / "tuned", seed=1)
    mapping = {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": {"t": [0.2, 0.8]},
        "dtype": "float32",
    }
    recipe = recipe_from_mapping(mapping, "test")
    with in_float32(base, tuned, tmp_path / "scratch") as engine:
        states = []
        for candidate in (plain(base, "float32"), recipe, plain(tuned, "float32"), recipe):
            assert engine.load(candidate).how == "live"
            states.append(log_probabilities(engine))
    assert states[1] == states[3]
    # The experts' kernels on CPUs compute with packed copies, which a write does not reach: only an
    # engine without anything of ours in it shows whether they are the right ones.
    with in_float32(base, tuned, tmp_path / "scratch", load="disk") as untouched:
        for candidate, live in ((recipe, states[1]), (plain(tuned, "float32"), states[2])):
            assert untouched.load(candidate).how == "disk"
            for ours, theirs in zip(live, log_probabilities(untouched), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
    assert states[1][0] != pytest.approx(states[2][0], abs=1e-2)


def in_float32(
    base: Path, tuned: Path, scratch: Path, load: Literal["live", "disk"] = "live"
) -> VLLMEngine:
    return VLLMEngine(
        EngineConfig(
            model=str(base),
            sources=(str(tuned),),
            dtype="float32",
            load=load,
            threads=1,
            scratch=str(scratch),
            options=OPTIONS | {"max_model_len": 64},
        )
    )
