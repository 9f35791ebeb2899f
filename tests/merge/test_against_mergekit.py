"""Our merges beside those of mergekit 0.1.5, recorded by `tests/golden/record.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.kernels import merged_tensors
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import MergePlan, make_plan, open_checkpoints
from evomerge.recipe import Recipe, read_recipe
from tests.golden.cases import RANDOM, recipes
from tests.golden.inputs import write_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT32_CASES = sorted(name for name, recipe in recipes().items() if not recipe.out_dtype)
FLOAT32_CASES = [name for name in FLOAT32_CASES if name not in ("emitted_bfloat16", *RANDOM)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("golden"))


def plan_of(name: str, folders: dict[str, str]) -> tuple[MergePlan, dict[str, Checkpoint]]:
    recipe = read_recipe(GOLDEN / f"{name}.yaml").with_models(folders)
    checkpoints = open_checkpoints(recipe)
    return make_plan(recipe, checkpoints), checkpoints


def merged(name: str, folders: dict[str, str]) -> dict[str, Tensor]:
    return dict(merged_tensors(*plan_of(name, folders)))


def recorded(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_recorded_recipe_is_the_one_that_we_write(name: str) -> None:
    assert recipes()[name].to_yaml() == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", FLOAT32_CASES)
def test_a_recipe_merges_as_mergekit_merges_it(name: str, folders: dict[str, str]) -> None:
    ours, theirs = merged(name, folders), recorded(name)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype
        torch.testing.assert_close(ours[tensor], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_keep_as_many_and_stretch_as_much_as_mergekits(
    name: str, folders: dict[str, str]
) -> None:
    """mergekit's random numbers are its own; all else of the recorded merges can be compared."""
    density = float(recipes()[name].parameters["density"])  # type: ignore[arg-type]
    plan, checkpoints = plan_of(name, folders)
    total = 0
    kept = {"ours": 0, "theirs": 0}
    merges = {"ours": merged(name, folders), "theirs": recorded(name)}
    for entry in plan.entries:
        base, tuned = (checkpoints[tensor.model].read(tensor.name) for tensor in entry.inputs)
        delta = tuned - base
        total += delta.numel()
        for who, tensors in merges.items():
            here = tensors[entry.name] != base
            kept[who] += int(here.sum())
            stretched = delta * here * (delta.abs().sum() / (delta * here).abs().sum())
            torch.testing.assert_close(tensors[entry.name], base + stretched, rtol=0, atol=1e-6)
    deviation = (density * (1 - density) / total) ** 0.5
    assert kept["ours"] / total == pytest.approx(density, abs=4 * deviation)
    assert kept["theirs"] / total == pytest.approx(density, abs=4 * deviation)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_model_is_configured_as_mergekit_configures_it(
    name: str, folders: dict[str, str]
) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    if name == "tied_and_untied":
        # mergekit writes the output embeddings and says by chance, by its hash seed, that they are
        # tied; whoever loads that loses them.
        expected["tie_word_embeddings"] = False
    config = plan_of(name, folders)[0].config
    assert {key: config[key] for key in expected} == expected


def test_float32_rounded_once_is_what_mergekit_saves_as_bfloat16(folders: dict[str, str]) -> None:
    ours, theirs = merged("qwen2_with_biases", folders), recorded("qwen2_with_biases")
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("q_proj.bias") for name in ours)
    for tensor, expected in theirs.items():
        assert torch.equal(ours[tensor], expected), tensor


def test_a_bfloat16_merge_differs_from_mergekits_only_by_its_roundings(
    folders: dict[str, str],
) -> None:
    plan, checkpoints = plan_of("emitted_bfloat16", folders)
    ours, theirs = dict(merged_tensors(plan, checkpoints)), recorded("emitted_bfloat16")
    assert ours.keys() == theirs.keys()
    different = total = 0
    for entry in plan.entries:
        base, tuned = (checkpoints[tensor.model].read(tensor.name) for tensor in entry.inputs)
        # mergekit rounds the difference, the weight, their product and the sum to bfloat16.
        weight = torch.tensor(entry.weights[0], dtype=torch.bfloat16)
        assert torch.equal(base + weight * (tuned - base), theirs[entry.name])
        change = entry.weights[0] * (tuned.double() - base.double())
        bound = 2**-8 * (3 * change.abs() + (base + change).abs()) + 2**-8 * ours[entry.name].abs()
        assert ((ours[entry.name].double() - theirs[entry.name].double()).abs() <= bound).all()
        different += int((ours[entry.name] != theirs[entry.name]).sum())
        total += base.numel()
    assert 0 < different < total / 2


def test_a_directory_holds_the_recorded_model(folders: dict[str, str], tmp_path: Path) -> None:
    recipe = read_recipe(GOLDEN / "emitted_filters.yaml").with_models(folders)
    written = load_file(materialize(recipe, tmp_path / "out") / "model.safetensors")
    theirs = recorded("emitted_filters")
    assert written.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        torch.testing.assert_close(written[tensor], expected, rtol=0, atol=1e-6)


def test_another_weight_changes_its_own_slice_alone(folders: dict[str, str]) -> None:
    mapping = read_recipe(GOLDEN / "emitted_float32.yaml").with_models(folders).to_mapping()
    mapping["slices"][0]["sources"][0]["parameters"]["weight"] += 0.5  # type: ignore[index]
    recipe = Recipe.model_validate(mapping)
    checkpoints = open_checkpoints(recipe)
    changed = dict(merged_tensors(make_plan(recipe, checkpoints), checkpoints))
    theirs = recorded("emitted_float32")
    same = {
        name for name in theirs if torch.allclose(changed[name], theirs[name], rtol=0, atol=1e-6)
    }
    second_slice = {name for name in theirs if ".layers.2." in name or ".layers.3." in name}
    assert same == second_slice | {"model.norm.weight", "lm_head.weight"}
