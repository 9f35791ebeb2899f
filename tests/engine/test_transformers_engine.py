"""The transformers engine, in place, against transformers' own model loaded from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MambaConfig

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import Completion, GenerationSettings
from evomerge.engine.tokenizer import longest_context
from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.materialize import materialize
from evomerge.recipe import recipe_from_mapping
from tests import tiny
from tests.engine.conftest import PROMPTS, WRITERS, answers, make_family, start

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("kind", WRITERS)
def test_in_place_merges_equal_the_model_on_disk(kind: str, tmp_path: Path) -> None:
    family = make_family(kind, tmp_path)
    recipes = [family.recipe(seed) for seed in range(2)]
    states = []
    with family.open("transformers") as engine:
        for number in (0, 1, 0):
            assert engine.load(recipes[number]).how == "live"
            scored = engine.log_probabilities(PROMPTS, add_special_tokens=True)
            states.append((answers(engine), scored))
    assert states[0] == states[2] != states[1]
    materialize(recipes[0], tmp_path / "merged")
    with start("transformers", tmp_path / "merged", []) as fresh:
        scored = fresh.log_probabilities(PROMPTS, add_special_tokens=True)
        assert (answers(fresh), scored) == states[0]


def test_a_wider_parameter_is_rounded_as_it_is_on_disk(tmp_path: Path) -> None:
    """Without a dtype in the recipe each tensor keeps its own, and the engine's may be wider."""

    def widen_norms(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: v.float() for k, v in tensors.items() if "norm" in k})

    base = tiny.llama(tmp_path / "base", layers=2, hidden=64)
    tuned = tiny.rewrite(tiny.variant(base, tmp_path / "tuned", seed=1), widen_norms)
    tiny.rewrite(base, widen_norms)
    models = [{"model": str(tuned), "parameters": {"weight": 0.3}}]
    mapping = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    recipe = recipe_from_mapping(mapping, "test")
    materialize(recipe, tmp_path / "merged")
    config = EngineConfig(model=str(base), sources=(str(tuned),), dtype="float32")
    with open_engine("transformers", config) as engine:
        assert isinstance(engine, TransformersEngine)
        assert engine.load(recipe).how == "live"
        live = dict(engine.model.named_parameters())
        on_disk = tiny.read_tensors(tmp_path / "merged")
        assert {tensor.dtype for tensor in on_disk.values()} == {torch.bfloat16, torch.float32}
        for name, tensor in on_disk.items():
            assert torch.equal(live[name].data, tensor.float()), name


def test_another_layer_count_is_loaded_from_disk(tmp_path: Path) -> None:
    family = make_family("llama", tmp_path)
    sources = [{"sources": [{"model": str(family.base), "layer_range": [0, 2]}]}] * 3
    mapping = {"merge_method": "passthrough", "slices": sources, "dtype": "bfloat16"}
    recipe = recipe_from_mapping(mapping, "test")
    with start("transformers", family.base, [], scratch=tmp_path / "scratch") as engine:
        assert engine.supports(recipe) is not None
        assert engine.load(recipe).how == "disk"
        assert len(answers(engine)) == len(PROMPTS)


