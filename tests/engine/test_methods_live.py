"""Every merge method in the live engines: the bits of the model that the same recipe writes.

The models are written first and declared as sources, so that one engine can be both: the recipe,
computed live, and what it left on disk, taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from evomerge.engine import Engine
from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.merge.materialize import materialize
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import method_recipes, tiny
from tests.engine.conftest import start

pytestmark = pytest.mark.filterwarnings("default")


@dataclass(frozen=True)
class Written:
    """A base, recipes over it and two siblings, and the model that each recipe wrote."""

    base: Path
    recipes: Mapping[str, Recipe]
    models: Mapping[str, Path]
    sources: list[str]

    def open(self, engine: str, **options: object) -> Engine:
        return start(engine, self.base, self.sources, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("methods")
    base = tiny.llama(root / "base", layers=2)
    tuned = [str(tiny.variant(base, root / f"tuned{seed}", seed=seed)) for seed in (1, 2, 3)]
    recipes = {
        name: method_recipes.recipe_for(name, str(base), tuned) for name in method_recipes.NAMES
    }
    models = {
        name: materialize(recipe, root / name.replace(" ", "-")) for name, recipe in recipes.items()
    }
    return Written(base, recipes, models, [*tuned, *map(str, models.values())])


# Element by element, by one coefficient, by thresholds, by random numbers, by rows, by columns.
OF_EACH_KIND = ("task_arithmetic", "slerp", "ties", "dare_ties", "della", "nuslerp columns")


def as_it_is(model: Path) -> Recipe:
    mapping = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return recipe_from_mapping(mapping | {"dtype": "bfloat16"}, "test")


def test_every_method_makes_another_model(written: Written) -> None:
    contents = {
        name: (model / "model.safetensors").read_bytes() for name, model in written.models.items()
    }
    assert len(set(contents.values())) == len(method_recipes.NAMES)


def test_transformers_becomes_the_model_on_disk_by_every_method(written: Written) -> None:
    with written.open("transformers") as engine:
        assert isinstance(engine, TransformersEngine)
        # Twice: the second time with the statistics that the first time left.
        for name in (*written.recipes, *written.recipes):
            assert engine.load(written.recipes[name]).how == "live", name
            expected = tiny.read_tensors(written.models[name])
            live = dict(engine.model.named_parameters(remove_duplicate=False))
            assert live.keys() == expected.keys()
            wrong = [key for key in expected if not torch.equal(live[key], expected[key])]
            assert wrong == [], name


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_vllm_becomes_the_model_on_disk_by_every_method(written: Written, ranks: int) -> None:
    pytest.importorskip("vllm")
    from evomerge.engine.vllm_engine import VLLMEngine

    options: dict[str, object] = {} if ranks == 1 else {"tensor_parallel_size": ranks}
    with written.open("vllm", repeatable=ranks == 1, **options) as engine:
        assert isinstance(engine, VLLMEngine)
        # On two ranks, where a switch takes its time, one method of each kind.
        names = (*written.recipes, *written.recipes) if ranks == 1 else OF_EACH_KIND
        seen = set()
        for name in names:
            assert engine.load(written.recipes[name]).how == "live", name
            live = engine.parameter_checksums()
            engine.load(as_it_is(written.models[name]))
            assert engine.parameter_checksums() == live, name
            assert len(live) == ranks
            seen.add(str(live))
    assert len(seen) == len(set(names))
