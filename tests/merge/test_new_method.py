"""The method that CONTRIBUTING.md makes up, entered and run as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from evomerge import merge_rules
from evomerge.errors import ConfigError
from evomerge.merge import blends, methods
from evomerge.merge.materialize import materialize
from evomerge.recipe import parse_recipe
from tests import tiny

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
RECIPE = """
merge_method: midpoint
models: [{{model: {first}}}, {{model: {second}}}, {{model: {third}}}]
parameters: {{t: {t}}}
dtype: float32
"""


@pytest.fixture
def midpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enters the example's row and function; both are gone after the test."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    section = text.split("## A new merge method")[1].split("\n## ")[0]
    row, function = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    rules = eval(row, dict(vars(merge_rules)))
    monkeypatch.setitem(merge_rules.METHODS, rules.name, rules)  # type: ignore[arg-type]
    monkeypatch.setitem(blends.METHODS, rules.name, blends.linear)
    exec(function, dict(vars(methods)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    first = tiny.llama(root / "first", layers=2)
    return {
        "first": first,
        "second": tiny.variant(first, root / "second", seed=1),
        "third": tiny.variant(first, root / "third", seed=2),
    }


@pytest.mark.usefixtures("midpoint")
def test_one_row_and_one_function_make_a_method(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.format(t=0.25, **folders), "recipe")
    merged = tiny.read_tensors(materialize(recipe, tmp_path / "out"))
    inputs = [tiny.read_tensors(folder) for folder in folders.values()]
    assert merged.keys() == inputs[0].keys()
    for name, tensor in merged.items():
        stacked = torch.stack([tensors[name].float() for tensors in inputs])
        expected = 0.75 * stacked.amin(0) + 0.25 * stacked.amax(0)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("midpoint")
def test_its_row_refuses_what_is_out_of_range(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1\.5"):
        materialize(parse_recipe(RECIPE.format(t=1.5, **folders), "recipe"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_them_it_is_unknown() -> None:
    with pytest.raises(ConfigError, match="midpoint"):
        parse_recipe(RECIPE.format(t=0.5, first="a", second="b", third="c"), "recipe")
