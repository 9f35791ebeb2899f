from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from evomerge.merge.plan import MergePlan, PlanEntry, SourceTensor, make_plan, open_checkpoints
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny.llama(root / "base", layers=4, hidden=64)
    return {
        "base": base,
        "first": tiny.variant(base, root / "first", seed=1),
        "second": tiny.variant(base, root / "second", seed=2),
        "tied": tiny.llama(root / "tied", layers=4, hidden=64, tied=True),
        "deep": tiny.llama(root / "deep", layers=6, hidden=64),
        "wide": tiny.llama(root / "wide", layers=4, hidden=128),
        "words": tiny.llama(root / "words", layers=4, hidden=64, vocabulary=270),
        "qwen": tiny.qwen2(root / "qwen", hidden=64),
        "float32": tiny.llama(root / "float32", layers=4, hidden=64, dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def checkpoints(models: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint.open(directory) for name, directory in models.items()}


def weighted(*weights: tuple[str, object], layers: tuple[int, int] = (0, 4)) -> dict[str, object]:
    return {
        "sources": [
            {"model": name, "layer_range": list(layers)}
            | ({} if weight is None else {"parameters": {"weight": weight}})
            for name, weight in weights
        ]
    }


def task_arithmetic(*slices: dict[str, object], **keys: object) -> Recipe:
    mapping = {"merge_method": "task_arithmetic", "base_model": "base", "slices": list(slices)}
    return recipe_from_mapping(mapping | keys, "made here")


def linear(**keys: object) -> Recipe:
    return recipe_from_mapping({"merge_method": "linear"} | keys, "made here")


def entries(plan: MergePlan) -> dict[str, PlanEntry]:
    return {entry.name: entry for entry in plan.entries}


def test_a_plan_names_base_first_and_every_tensor_of_the_model(
    models: dict[str, Path], checkpoints: dict[str, Checkpoint]
) -> None:
    plan = make_plan(
        task_arithmetic(weighted(("first", 0.5), ("base", None), ("second", -0.25))), checkpoints
    )
    name = "model.layers.2.mlp.up_proj.weight"
    assert entries(plan)[name] == PlanEntry(
        name=name,
        shape=(128, 64),
        dtype=BFLOAT16,
        method="task_arithmetic",
        inputs=(
            SourceTensor("base", name),
            SourceTensor("first", name),
            SourceTensor("second", name),
        ),
        weights=(0.5, -0.25),
    )
    assert entries(plan).keys() == tiny.read_tensors(models["base"]).keys()
    assert plan.donor == "base"
    assert plan.dtype == BFLOAT16


def test_layers_are_renumbered_and_take_their_own_slices_weights(
    checkpoints: dict[str, Checkpoint],
) -> None:
    recipe = task_arithmetic(
        weighted(("first", 0.5), ("base", None), layers=(2, 4)),
        weighted(("first", 0.75), ("base", None), layers=(0, 3)),
        weighted(("second", 1.25), ("base", None), layers=(3, 4)),
    )
    plan = make_plan(recipe, checkpoints)
    found = {
        int(name.split(".")[2]): (entry.inputs[1].model, entry.inputs[1].name, entry.weights)
        for name, entry in entries(plan).items()
        if name.endswith("input_layernorm.weight")
    }
    source = "model.layers.{}.input_layernorm.weight".format
    assert found == {
        0: ("first", source(2), (0.5,)),
        1: ("first", source(3), (0.5,)),
        2: ("first", source(0), (0.75,)),
        3: ("first", source(1), (0.75,)),
        4: ("first", source(2), (0.75,)),
        5: ("second", source(3), (1.25,)),
    }
    assert plan.config["num_hidden_layers"] == 6
    # What lies before the layers belongs to the first slice, what comes after to the last.
    assert entries(plan)["model.embed_tokens.weight"].weights == (0.5,)
    assert entries(plan)["model.norm.weight"].weights == (1.25,)
    assert entries(plan)["lm_head.weight"].inputs[1].model == "second"


def test_gradients_run_over_a_slice_and_start_outside_of_the_layers(
    checkpoints: dict[str, Checkpoint],
) -> None:
    recipe = task_arithmetic(
        weighted(("first", [0.0, 1.0]), ("base", None), layers=(0, 3)),
        weighted(("first", [0.25, 0.75]), ("base", None), layers=(3, 4)),
    )
    plan = entries(make_plan(recipe, checkpoints))
    norms = [plan[f"model.layers.{n}.input_layernorm.weight"].weights[0] for n in range(4)]
    assert norms == [0.0, 0.5, 1.0, 0.75]  # a slice of one layer reads the last anchor
    assert plan["model.embed_tokens.weight"].weights == (0.0,)
    assert plan["lm_head.weight"].weights == (0.25,)


def test_filters_look_into_the_sources_names(checkpoints: dict[str, Checkpoint]) -> None:
    weight = [{"filter": "layers.3.mlp", "value": 5.0}, {"filter": "mlp", "value": 2.0}]
    recipe = task_arithmetic(
        weighted(("first", weight), ("base", None), layers=(3, 4)), parameters={"weight": 0.5}
    )
    plan = entries(make_plan(recipe, checkpoints))
    assert plan["model.layers.0.mlp.up_proj.weight"].weights == (5.0,)
    assert plan["model.layers.0.self_attn.q_proj.weight"].weights == (0.5,)
    assert plan["model.norm.weight"].weights == (0.5,)


@pytest.mark.parametrize(
    ("parameters", "weights"),
    [
        ({}, (0.6, 0.2)),
        ({"normalize": True}, (0.6 / 0.8, 0.2 / 0.8)),
        ({"lambda": 0.5}, (0.3, 0.1)),
        ({"lambda": 2.0, "normalize": 1.0}, (1.5, 0.5)),
    ],
)
def test_lambda_and_normalize_are_in_the_weights(
    checkpoints: dict[str, Checkpoint], parameters: dict[str, object], weights: tuple[float, ...]
) -> None:
    recipe = task_arithmetic(
        weighted(("first", 0.6), ("second", 0.2), ("base", None)), parameters=parameters
    )
    for entry in make_plan(recipe, checkpoints).entries:
        assert entry.weights == pytest.approx(weights, rel=1e-15)


def test_task_vectors_that_cancel_are_left_as_they_are_when_normalized(
    checkpoints: dict[str, Checkpoint],
) -> None:
    recipe = task_arithmetic(
        weighted(("first", 0.5), ("second", -0.5), ("base", None)), parameters={"normalize": 1.0}
    )
    assert make_plan(recipe, checkpoints).entries[0].weights == (0.5, -0.5)


def test_linear_weights_are_normalized_unless_told_otherwise(
    checkpoints: dict[str, Checkpoint],
) -> None:
    models = [
        {"model": "first", "parameters": {"weight": 3}},
        {"model": "second", "parameters": {"weight": 1}},
    ]
    assert make_plan(linear(models=models), checkpoints).entries[0].weights == (0.75, 0.25)
    plain = make_plan(linear(models=models, parameters={"normalize": False}), checkpoints)
    assert plain.entries[0].weights == (3.0, 1.0)
    assert plain.donor == "first"


def test_a_base_that_is_not_listed_is_the_last_of_whole_models(
    checkpoints: dict[str, Checkpoint],
) -> None:
    models = [{"model": "first", "parameters": {"weight": 0.75}}]
    with_base = linear(models=models, base_model="base", parameters={"weight": 0.25})
    entry = make_plan(with_base, checkpoints).entries[0]
    assert [tensor.model for tensor in entry.inputs] == ["first", "base"]
    assert entry.weights == (0.75, 0.25)
    with pytest.raises(ConfigError, match="base has no weight for model"):
        make_plan(linear(models=models, base_model="base"), checkpoints)


def test_a_plain_model_is_passed_through_in_its_own_dtype(
    checkpoints: dict[str, Checkpoint],
) -> None:
    recipe = recipe_from_mapping(
        {"merge_method": "passthrough", "models": [{"model": "float32"}]}, "made here"
    )
    plan = make_plan(recipe, checkpoints)
    assert {(e.method, e.weights, e.dtype) for e in plan.entries} == {("passthrough", (), FLOAT32)}
    assert plan.config["dtype"] == "float32"


def test_the_base_alone_is_passed_through(checkpoints: dict[str, Checkpoint]) -> None:
    plan = make_plan(task_arithmetic(weighted(("base", 0.7))), checkpoints)
    assert {(entry.method, entry.inputs[0].model) for entry in plan.entries} == {
        ("passthrough", "base")
    }


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, FLOAT32),
        ({"dtype": "float16"}, FLOAT16),
        ({"dtype": "torch.bfloat16"}, BFLOAT16),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, BFLOAT16),
    ],
)
def test_the_dtype_is_the_one_asked_for_or_the_widest(
    checkpoints: dict[str, Checkpoint], keys: dict[str, object], dtype: DType
) -> None:
    recipe = task_arithmetic(weighted(("float32", 0.5), ("base", None)), **keys)
    plan = make_plan(recipe, checkpoints)
    assert plan.dtype == dtype
    assert {entry.dtype for entry in plan.entries} == {dtype}
    assert plan.config["dtype"] == dtype.name
    assert "torch_dtype" not in plan.config


