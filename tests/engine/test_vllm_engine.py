"""The live engine against a model loaded fresh from disk, with the real vLLM in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from evomerge.engine import Engine, EngineConfig
from evomerge.engine.base import Completion, GenerationSettings
from evomerge.engine.planning import ASK_WORKERS, failure_of
from evomerge.engine.vllm_engine import VLLMEngine
from evomerge.errors import CandidateError, EngineDiedError, EvomergeError
from evomerge.evaluate.evaluation import evaluation_of
from evomerge.evaluate.suite import SuiteConfig, check_prompt_lengths, load_suite
from evomerge.evaluate.task import TaskResult
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import PlanEntry
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
from evomerge.engine.vllm_backend import Destination, MergeBackend

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


def test_suites_of_likelihoods_and_of_the_harness_ask_the_candidate_that_is_live(
    engine_and_family: tuple[VLLMEngine, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from tests.evaluate.test_harness import CHOICE, OPTIONS, WRITTEN

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [
        {"input": prompt, "question": prompt, "output": f" {4 * number}", "options": OPTIONS,
         "label": number % 4}
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    for name in ("tasks.jsonl", "choice.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own").mkdir()
    for name, text in (("c.yaml", CHOICE), ("w.yaml", WRITTEN)):
        (tmp_path / "own" / name).write_text(text.replace("FOLDER", str(tmp_path)))
    tasks = [{"name": "tiny_choice"}, {"name": "tiny_written", "metric": "exact_match"}]
    suites = [
        {"data": "tasks.jsonl", "scorer": "reference_likelihood", "chat": False},
        {"harness": {"tasks": tasks, "include_path": "own", "num_fewshot": 1}},
    ]

    def results(engine: Engine, seed: int) -> list[TaskResult]:
        engine.load(family.recipe(seed))
        found = []
        for content in suites:
            config = SuiteConfig.model_validate(content, context={"trust_code": True})
            suite = load_suite(config, tmp_path)
            check_prompt_lengths(engine, suite, suite.tasks)
            ids = [task.id for task in suite.tasks]
            found += evaluation_of(engine, suite).begin(ids).result()
        return found

    engine, family = engine_and_family
    live = {seed: results(engine, seed) for seed in (0, 1, 0)}
    assert [len(some) for some in live.values()] == [24, 24]
    likely = {seed: [one.grade or 0.0 for one in some[:8]] for seed, some in live.items()}
    assert likely[0] != pytest.approx(likely[1], rel=0.05)
    with family.open("transformers") as other:
        theirs = results(other, 0)
    assert likely[0] == pytest.approx([one.grade or 0.0 for one in theirs[:8]], rel=0.05)
    assert [one.prompt for one in live[0]] == [one.prompt for one in theirs]
    # Both in bfloat16, and rounded on other paths: a near tie may go either way.
    pairs = list(zip(live[0][8:], theirs[8:], strict=True))
    assert sum(one.grade == another.grade for one, another in pairs) >= len(pairs) - 1
    assert {one.version for one in live[0]} == {engine.version}


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


def test_what_broken_weights_wrote_while_they_were_scored_reaches_nobody_else(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    before = answers(engine), log_probabilities(engine)
    with pytest.raises(CandidateError):
        engine.load(plain(family.base.with_name("broken")))
    with pytest.raises(CandidateError, match="logits are NaN"):
        log_probabilities(engine)
    engine.load(family.recipe(1))
    assert (answers(engine), log_probabilities(engine)) == before


def test_answers_sampled_with_a_seed_survive_more_prompts_than_a_step_has_room_for(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    prompts = [f"{number} " + "many words " * 20 for number in range(30)]  # > 4096 tokens
    assert sum(len(ids) for ids in engine.encode(prompts, add_special_tokens=True)) > 5000
    sampled = GenerationSettings(max_tokens=3, temperature=0.7, seed=5)
    written = [one.token_ids for one in engine.generate(prompts, sampled, add_special_tokens=True)]
    assert len(set(written)) > 1
    again = [one.token_ids for one in engine.generate(prompts, sampled, add_special_tokens=True)]
    assert again == written


class _EnoughError(Exception):
    """Whoever gets the answers wants no more of them."""


def test_answers_told_one_by_one_are_those_of_a_whole_call(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    lengths = [20, 3, 15, 6, 12, 1, 9, 18]
    settings = [GenerationSettings(max_tokens=n, temperature=0.7, seed=n) for n in lengths]
    whole = engine.generate(PROMPTS, settings, add_special_tokens=True)
    told: list[tuple[int, Completion]] = []

    def tell(place: int, completion: Completion) -> None:
        told.append((place, completion))

    again = engine.generate(PROMPTS, settings, add_special_tokens=True, each=tell)
    assert again == whole
    assert sorted(told, key=lambda one: one[0]) == list(enumerate(whole))
    # As they were finished: the shorter ones first.
    assert [place for place, _ in told] != list(range(len(PROMPTS)))
    assert engine.generate(PROMPTS, settings, add_special_tokens=True) == whole


def test_a_call_that_is_ended_midway_leaves_nothing_in_the_engine(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(2))
    second = answers(engine)
    engine.load(family.recipe(1))
    first = answers(engine)
    settings = [GenerationSettings(max_tokens=2 + 5 * place) for place in range(len(PROMPTS))]

    def enough(place: int, completion: Completion) -> None:
        raise _EnoughError

    with pytest.raises(_EnoughError):
        engine.generate(PROMPTS, settings, add_special_tokens=True, each=enough)
    assert answers(engine) == first
    with pytest.raises(_EnoughError):
        engine.generate(PROMPTS, settings, add_special_tokens=True, each=enough)
    engine.load(family.recipe(2))
    assert answers(engine) == second


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
    assert "no declared source" in str(sent(engine, message))


def test_a_worker_whose_plan_differs_refuses(
    engine_and_family: tuple[VLLMEngine, Family],
) -> None:
    engine, family = engine_and_family
    message = {"recipe": family.recipe(1).to_mapping(), "digest": "something else"}
    failure = sent(engine, message)
    assert isinstance(failure, EngineDiedError)  # started again it reads its sources again
    assert "a source model changed" in str(failure)


def sent(engine: VLLMEngine, message: dict[str, object]) -> EvomergeError | None:
    """What the workers say of a message, in a session of its own."""
    engine._llm.start_weight_update()
    engine._llm.update_weights({"update_info": message})
    engine._llm.finish_weight_update()
    return failure_of(engine._llm.collective_rpc(ASK_WORKERS))


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError("no room"), CandidateError), (KeyError("x"), EngineDiedError)]
)
def test_an_error_in_the_middle_of_a_switch_is_told_and_leaves_an_engine(
    engine_and_family: tuple[VLLMEngine, Family],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[EvomergeError],
) -> None:
    engine, family = engine_and_family
    engine.load(family.recipe(1))
    before = answers(engine)
    with monkeypatch.context() as patched:
        fail_at(patched, 3, error)
        with pytest.raises(kind, match=type(error).__name__):
            engine.load(family.recipe(2))
        with pytest.raises(EvomergeError):
            answers(engine)
    engine.load(family.recipe(1))
    assert answers(engine) == before


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Every switch of an engine in this process fails at so many of its tensors, counted from 0."""
    fill, calls = MergeBackend._fill, itertools.count()

    def failing(backend: MergeBackend, place: Destination, entry: PlanEntry) -> bool:
        if next(calls) == number:
            raise error
        return fill(backend, place, entry)

    monkeypatch.setattr(MergeBackend, "_fill", failing)


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
def test_mixtures_of_experts_are_merged_live(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 48 inner units: the experts' kernel pads them to 64.
    base = decoders.write(tmp_path / "base", kind, hidden_size=128, head_dim=64)
    tuned = tiny.variant(base, tmp_path / "tuned", seed=1)
    broken = tiny.variant(base, tmp_path / "broken", seed=2)
    tiny.rewrite(broken, _put_nan_into_an_expert)
    mapping = {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": {"t": [0.2, 0.8]},
        "dtype": "float32",
    }
    recipe = recipe_from_mapping(mapping, "test")
    with in_float32(base, [tuned, broken], tmp_path / "scratch") as engine:
        states = []
        for candidate in (plain(base, "float32"), recipe, plain(tuned, "float32"), recipe):
            assert engine.load(candidate).how == "live"
            states.append(log_probabilities(engine))
        # Neither a switch that fails among the experts nor one that is not finite leaves a trace.
        failures: list[tuple[Recipe, Exception | None]]
        failures = [(recipe, MemoryError("no room")), (plain(broken, "float32"), None)]
        for failing, error in failures:
            with monkeypatch.context() as patched:
                if error is not None:
                    fail_at(patched, 12, error)
                with pytest.raises(CandidateError):
                    engine.load(failing)
            engine.load(recipe)
            assert log_probabilities(engine) == states[1]
    assert states[1] == states[3]
    # The experts' kernels on CPUs compute with packed copies, which a write does not reach: only an
    # engine without anything of ours in it shows whether they are the right ones.
    with in_float32(base, [tuned], tmp_path / "scratch", load="disk") as untouched:
        for candidate, live in ((recipe, states[1]), (plain(tuned, "float32"), states[2])):
            assert untouched.load(candidate).how == "disk"
            for ours, theirs in zip(live, log_probabilities(untouched), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
    assert states[1][0] != pytest.approx(states[2][0], abs=1e-2)


def _put_nan_into_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in sorted(tensors) if "experts" in name)
    tensors[name].view(-1)[7] = float("nan")


def in_float32(
    base: Path, sources: list[Path], scratch: Path, load: Literal["live", "disk"] = "live"
) -> VLLMEngine:
    return VLLMEngine(
        EngineConfig(
            model=str(base),
            sources=tuple(map(str, sources)),
            dtype="float32",
            load=load,
            threads=1,
            scratch=str(scratch),
            options=OPTIONS | {"max_model_len": 64},
        )
    )
