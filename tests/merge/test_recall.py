"""What a search computes of its source tensors once, and not for every candidate."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from evomerge.merge import statistics
from evomerge.merge.materialize import materialize
from evomerge.merge.plan import SourceTensor
from evomerge.merge.recall import Statistics
from evomerge.recipe import Recipe, recipe_from_mapping
from tests import tiny


def test_a_statistic_is_computed_once_for_the_same_tensors_and_key() -> None:
    memory = Statistics()
    calls: list[int] = []

    def count() -> int:
        calls.append(1)
        return len(calls)

    assert memory.of("a")("norm", count) == 1
    assert memory.of("a")("norm", count) == 1
    assert memory.of("b")("norm", count) == 2
    assert memory.of("a")("gram", count) == 3
    assert len(calls) == 3


def test_the_oldest_statistics_are_given_up_beyond_the_limit() -> None:
    memory = Statistics(limit=24_000)
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        def compute() -> torch.Tensor:
            made.append(name)
            return torch.zeros(2000)  # 8,000 bytes

        return memory.of(name)("histogram", compute)

    for name in ("a", "b", "a", "c", "a", "b"):
        make(name)
    # c drives out b, which was asked for longest ago.
    assert made == ["a", "b", "c", "b"]


def test_small_statistics_count_as_what_their_keys_take() -> None:
    """Each candidate of a random method leaves numbers behind that no other one asks for."""
    memory = Statistics(limit=1_000_000)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for candidate in range(5000):
        tensors = tuple(SourceTensor(f"/models/{name}", f"layers.{candidate}.w") for name in "abc")
        memory.of(tensors)(("L1 norm", 0, ("random", candidate / 5000, candidate)), lambda: 0.5)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 1.5 * memory.limit


def slerp(base: Path, tuned: Path, t: float) -> Recipe:
    mapping = {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": {"t": t},
    }
    return recipe_from_mapping(mapping, "test")


def test_candidates_by_disk_share_their_statistics_and_are_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.llama(tmp_path / "base", layers=2, hidden=64)
    tuned = tiny.variant(base, tmp_path / "tuned", seed=1)
    calls = 0
    gram = statistics.gram

    def counted(*arguments: object, **keys: object) -> object:
        nonlocal calls
        calls += 1
        return gram(*arguments, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(statistics, "gram", counted)
    memory = Statistics()
    for t in (0.2, 0.6, 0.9):
        recipe = slerp(base, tuned, t)
        shared = materialize(recipe, tmp_path / f"shared-{t}", statistics=memory)
        calls_with_memory = calls
        alone = materialize(recipe, tmp_path / f"alone-{t}")
        assert calls == calls_with_memory + len(tiny.read_tensors(base))
        calls = calls_with_memory
        name = "model.safetensors"
        assert (shared / name).read_bytes() == (alone / name).read_bytes()
    assert calls == len(tiny.read_tensors(base))


def test_a_merge_on_its_own_counts_the_digits_of_a_difference_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breadcrumbs asks for two thresholds of each difference, from one histogram."""
    base = tiny.llama(tmp_path / "base", layers=1, hidden=64)
    tuned = tiny.variant(base, tmp_path / "tuned", seed=1)
    mapping = {
        "merge_method": "breadcrumbs",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": {"weight": 1.0, "density": 0.5, "gamma": 0.1},
    }
    counted: list[int] = []
    count_digits = statistics.leading_digits

    def counting(values: statistics.Values, count: int) -> statistics.Histogram:
        counted.append(count)
        return count_digits(values, count)

    monkeypatch.setattr(statistics, "leading_digits", counting)
    materialize(recipe_from_mapping(mapping, "test"), tmp_path / "out")
    assert len(counted) == len(tiny.read_tensors(base))