def test_tied_embeddings_stay_tied(checkpoints: dict[str, Checkpoint]) -> None:
    plan = make_plan(linear(models=[{"model": "tied"}], parameters={"weight": 1}), checkpoints)
    assert "lm_head.weight" not in entries(plan)
    assert plan.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("names", [("tied", "base"), ("base", "tied")])
def test_a_mix_of_tied_and_untied_has_output_embeddings_of_its_own(
    checkpoints: dict[str, Checkpoint], names: tuple[str, str]
) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    plan = make_plan(linear(models=models), checkpoints)
    owned = {"tied": "model.embed_tokens.weight", "base": "lm_head.weight"}
    assert entries(plan)["lm_head.weight"].inputs == tuple(
        SourceTensor(name, owned[name]) for name in names
    )
    assert plan.config["tie_word_embeddings"] is False


def test_filters_know_the_output_embeddings_of_a_tied_model_by_their_own_name(
    checkpoints: dict[str, Checkpoint],
) -> None:
    """As mergekit does, though the tied model's file has input embeddings alone."""
    weight = [
        {"filter": "lm_head", "value": 0.75},
        {"filter": "embed", "value": 0.25},
        {"value": 1},
    ]
    models = [{"model": name, "parameters": {"weight": weight}} for name in ("tied", "base")]
    recipe = linear(models=models, parameters={"normalize": False})
    plan = entries(make_plan(recipe, checkpoints))
    assert plan["lm_head.weight"].weights == (0.75, 0.75)
    assert plan["model.embed_tokens.weight"].weights == (0.25, 0.25)


