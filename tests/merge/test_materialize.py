from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evomerge.errors import CandidateError, ConfigError, OutputExistsError
from evomerge.merge.materialize import materialize
from evomerge.recipe import Recipe, read_recipe, recipe_from_mapping
from evomerge.space import SearchSpace, SpaceConfig
from tests import tiny

MAKERS = {
    "llama": (tiny.llama, {"layers": 4, "chat": True}),
    "llama tied": (tiny.llama, {"layers": 4, "tied": True}),
    "llama float32": (tiny.llama, {"layers": 4, "dtype": torch.float32}),
    "qwen2": (tiny.qwen2, {"chat": True}),
    "qwen3": (tiny.qwen3, {"tied": False, "max_shard_size": "200KB"}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a sibling `expert` beside it."""
    directory = tmp_path_factory.mktemp("models") / "base"
    tiny.llama(directory, layers=4, hidden=64, chat=True)
    tiny.variant(directory, directory.with_name("expert"), seed=1)
    return directory


def task_arithmetic(base: Path, weight: float = 0.5, dtype: str = "bfloat16") -> Recipe:
    space = SearchSpace.build(
        SpaceConfig(layer_granularity=2),
        base_model=str(base),
        models=[str(base.with_name("expert"))],
        num_layers=4,
        dtype=dtype,
    )
    return space.decode(space.uniform(weight))


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_transformers_loads_the_model_that_the_formula_gives(kind: str, tmp_path: Path) -> None:
    make, arguments = MAKERS[kind]
    base = make(tmp_path / "base", **arguments)
    tuned = [tiny.variant(base, tmp_path / f"tuned{n}", seed=n) for n in (1, 2)]
    dtype = "float32" if "float32" in kind else "bfloat16"
    space = SearchSpace.build(
        SpaceConfig(),
        base_model=str(base),
        models=[str(t) for t in tuned],
        num_layers=4,
        dtype=dtype,
    )
    out = materialize(space.decode([0.75, -0.25]), tmp_path / "out", max_shard_size=300_000)

    sources = [tiny.read_tensors(directory) for directory in (base, *tuned)]
    model, told = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(told.values())
    loaded = dict(model.state_dict())
    written = tiny.read_tensors(out)
    assert written.keys() == sources[0].keys()
    for name, tensor in written.items():
        start, first, second = (source[name].float() for source in sources)
        merged = start + (0.75 * (first - start) + -0.25 * (second - start))
        assert torch.equal(tensor, merged.to(getattr(torch, dtype))), name
        assert torch.equal(loaded[name], tensor), name


def test_a_directory_is_complete(llama: Path, tmp_path: Path) -> None:
    recipe = task_arithmetic(llama)
    out = materialize(
        recipe, tmp_path / "out", max_shard_size=100_000, extra_files={"README.md": "# Ümlaut\n"}
    )
    shards = [file.name for file in out.glob("model-*.safetensors")]
    assert len(shards) > 2
    assert set(os.listdir(out)) == {
        *shards,
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "mergekit_config.yml",
        "README.md",
    }
    assert os.listdir(tmp_path) == ["out"]
    assert read_recipe(out / "mergekit_config.yml") == recipe
    assert (out / "README.md").read_text(encoding="utf-8") == "# Ümlaut\n"
    ours, bases = (AutoTokenizer.from_pretrained(directory) for directory in (out, llama))
    chat = [{"role": "user", "content": "Grüß dich"}]
    assert ours.apply_chat_template(chat) == bases.apply_chat_template(chat)
    assert GenerationConfig.from_pretrained(out) == GenerationConfig.from_pretrained(llama)


def test_a_missing_generation_config_is_made_from_the_config(llama: Path, tmp_path: Path) -> None:
    base = tiny.variant(llama, tmp_path / "base", seed=0, scale=0.0)
    tiny.variant(llama, tmp_path / "expert", seed=1)
    (base / "generation_config.json").unlink()
    out = materialize(task_arithmetic(base), tmp_path / "out")
    made = json.loads((out / "generation_config.json").read_text())
    assert made == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def test_all_weights_zero_give_back_the_base_model(llama: Path, tmp_path: Path) -> None:
    merged = tiny.read_tensors(materialize(task_arithmetic(llama, 0.0), tmp_path / "out"))
    for name, tensor in tiny.read_tensors(llama).items():
        assert torch.equal(merged[name], tensor), name


def test_weight_one_gives_the_expert(llama: Path, tmp_path: Path) -> None:
    merged = tiny.read_tensors(materialize(task_arithmetic(llama, 1.0), tmp_path / "out"))
    expert = tiny.read_tensors(llama.with_name("expert"))
    for name, tensor in expert.items():  # base + (expert - base), rounded once
        torch.testing.assert_close(merged[name], tensor, rtol=2**-8, atol=1e-7)


def test_a_passed_through_model_is_copied_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    expert = llama.with_name("expert")
    recipe = recipe_from_mapping(
        {"merge_method": "passthrough", "models": [{"model": str(expert)}]}, "made here"
    )
    merged = tiny.read_tensors(materialize(recipe, tmp_path / "out"))
    for name, tensor in tiny.read_tensors(expert).items():
        assert torch.equal(merged[name].view(torch.int16), tensor.view(torch.int16)), name


def test_shards_hold_the_same_numbers_as_one_file(llama: Path, tmp_path: Path) -> None:
    one = tiny.read_tensors(materialize(task_arithmetic(llama), tmp_path / "one"))
    many = tiny.read_tensors(
        materialize(task_arithmetic(llama), tmp_path / "many", max_shard_size=1)
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_deeper_stack_loads_and_generates(llama: Path, tmp_path: Path) -> None:
    layers = [{"model": str(llama), "layer_range": [0, 3]}]
    again = [{"model": str(llama), "layer_range": [1, 4]}]
    recipe = recipe_from_mapping(
        {"merge_method": "passthrough", "slices": [{"sources": layers}, {"sources": again}]},
        "made here",
    )
    model = AutoModelForCausalLM.from_pretrained(materialize(recipe, tmp_path / "out"))
    assert len(model.model.layers) == 6
    logits = model(torch.tensor([[1, 5, 9]])).logits
    assert logits.shape == (1, 3, 261)
    assert torch.isfinite(logits).all()


def spoiled(llama: Path, tmp_path: Path, value: float) -> Path:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    base = tiny.variant(llama, tmp_path / "base", seed=0, scale=0.0)
    tiny.rewrite(tiny.variant(llama, tmp_path / "expert", seed=1), spoil)
    return base


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_none_fail_the_candidate_and_leave_nothing(
    llama: Path, tmp_path: Path, value: float
) -> None:
    base = spoiled(llama, tmp_path, value)
    said = r"model\.layers\.2\.mlp\.up_proj\.weight: has NaN or infinite numbers"
    with pytest.raises(CandidateError, match=said):
        materialize(task_arithmetic(base, 1.9), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "expert"]


def test_an_existing_folder_is_kept_and_only_replaced_on_request(
    llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    materialize(task_arithmetic(llama, 0.5), out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        materialize(task_arithmetic(llama, 1.0), out)
    assert (out / "notes.txt").read_text() == "mine"
    materialize(task_arithmetic(llama, 1.0), out, overwrite=True)
    assert not (out / "notes.txt").exists()
    assert read_recipe(out / "mergekit_config.yml") == task_arithmetic(llama, 1.0)


def test_a_folder_that_holds_no_model_is_never_replaced(llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no model directory, so it is not replaced"):
        materialize(task_arithmetic(llama), home, overwrite=True)
    assert os.listdir(home) == ["letters.txt"]


def test_a_folder_that_is_taken_is_refused_before_any_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("1")
    recipe = task_arithmetic(tmp_path / "absent" / "base")
    with pytest.raises(OutputExistsError):
        materialize(recipe, tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no such model directory"):
        materialize(recipe, tmp_path / "other")


@pytest.mark.parametrize("place", ["base", "expert", ".", "base/merged"])
def test_an_input_is_never_replaced(llama: Path, tmp_path: Path, place: str) -> None:
    models = tmp_path / "models"
    models.mkdir()
    base = tiny.variant(llama, models / "base", seed=0, scale=0.0)
    tiny.variant(llama, models / "expert", seed=1)
    (models / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(models)
    for root in (models, tmp_path / "link"):
        out = root / place if place != "." else models
        with pytest.raises(ConfigError, match="goes into the merge"):
            materialize(task_arithmetic(base), out, overwrite=True)
    assert (base / "model.safetensors").is_file()


def test_a_folder_that_holds_the_files_of_an_input_is_never_replaced(
    llama: Path, tmp_path: Path
) -> None:
    base = tiny.variant(llama, tmp_path / "base", seed=0, scale=0.0)
    tiny.variant(llama, tmp_path / "expert", seed=1)
    stored = tmp_path / "stored"
    stored.mkdir()
    (base / "model.safetensors").rename(stored / "model.safetensors")
    (base / "model.safetensors").symlink_to(stored / "model.safetensors")
    (stored / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"base/model\.safetensors, which goes into the merge"):
        materialize(task_arithmetic(base), stored, overwrite=True)
    assert sorted(os.listdir(stored)) == ["config.json", "model.safetensors"]


def test_a_model_without_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    base = tiny.variant(llama, tmp_path / "base", seed=0, scale=0.0)
    tiny.variant(llama, tmp_path / "expert", seed=1)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=rf"{base}: this model has no tokenizer"):
        materialize(task_arithmetic(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_disk_cannot_hold_is_refused_before_the_work(
    llama: Path, tmp_path: Path
) -> None:
    huge = tiny.variant(llama, tmp_path / "huge", seed=0, scale=0.0)
    shape = [2**36, 64]  # 8.8 TB in a file without blocks
    header = {
        name: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        for name in tiny.read_tensors(llama)
    }
    header["model.embed_tokens.weight"] |= {"shape": shape, "data_offsets": [0, 2**43]}
    text = json.dumps(header).encode()
    with (huge / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + 2**43)
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of 8.8 TB: {error}")
    recipe = recipe_from_mapping(
        {"merge_method": "passthrough", "models": [{"model": str(huge)}]}, "made here"
    )
    with pytest.raises(ConfigError, match=r"the model needs 8796\.09 GB, but only .* GB are free"):
        materialize(recipe, tmp_path / "out")
    assert os.listdir(tmp_path) == ["huge"]
