"""Whatever stands in a search space or a genome: a search, or one message; never a traceback."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge_rules import METHODS, PARAMETER_NAMES
from evomerge.search.study import StudyConfig, study_from_mapping
from evomerge.space import SearchSpace

# fmt: off
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.3, 1e308, math.inf, math.nan, 10**400, -(10**400),
    "", "x", "mlp", "0.5", "1e-5", "\0", [], [1], [0, 1], [1, 0], [0.1, 0.9], ["a", "b"],
    {}, {"low": 0.1, "high": 0.9}, {"low": 0, "high": 1, "log": True}, {"low": 1e-5, "high": 1},
    {"per": "global"}, {"per": "model"}, {"start": 0.5}, {"low": "x"}, {1: 2}, [None, 1],
    [10**400, 1], {"low": -1e308, "high": 1e308}, {"low": 5e-324, "high": 1e5, "log": True},
)
# fmt: on
STUDY = {"study": "s", "budget": {"trials": 9}, "suite": {"scorer": "exact", "data": "t"}}
SPACE_KEYS = ("layer_granularity", "filters", "smooth", "stack", "tokenizer_source", "numbers")
STACK_KEYS = ("repeats", "block", "scale", "scale_filters", "min_layers", "max_layers", "zz")
GENOME_KEYS = (
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity"),
    *("normalize", "allow_negative_weights", "filters", "smooth", "q"),
)


def drawn(chance: random.Random, keys: tuple[str, ...], most: int) -> dict[str, Any]:
    count = chance.randint(0, most)
    return {chance.choice(keys): chance.choice(VALUES) for _ in range(count)}


def mutated(chance: random.Random) -> dict[str, Any]:
    """A study file whose search space or genome somebody has typed into."""
    models = {"base_model": "b", "models": chance.choice([["m"], ["m", "n"]])}
    kind = chance.random()
    if kind < 0.6:
        method = {"merge_method": chance.choice(list(METHODS))}
        keys = (*SPACE_KEYS, *PARAMETER_NAMES, "wieght")
        return {**STUDY, **models, "search_space": {**method, **drawn(chance, keys, 3)}}
    if kind < 0.75:
        stack = {"merge_method": "passthrough", "stack": drawn(chance, STACK_KEYS, 3)}
        return {**STUDY, **models, "search_space": stack}
    genome = {"models": ["m", "n"], "merge_method": chance.choice(["ties", "linear", "slerp"])}
    genome |= {"base_model": chance.choice(["b", "m", None]), **drawn(chance, GENOME_KEYS, 2)}
    beside = drawn(chance, ("models", "base_model", "search_space", "tasks", "random_init"), 1)
    return {**STUDY, "genome": chance.choice([genome, genome, chance.choice(VALUES)]), **beside}


def searchable(study: StudyConfig) -> SearchSpace:
    return SearchSpace.build(
        study.space,
        base_model=study.base_model,
        models=study.models,
        num_layers=4,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_study_makes_a_search_or_one_message(seed: int) -> None:
    chance, nowhere = random.Random(seed), Path("nowhere")
    searches, messages, failures = 0, [], []
    for _ in range(100):
        content = mutated(chance)
        try:
            study = study_from_mapping(content, where="w", folder=nowhere)
            space = searchable(study)
        except ConfigError as error:
            messages.append(str(error))
            continue
        again = study_from_mapping(study.to_mapping(), where="w", folder=nowhere)
        assert again.space == study.space
        assert (space.low <= space.start).all()
        assert (space.start <= space.high).all()
        assert np.isfinite(space.steps).all()
        assert (space.steps > 0).all()
        try:
            space.decode(np.random.default_rng(seed).normal(size=space.dimension))
        except CandidateError as error:
            failures.append(str(error))
        searches += 1
    places = ("w: ", "models: ", "search_space.", "genome.")
    assert [message for message in messages if not message.startswith(places)] == []
    assert [failure for failure in failures if "its stack has" not in failure] == []
    assert 5 < searches < 95