def test_where_the_last_slice_is_tied_the_model_is(checkpoints: dict[str, Checkpoint]) -> None:
    slices = [weighted(("base", 1.0), layers=(0, 2)), weighted(("tied", 1.0), layers=(2, 4))]
    plan = make_plan(linear(slices=slices), checkpoints)
    assert "lm_head.weight" not in entries(plan)
    assert plan.config["tie_word_embeddings"] is True


def test_a_stored_head_of_a_tied_model_is_not_read(
    models: dict[str, Path], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(261, 64, dtype=torch.bfloat16)

    # As some published checkpoints are; transformers and vLLM use the input embeddings then.
    stored = tiny.rewrite(tiny.variant(models["tied"], tmp_path / "stored", seed=3), add_head)
    opened = {**checkpoints, "stored": Checkpoint.open(stored)}
    plan = make_plan(linear(models=[{"model": "stored"}], parameters={"weight": 1}), opened)
    assert "lm_head.weight" not in entries(plan)


def test_a_silent_config_is_tied_where_there_is_no_head(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for name, tied in (("tied", True), ("base", False)):
        copied = tiny.variant(models[name], tmp_path / name, seed=3)
        config = json.loads((copied / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (copied / "config.json").write_text(json.dumps(config))
        assert Checkpoint.open(copied).architecture.tied is tied


def test_kinds_of_layers_are_restacked_with_them(models: dict[str, Path], tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    directory = tiny.edit_config(
        tiny.variant(models["qwen"], tmp_path / "kinds", seed=1), layer_types=kinds
    )
    slices = [weighted(("kinds", 1.0), layers=(1, 4)), weighted(("kinds", 1.0), layers=(1, 3))]
    plan = make_plan(linear(slices=slices), {"kinds": Checkpoint.open(directory)})
    assert plan.config["layer_types"] == [*kinds[1:4], *kinds[1:3]]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            task_arithmetic(weighted(("first", 1.0), ("base", None), layers=(2, 5))),
            r"slices\.0: layer_range \[2, 5\] exceeds first, which has 4 layers \(0–3\)",
        ),
        (
            linear(models=[{"model": "base"}, {"model": "deep"}], parameters={"weight": 1}),
            "numbers of layers differ: 4 in base, 6 in deep",
        ),
        (
            task_arithmetic(weighted(("wide", 1.0), ("base", None))),
            "wide/config.json: num_attention_heads: 2, but base has 1; models of one",
        ),
        (
            task_arithmetic(weighted(("words", 1.0), ("base", None))),
            r"\[270, 64\] in words, \[261, 64\] in base; the models have vocabularies of different",
        ),
        (
            task_arithmetic(weighted(("qwen", 1.0), ("base", None))),
            r"qwen/config.json: architectures: \['Qwen2ForCausalLM'\], but base has",
        ),
        (
            task_arithmetic(weighted(("first", None), ("base", None))),
            "slices.0: first has no weight for model",
        ),
        (task_arithmetic(weighted(("unknown", 1.0), ("base", None))), "unknown: is not among"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    checkpoints: dict[str, Checkpoint], recipe: Recipe, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(recipe, checkpoints)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39, -1e300])
def test_weights_that_are_no_float32_numbers_fail_the_candidate(
    checkpoints: dict[str, Checkpoint], weight: float
) -> None:
    for recipe in (
        task_arithmetic(weighted(("first", weight), ("base", None))),
        linear(slices=[weighted(("first", weight), ("second", weight))]),
    ):
        with pytest.raises(CandidateError, match=r"weight .* is not a finite float32 number"):
            make_plan(recipe, checkpoints)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.5, -0.5), (1e-9, 0.0)])