def test_a_candidate_with_its_own_tokenizer_reads_and_writes_with_it(tmp_path: Path) -> None:
    one = tiny.llama(tmp_path / "one", layers=2, chat=True)
    other = tiny.llama(tmp_path / "other", layers=2, vocabulary=262, seed=1, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|end|>"
    tokenizer.save_pretrained(other)
    mapping = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in (one, other)],
        "tokenizer_source": str(other),
        "dtype": "bfloat16",
    }
    recipe = recipe_from_mapping(mapping, "test")
    plain = recipe_from_mapping(
        {"merge_method": "passthrough", "models": [{"model": str(one)}]}, ""
    )
    templated = recipe_from_mapping(plain.to_mapping() | {"chat_template": "chatml"}, "test")
    chat = [{"role": "user", "content": "Hi"}]
    with start("transformers", one, [str(other)], scratch=tmp_path / "scratch") as engine:
        before, served = engine.render(chat), answers(engine)
        assert "tokenizer" in str(engine.supports(recipe))
        assert engine.load(recipe).how == "disk"
        assert engine.render(chat) == "Hi<|end|>"
        assert engine.count_tokens("Hi<|end|>", add_special_tokens=False) == 3
        merged = answers(engine)
        assert engine.load(templated).how == "disk"
        assert engine.render(chat).startswith("<|im_start|>user")
        assert engine.load(plain).how == "live"
        assert engine.render(chat) == before != "Hi<|end|>"
        assert engine.count_tokens("Hi<|end|>", add_special_tokens=False) > 3
        assert answers(engine) == served
    materialize(recipe, tmp_path / "merged")
    with start("transformers", tmp_path / "merged", []) as fresh:
        assert answers(fresh) == merged


def test_stop_strings_end_an_answer_and_are_not_in_it(tmp_path: Path) -> None:
    family = make_family("llama", tmp_path)
    with family.open("transformers") as engine:
        whole = engine.generate(PROMPTS[:1], GenerationSettings(12), add_special_tokens=True)[0]
        stop = whole.text[3:5]
        settings = GenerationSettings(12, stop=(stop,))
        cut = engine.generate(PROMPTS[:1], settings, add_special_tokens=True)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_batch_is_told_before_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.engine.transformers_engine.BATCH", 2)
    family = make_family("llama", tmp_path)
    events: list[object] = []
    odd, even = GenerationSettings(4), GenerationSettings(5)
    settings = [odd if place % 2 else even for place in range(len(PROMPTS))]
    with family.open("transformers") as engine:
        assert isinstance(engine, TransformersEngine)
        whole = engine.generate(PROMPTS, settings, add_special_tokens=True)
        write = engine._generate_batch

        def watched(prompts: list[list[int]], alike: GenerationSettings) -> list[Completion]:
            events.append("written")
            return write(prompts, alike)

        monkeypatch.setattr(engine, "_generate_batch", watched)

        def tell(place: int, completion: Completion) -> None:
            assert completion == whole[place]
            events.append(place)

        assert engine.generate(PROMPTS, settings, add_special_tokens=True, each=tell) == whole
    evens, odds = ["written", 0, 2, "written", 4, 6], ["written", 1, 3, "written", 5, 7]
    assert events == [*evens, *odds]


def test_nan_fails_the_candidate(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", layers=4)
    broken = tiny.variant(base, tmp_path / "broken", seed=1)
    tiny.rewrite(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    mapping = {"merge_method": "passthrough", "models": [{"model": str(broken)}]}
    with start("transformers", base, [str(broken)]) as engine:
        with pytest.raises(CandidateError, match=r"model\.norm\.weight"):
            engine.load(recipe_from_mapping(mapping, "test"))
        with pytest.raises(CandidateError, match="logits are NaN"):
            answers(engine)


def test_unknown_engines_and_options_are_named(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", layers=2)
    with pytest.raises(ConfigError, match=r"'sglang'.*'vllm' and 'transformers'"):
        open_engine("sglang", EngineConfig(str(base), ()))
    with pytest.raises(ConfigError, match=r"block_size.*max_model_len"):
        start("transformers", base, [], block_size=16)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_the_context_allowed_is_the_models_own_whatever_its_config_calls_it(
    tmp_path: Path, kind: str
) -> None:
    config = GPT2Config(n_positions=77, n_layer=1, n_embd=32, n_head=2, vocab_size=261)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    engine = EngineConfig(str(tmp_path), (), load="disk", scratch=str(tmp_path / "scratch"))
    with open_engine(kind, engine) as opened:  # vLLM starts with the first candidate only
        assert opened.max_model_len == 77


def test_a_config_that_says_nothing_of_the_context_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^a/model: .*how long a context may be; give it by"):
        longest_context(MambaConfig(), "a/model")
