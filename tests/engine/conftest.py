"""Tiny families of models, and recipes over them, for the tests with real engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from evomerge.engine import Engine, EngineConfig, open_engine
from evomerge.engine.base import Completion, GenerationSettings
from evomerge.recipe import Recipe, recipe_from_mapping
from evomerge.space import SearchSpace, SpaceConfig
from tests import tiny

PROMPTS = [f"Question {number}: what is {number} plus {3 * number}?" for number in range(8)]
SETTINGS = GenerationSettings(max_tokens=10)
OPTIONS = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 27}

WRITERS: dict[str, Callable[..., Path]] = {
    "llama": partial(tiny.llama, layers=4),
    "tied llama": partial(tiny.llama, layers=4, tied=True),
    "qwen2": tiny.qwen2,
    "qwen3": tiny.qwen3,
}


@dataclass(frozen=True)
class Family:
    """A base and two tuned siblings, with the space of their task-arithmetic merges."""

    base: Path
    tuned: tuple[Path, Path]
    space: SearchSpace

    def recipe(self, seed: int) -> Recipe:
        """A random point of the space, one per seed."""
        random = np.random.default_rng(seed)
        return self.space.decode(random.uniform(-0.5, 2.0, self.space.dimension))

    def open(self, name: str = "vllm", *, repeatable: bool = True, **options: object) -> Engine:
        """An engine that can become every merge of the family."""
        return start(
            name, self.base, [str(path) for path in self.tuned], repeatable=repeatable, **options
        )


def start(
    name: str,
    model: Path,
    sources: list[str],
    *,
    repeatable: bool = True,
    scratch: Path | None = None,
    **options: object,
) -> Engine:
    given = OPTIONS | options if name == "vllm" else options
    return open_engine(
        name,
        EngineConfig(
            model=str(model),
            sources=tuple(sources),
            repeatable=repeatable,
            # Two threads on two busy cores wait for each other at every layer.
            threads=1,
            scratch=None if scratch is None else str(scratch),
            options=given,
        ),
    )


def make_family(kind: str, directory: Path) -> Family:
    base = WRITERS[kind](directory / "base")
    tuned = (
        tiny.variant(base, directory / "one", seed=1),
        tiny.variant(base, directory / "two", seed=2),
    )
    space = SearchSpace.build(
        SpaceConfig(merge_method="task_arithmetic", layer_granularity=2),
        base_model=str(base),
        models=[str(path) for path in tuned],
        num_layers=4,
        dtype="bfloat16",
    )
    return Family(base, tuned, space)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("tied llama", tmp_path_factory.mktemp("family"))


def answers(engine: Engine) -> list[tuple[int, ...]]:
    """Greedy answers to all prompts, in one call."""
    return [answer.token_ids for answer in completions(engine)]


def completions(engine: Engine) -> list[Completion]:
    return engine.generate(PROMPTS, SETTINGS, add_special_tokens=True)


def answers_one_by_one(engine: Engine) -> list[tuple[int, ...]]:
    """Greedy answers, each prompt on its own: where batches form by arrival they would differ."""
    return [
        engine.generate([prompt], SETTINGS, add_special_tokens=True)[0].token_ids
        for prompt in PROMPTS[:4]
    ]


def answers_as_told(engine: Engine) -> list[tuple[int, ...]]:
    """What `answers_one_by_one` gives, as the engine tells it before the call is over."""
    told: list[tuple[int, ...]] = []
    for prompt in PROMPTS[:4]:
        engine.generate(
            [prompt],
            SETTINGS,
            add_special_tokens=True,
            each=lambda place, completion: told.append(completion.token_ids),
        )
    return told


def overflowing(family: Family) -> Recipe:
    """A recipe with finite inputs and finite weights whose sums are not finite."""
    models = [
        {"model": str(path), "parameters": {"weight": 3e38}}
        for path in (family.base, *family.tuned)
    ]
    mapping = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    return recipe_from_mapping(mapping | {"parameters": {"normalize": False}}, "test")
