"""Models with different tokenizers in one merge: rows, ids, padding, and the same from mergekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.cli import main
from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.kernels import merged_tensors
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import MergePlan, make_plan, open_checkpoints, tokenizer_notes
from evomerge.merge.vocabulary import Vocabulary, build_vocabulary
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import tiny
from tests.golden.vocabularies import (
    EMBEDDINGS,
    MODELS,
    RECIPES,
    recipes,
    write_model,
    write_models,
    write_tokenizer,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EMBEDDING, HEAD = EMBEDDINGS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("vocabularies"))


def recipe_of(folders: dict[str, str], *models: str, **keys: object) -> Recipe:
    """A linear merge of `models` in equal parts; the names in `keys` are names of models."""
    parts = [{"model": name, "parameters": {"weight": 1.0}} for name in models]
    mapping = {"merge_method": "linear", "models": parts, "dtype": "float32", **keys}
    return recipe_from_mapping(mapping, "test").with_models(folders)


def planned(recipe: Recipe) -> tuple[MergePlan, dict[str, Checkpoint]]:
    checkpoints = open_checkpoints(recipe)
    return make_plan(recipe, checkpoints), checkpoints


def vocabulary_of(recipe: Recipe) -> Vocabulary:
    vocabulary = build_vocabulary(recipe, open_checkpoints(recipe))
    assert vocabulary is not None
    return vocabulary


def merged(recipe: Recipe) -> tuple[dict[str, Tensor], tuple[str | None, ...]]:
    plan, checkpoints = planned(recipe)
    assert plan.vocabulary is not None
    return dict(merged_tensors(plan, checkpoints)), plan.vocabulary.tokens


def rows_of(folder: str, tensor: str = EMBEDDING) -> dict[str, Tensor]:
    """The rows of a model by token, read from its files alone."""
    ids = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"]
    numbers = load_file(Path(folder) / "model.safetensors")[tensor].float()
    return {token: numbers[index] for token, index in ids.items()}


def merged_rows(recipe: Recipe, tensor: str = EMBEDDING) -> dict[str | None, Tensor]:
    tensors, tokens = merged(recipe)
    return {token: tensors[tensor][index] for index, token in enumerate(tokens)}


@pytest.mark.parametrize("name", sorted(recipes()))
def test_rows_are_those_that_mergekit_writes(name: str, folders: dict[str, str]) -> None:
    facts = json.loads((GOLDEN / "vocabularies.json").read_text())[name]
    theirs = load_file(GOLDEN / "vocabularies.safetensors")
    tensors, tokens = merged(recipes()[name].with_models(folders))
    assert set(tokens) == set(facts["tokens"])
    for tensor in EMBEDDINGS:
        expected = theirs[f"{name}/{tensor}"]
        assert tensors[tensor].shape == expected.shape == (facts["vocab_size"], 8)
        in_order = expected[[facts["tokens"][token] for token in tokens]]
        torch.testing.assert_close(tensors[tensor][: len(tokens)], in_order, rtol=0, atol=1e-6)
        padding = slice(len(tokens), None)
        torch.testing.assert_close(tensors[tensor][padding], expected[padding], rtol=0, atol=1e-6)


def test_a_union_goes_on_after_the_first_models_ids_in_the_order_of_the_models(
    folders: dict[str, str],
) -> None:
    vocabulary = vocabulary_of(
        recipe_of(folders, "first", "second", "third", tokenizer_source="union")
    )
    first = ["<s>", "</s>", "a", "b", "c", "d", "ab", "abc"]
    assert vocabulary.tokens == (*first, "e", "cd", "ce", "<pad>", "<|end|>")
    assert vocabulary.size == 13
    assert vocabulary.rows[folders["second"]].tolist() == [1, 2, 7, 6, 5, 4, 10, -1, 8, 9, -1, 0, 3]


def test_a_token_that_models_lack_is_the_only_row_or_the_mean_of_those_that_have_it(
    folders: dict[str, str],
) -> None:
    rows = merged_rows(recipe_of(folders, "first", "second", "third", tokenizer_source="union"))
    first, second, third = (rows_of(folders[name]) for name in ("first", "second", "third"))
    assert torch.equal(rows["cd"], second["cd"])
    assert torch.equal(rows["ce"], third["ce"])
    torch.testing.assert_close(rows["e"], (second["e"] + third["e"]) / 2, rtol=0, atol=1e-7)
    torch.testing.assert_close(rows["abc"], (first["abc"] + third["abc"]) / 2, rtol=0, atol=1e-7)
    every = (first["a"] + second["a"] + third["a"]) / 3
    torch.testing.assert_close(rows["a"], every, rtol=0, atol=1e-7)


def test_a_token_that_the_base_has_gets_the_bases_row_in_all_others(
    folders: dict[str, str],
) -> None:
    recipe = recipe_of(
        folders, "second", "third", base_model="first", tokenizer_source="union"
    ).model_copy(update={"merge_method": "task_arithmetic"})
    rows, base, third = merged_rows(recipe), rows_of(folders["first"]), rows_of(folders["third"])
    # `second` has no abc: its delta there is 0, and only that of `third` is left.
    torch.testing.assert_close(rows["abc"], third["abc"], rtol=0, atol=1e-7)
    second = rows_of(folders["second"])
    torch.testing.assert_close(rows["d"], second["d"], rtol=0, atol=1e-7)
    assert not torch.equal(base["d"], second["d"])


def test_unused_rows_of_the_inputs_are_gone(tmp_path: Path, folders: dict[str, str]) -> None:
    recipe = recipe_of(folders, "first", "third", tokenizer_source="base")
    plan, checkpoints = planned(recipe)
    assert checkpoints[folders["first"]].tensors[EMBEDDING].shape == (11, 8)
    shapes = {entry.name: entry.shape for entry in plan.entries}
    assert shapes[EMBEDDING] == shapes[HEAD] == (8, 8)
    assert plan.config["vocab_size"] == 8
    materialize(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape == (8, 8)


def test_added_rows_are_the_mean_of_all_others(folders: dict[str, str]) -> None:
    recipe = recipe_of(
        folders, "first", "second", tokenizer={"source": "union", "pad_to_multiple_of": 16}
    )
    tensors, tokens = merged(recipe)
    for tensor in EMBEDDINGS:
        numbers = tensors[tensor]
        assert numbers.shape == (16, 8)
        mean = numbers[: len(tokens)].mean(0)
        torch.testing.assert_close(numbers[len(tokens) :], mean.expand(4, 8), rtol=0, atol=1e-6)


def choices(**tokens: dict[str, object]) -> dict[str, object]:
    return {"source": "union", "tokens": tokens}


def test_the_source_of_a_token_fills_gaps_and_forced_replaces_all(folders: dict[str, str]) -> None:
    first, second, third = (rows_of(folders[name]) for name in ("first", "second", "third"))
    rows = merged_rows(
        recipe_of(
            folders,
            *("first", "second", "third"),
            tokenizer=choices(
                ab={"source": "second", "force": True},
                abc={"source": "third"},
                cd={"source": {"kind": "model_token", "model": "third", "token": "ce"}},
                ce={"source": {"kind": "zero"}},
                e={"source": {"kind": "zero"}, "force": True},
                d={"source": {"kind": "model_token", "model": "first", "token_id": 9}},
            ),
        )
    )
    assert torch.equal(rows["ab"], second["ab"])
    torch.testing.assert_close(
        rows["abc"], (first["abc"] + 2 * third["abc"]) / 3, rtol=0, atol=1e-7
    )
    torch.testing.assert_close(rows["cd"], (2 * third["ce"] + second["cd"]) / 3, rtol=0, atol=1e-7)
    torch.testing.assert_close(rows["ce"], third["ce"] / 3, rtol=0, atol=1e-7)
    assert torch.equal(rows["e"], torch.zeros(8))
    padding = load_file(Path(folders["first"]) / "model.safetensors")[EMBEDDING][9].float()
    torch.testing.assert_close(
        rows["d"], (first["d"] + second["d"] + padding) / 3, rtol=0, atol=1e-7
    )


def test_a_new_token_beside_the_bases_tokenizer_gets_its_source(folders: dict[str, str]) -> None:
    # mergekit takes an unused row of the base for it, whatever the source says, or fails.
    tokenizer = {
        "source": "base",
        "tokens": {
            "<new>": {"source": {"kind": "zero"}},
            "<|end|>": {"source": "second"},
            "<plain>": {},
        },
    }
    rows = merged_rows(recipe_of(folders, "first", "second", tokenizer=tokenizer))
    assert list(rows)[8:] == ["<new>", "<|end|>", "<plain>"]
    assert torch.equal(rows["<new>"], torch.zeros(8))
    assert torch.equal(rows["<|end|>"], rows_of(folders["second"])["<|end|>"])
    assert torch.equal(rows["<plain>"], torch.zeros(8))


def test_a_new_token_has_the_flags_that_a_model_gives_it(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    tokenizer = {"source": "base", "tokens": {"<|end|>": {"source": "second"}, "<new>": {}}}
    materialize(recipe_of(folders, "first", "second", tokenizer=tokenizer), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    flags = {token.content: token.special for token in loaded.added_tokens_decoder.values()}
    assert flags == {"<s>": True, "</s>": True, "<|end|>": True, "<new>": False}
    assert loaded("ab<new>c<|end|>")["input_ids"] == [6, 9, 4, 8]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"ab": {"source": "outside"}}, "tokens: ab: source: .*outside is not merged"),
        ({"cd": {"source": "first"}}, "tokens: cd: source: .*first has no token 'cd' either"),
        ({"cd": {"force": True}}, "tokens: cd: force: true needs a source"),
        (
            {"cd": {"source": {"kind": "model_token", "model": "first", "token_id": 11}}},
            "tokens: cd: token_id: 11 is beyond .*first's 11 rows",
        ),
        (
            {"cd": {"source": {"kind": "model_token", "model": "first", "token": "xy"}}},
            "first has no token 'xy'",
        ),
    ],
)
def test_a_token_without_a_row_to_take_is_refused(
    tokens: dict[str, object], message: str, folders: dict[str, str]
) -> None:
    tokenizer = {"source": "union", "tokens": tokens}
    recipe = recipe_of(folders, "first", "second", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=message):
        planned(recipe)


def test_a_source_that_is_no_source_of_the_embeddings_is_refused(folders: dict[str, str]) -> None:
    parts = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("first", "second")]
    mapping = {
        "merge_method": "passthrough",
        "slices": parts,
        "tokenizer": {"tokens": {"cd": {"source": "second"}}},
    }
    recipe = recipe_from_mapping(mapping, "test").with_models(folders)
    with pytest.raises(ConfigError, match=r"cd: source: .*second does not go into model\.embed"):
        planned(recipe)


def test_tied_models_have_their_embeddings_aligned_once_and_for_an_untied_head_again(
    tmp_path: Path,
) -> None:
    tied = {name: str(write_model(tmp_path / name, name, tied=True)) for name in MODELS}
    recipe = recipe_of(tied, "first", "second", tokenizer_source="union")
    tensors, _ = merged(recipe)
    assert HEAD not in tensors
    assert tensors[EMBEDDING].shape == (12, 8)
    mixed = tied | {"second": str(write_model(tmp_path / "untied", "second"))}
    rows = merged_rows(recipe_of(mixed, "first", "second", tokenizer_source="union"), HEAD)
    expected = rows_of(mixed["first"])["a"] + rows_of(mixed["second"], HEAD)["a"]
    torch.testing.assert_close(rows["a"], expected / 2, rtol=0, atol=1e-7)


def test_token_ids_of_the_config_follow_their_tokens(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    copy = write_model(tmp_path / "second", "second")
    tiny.edit_config(copy, text_config={"vocab_size": 12, "eos_token_id": [2, 3, 11]})
    generation = {"eos_token_id": [2, 3], "pad_token_id": 0, "temperature": 0.5}
    (copy / "generation_config.json").write_text(json.dumps(generation))
    names = folders | {"second": str(copy)}
    recipe = recipe_of(names, "second", "first", tokenizer_source="first")
    out = materialize(recipe, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, None)
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 8
    assert config["text_config"]["eos_token_id"] == [1]
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [1], "pad_token_id": None, "temperature": 0.5}


def test_a_lost_token_is_replaced_by_the_outputs_own_of_its_role(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", "first")
    other = write_model(tmp_path / "other", "third")
    write_tokenizer(other, ["<start>", "<stop>"], "abc", [])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<stop>"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    names = {"one": str(one), "other": str(other)}
    plan, _ = planned(recipe_of(names, "one", "other", tokenizer_source="other"))
    assert (plan.config["bos_token_id"], plan.config["eos_token_id"]) == (None, 1)


def test_the_tokenizer_of_a_model_outside_the_merge_is_written(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    recipe = recipe_of(folders, "first", "third", tokenizer_source="outside")
    out = materialize(recipe, tmp_path / "out")
    theirs = Path(folders["outside"]) / "tokenizer.json"
    assert (out / "tokenizer.json").read_bytes() == theirs.read_bytes()
    assert torch.equal(merged_rows(recipe)["ef"], torch.zeros(8))  # as in mergekit


def test_a_base_merged_alone_gives_its_logits_on_its_tokens(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    mapping: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": "first", "parameters": {"weight": 1.0}},
            {"model": "second", "parameters": {"weight": 0.0}},
        ],
        "tokenizer_source": "union",
        "dtype": "float32",
    }
    recipe = recipe_from_mapping(mapping, "test").with_models(folders)
    out = materialize(recipe, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(out)("abcabdab", return_tensors="pt")["input_ids"]
    own = AutoTokenizer.from_pretrained(folders["first"])("abcabdab", return_tensors="pt")
    assert torch.equal(ids, own["input_ids"])
    base = AutoModelForCausalLM.from_pretrained(folders["first"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        wide, narrow = model(ids).logits, base(ids).logits[..., :8]
    assert wide.shape[-1] == 12
    torch.testing.assert_close(wide[..., :8], narrow, rtol=1e-5, atol=1e-5)
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape[1] > ids.shape[1]


def test_the_same_tokens_and_rows_leave_nothing_to_do(tmp_path: Path) -> None:
    one = tiny.llama(tmp_path / "one", layers=1)
    other = tiny.variant(one, tmp_path / "other", seed=1)
    names = {"one": str(one), "other": str(other)}
    for source in ("base", "union", "one"):
        plan, _ = planned(recipe_of(names, "one", "other", tokenizer_source=source))
        assert plan.vocabulary is None
    plain, _ = planned(recipe_of(names, "one", "other"))
    assert plan.digest == plain.digest


def test_another_vocabulary_is_another_plan(folders: dict[str, str]) -> None:
    digests = {
        planned(recipe_of(folders, "first", "second", tokenizer=tokenizer))[0].digest
        for tokenizer in (
            {"source": "union"},
            {"source": "base"},
            choices(cd={"source": {"kind": "zero"}}),
            choices(cd={"source": {"kind": "zero"}, "force": True}),
        )
    }
    assert len(digests) == 4


def test_models_of_other_vocabularies_need_a_tokenizer_source(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_source: union .*by token"):
        planned(recipe_of(folders, "first", "second"))


def test_other_tokens_at_the_same_rows_are_merged_by_number_with_a_warning(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", "first")
    other = write_model(tmp_path / "other", "first")
    names = {"one": str(one), "other": str(other)}
    recipe = recipe_of(names, "one", "other")
    checkpoints = open_checkpoints(recipe)
    assert tokenizer_notes(recipe, checkpoints) == ()
    write_tokenizer(other, ["</s>", "<s>"], "abcd", [])
    (note,) = tokenizer_notes(recipe, checkpoints)
    assert note.startswith(f"the tokenizers of {other} and {one} differ")
    plan, _ = planned(recipe)
    assert plan.vocabulary is None


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", "first")
    other = write_model(tmp_path / "other", "first")
    (other / "tokenizer.json").unlink()
    names = {"one": str(one), "other": str(other), "second": str(tmp_path / "second")}
    recipe = recipe_of(names, "one", "other", tokenizer_source="union")
    assert tokenizer_notes(recipe, open_checkpoints(recipe)) == (
        f"{other} has no tokenizer; it is taken to be that of {one}",
    )
    second = write_model(tmp_path / "second", "second")
    (second / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer, and 12 rows where .*one has 11"):
        planned(recipe_of(names, "one", "second", tokenizer_source="union"))


def test_embeddings_in_each_layer_cannot_be_aligned(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    layered = tiny.edit_config(
        write_model(tmp_path / "layered", "first"), vocab_size_per_layer_input=11
    )
    names = folders | {"layered": str(layered)}
    with pytest.raises(ConfigError, match=r"vocab_size_per_layer_input: .*leave tokenizer_source"):
        planned(recipe_of(names, "layered", "second", tokenizer_source="union"))


def test_the_command_line_merges_other_vocabularies(
    tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPES["choices"]
    for name, folder in folders.items():
        text = text.replace(f"model: {name}", f"model: {folder}")
        text = text.replace(f"source: {name}", f"source: {folder}")
    recipe.write_text(text)
    out = tmp_path / "out"
    assert main(["merge", str(recipe), str(out), "--storage", str(tmp_path / "storage")]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("abc<new>cd", return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["abc", "<new>", "cd"]
    answer = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=99)
    assert answer.shape == (1, 8)
    capsys.readouterr()
    mapping = recipe_of(folders, "first", "second").to_mapping()
    recipe.write_text(json.dumps(mapping))
    assert (
        main(["merge", str(recipe), str(tmp_path / "two"), "--storage", str(tmp_path / "s")]) == 2
    )
    assert "tokenizer_source: union" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