def test_linear_weights_that_sum_to_nothing_fail_the_candidate(
    checkpoints: dict[str, Checkpoint], weights: tuple[float, float]
) -> None:
    recipe = linear(slices=[weighted(("first", weights[0]), ("second", weights[1]))])
    with pytest.raises(CandidateError, match="cannot be normalised"):
        make_plan(recipe, checkpoints)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)


def add(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("lm_head.weight"), "lm_head.weight is missing"),
        (drop("model.embed_tokens.weight"), "one tensor of token embeddings is expected"),
        (
            drop("model.layers.1.mlp.up_proj.weight"),
            "different tensors in output layer 1: mlp.up_proj.weight is only in base",
        ),
        (integers, "model.norm.weight is int8: quantised weights cannot be merged"),
        (add("model.layers.7.extra.weight"), "has a tensor model.layers.7.extra.weight, but"),
        (add("visual.blocks.0.weight"), "has the modules text_decoder, vision_tower, but base"),
        (add("model.extra.weight"), "outside of the layers: model.extra.weight is only in changed"),
    ],
)
def test_a_model_with_missing_or_foreign_tensors_is_refused(
    models: dict[str, Path],
    checkpoints: dict[str, Checkpoint],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    changed = tiny.rewrite(tiny.variant(models["base"], tmp_path / "changed", seed=1), change)
    recipe = task_arithmetic(weighted(("changed", 1.0), ("base", None)))
    with pytest.raises(ConfigError, match=said):
        make_plan(recipe, {**checkpoints, "changed": Checkpoint.open(changed)})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 5}, "counts 5 layers, but the tensors of layer 4 are missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 should be at least 1"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be merged"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4, but base has 1; models of"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    models: dict[str, Path],
    checkpoints: dict[str, Checkpoint],
    tmp_path: Path,
    config: dict[str, object],
    said: str,
) -> None:
    changed = tiny.edit_config(tiny.variant(models["base"], tmp_path / "changed", seed=1), **config)
    recipe = task_arithmetic(weighted(("changed", 1.0), ("base", None)))
    with pytest.raises(ConfigError, match=said):
        make_plan(recipe, {**checkpoints, "changed": Checkpoint.open(changed)})


def test_tables_that_every_engine_computes_are_left_out(
    models: dict[str, Path], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = tiny.rewrite(tiny.variant(models["base"], tmp_path / "old", seed=1), add(name))
    recipe = task_arithmetic(weighted(("old", 1.0), ("base", None)))
    plan = make_plan(recipe, {**checkpoints, "old": Checkpoint.open(old)})
    assert name not in entries(plan)


DIGEST = """
import sys
from pathlib import Path
from evomerge.merge.plan import make_plan, open_checkpoints
from evomerge.recipe import read_recipe
recipe = read_recipe(Path(sys.argv[1]))
print(make_plan(recipe, open_checkpoints(recipe)).digest)
"""


def test_the_digest_is_the_same_in_every_process_and_tells_plans_apart(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folders = {name: str(directory) for name, directory in models.items()}
    recipe = task_arithmetic(weighted(("first", 0.1), ("base", None))).with_models(folders)
    opened = open_checkpoints(recipe)
    digest = make_plan(recipe, opened).digest
    next_float = task_arithmetic(weighted(("first", 0.10000000000000002), ("base", None)))
    assert make_plan(next_float.with_models(folders), opened).digest != digest
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    told = subprocess.run(
        [sys.executable, "-c", DIGEST, str(tmp_path / "recipe.yaml")],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == digest


def test_a_plan_of_forty_layers_is_made_in_milliseconds(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", layers=40, hidden=64)
    expert = tiny.variant(base, tmp_path / "expert", seed=1)
    slices = [
        weighted(("expert", 0.05 * n), ("base", None), layers=(2 * n, 2 * n + 2)) for n in range(20)
    ]
    opened = {"base": Checkpoint.open(base), "expert": Checkpoint.open(expert)}
    recipe = task_arithmetic(*slices)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        assert len(make_plan(recipe, opened).entries) == 40 * 9 + 3
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05  # 8 ms measured
