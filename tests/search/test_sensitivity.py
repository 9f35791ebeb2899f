"""What is said to matter, on genomes whose score is known as a formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.report.importance import importance_lines
from evomerge.search.loop import run_search
from evomerge.search.sensitivity import ridge, sensitivity, study_sensitivity
from evomerge.search.study import StudyConfig
from evomerge.space import SearchSpace, SpaceConfig
from tests.search.formula import opener
from tests.test_cli import run


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """2 slices × 2 models × 2 groups."""
    config = SpaceConfig.model_validate({"layer_granularity": 2, "filters": ["mlp"]})
    return SearchSpace.build(
        config, base_model="b", models=["m/left", "m/right"], num_layers=4, dtype="float32"
    )


def drawn(space: SearchSpace, number: int = 120) -> NDArray[np.float64]:
    source = np.random.RandomState(4)
    return source.normal(0.5, 0.25, (number, space.dimension)).clip(space.low, space.high)


def test_the_gene_that_decides_stands_out_with_its_slice_model_and_group(
    space: SearchSpace,
) -> None:
    genomes = drawn(space)
    found = sensitivity(space, genomes, -((genomes[:, 3] - 0.8) ** 2))
    assert (found["candidates"], found["best_quarter"]) == (120, 30)
    shares = [gene["importance"] for gene in found["genes"]]
    assert shares[3] > 0.7 > found["chance"] > max(shares[:3] + shares[4:])
    assert sum(shares) == pytest.approx(1.0)
    gene = found["genes"][3]
    assert gene["gene"] == "layers 0-2 | right | rest"
    assert (gene["layers"], gene["model"], gene["group"]) == ("0-2", "right", "rest")
    assert gene["best"]["mean"] == pytest.approx(0.8, abs=0.05)
    assert gene["best"]["spread"] < 0.1 < gene["all"]["spread"]
    assert gene["all"]["mean"] == pytest.approx(np.mean(genomes[:, 3]))
    for key, name in (("layers", "0-2"), ("model", "right"), ("group", "rest")):
        assert found["sums"][key][name] == max(found["sums"][key].values())
        assert sum(found["sums"][key].values()) == pytest.approx(1.0)
    lines = "\n".join(importance_lines(found))
    assert "from 120 scored trials" in lines
    assert "bold: genes above" in lines


@pytest.mark.parametrize("equal", [True, False])
def test_scores_that_say_nothing_are_called_chance(space: SearchSpace, equal: bool) -> None:
    scores = np.zeros(120) if equal else np.random.RandomState(1).normal(size=120)
    found = sensitivity(space, drawn(space), scores)
    assert max(gene["importance"] for gene in found["genes"]) <= found["chance"]
    assert found["explained_linearly"] < 0.1
    assert "no gene stands out" in "\n".join(importance_lines(found))


def test_a_gene_that_never_varied_has_no_importance(space: SearchSpace) -> None:
    genomes = drawn(space)
    genomes[:, 0] = 2.0
    found = sensitivity(space, genomes, genomes[:, 1])
    assert (found["genes"][0]["importance"], found["genes"][0]["effect"]) == (0.0, 0.0)
    assert found["genes"][1]["importance"] > 0.7


def test_effects_are_those_of_the_formula() -> None:
    places = np.random.RandomState(2).normal(size=(200, 3)) * [1.0, 2.0, 0.5]
    found = ridge(places, 3.0 + places @ [0.5, -0.25, 0.0])
    expected = np.array([0.5, -0.25, 0.0]) * places.std(axis=0)
    assert found.effects == pytest.approx(expected, abs=0.003)
    assert found.explained == pytest.approx(1.0, abs=1e-3)


def test_the_error_of_left_out_candidates_is_that_of_refitting_without_them() -> None:
    source = np.random.RandomState(5)
    places, noise = source.normal(size=(30, 2)), source.normal(size=30)
    scores = places @ [1.0, 0.5] + noise
    found = ridge(places, scores)
    # Refitted by hand with next to no shrinkage: the explained share can be no worse.
    errors, spread = [], []
    for row in range(30):
        rest = np.arange(30) != row
        design = np.column_stack([np.ones(29), places[rest]])
        solution = np.linalg.lstsq(design, scores[rest], rcond=None)[0]
        errors.append((scores[row] - np.array([1.0, *places[row]]) @ solution) ** 2)
        spread.append((scores[row] - scores[rest].mean()) ** 2)
    unshrunk = 1 - sum(errors) / sum(spread)
    assert unshrunk <= found.explained < unshrunk + 0.1


@pytest.fixture
def storage(study: Callable[..., StudyConfig], tmp_path: Path) -> Callable[..., Path]:
    def search(**changes: Any) -> Path:
        run_search(study(**changes), storage=tmp_path / "s", open_evaluator=opener())
        return tmp_path / "s"

    return search


def test_the_command_shows_a_studys_genes(storage: Callable[..., Path]) -> None:
    folder = storage()
    ran = run("status", "formula", "--importance", "--storage", folder)
    assert (ran.status, ran.err) == (0, "")
    assert "layers 0-2 | left" in ran.out
    assert "layers 2-4" in ran.out
    assert "from 24 scored trials" in ran.out
    document = json.loads(
        run("status", "formula", "--importance", "--json", "--storage", folder).out
    )
    assert document["importance"] == study_sensitivity(folder, "formula")
    assert len(document["trials"]) == 24
    ran = run("status", "--importance", "--storage", folder)
    assert (ran.status, "evomerge status NAME --importance" in ran.err) == (2, True)


def test_too_few_trials_are_refused(storage: Callable[..., Path]) -> None:
    folder = storage(budget={"trials": 18})
    with pytest.raises(ConfigError, match=r"needs 20 scored trials for 4 genes .* there are 18"):
        study_sensitivity(folder, "formula")
