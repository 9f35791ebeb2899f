"""The candidates that are not drawn: the baselines, and how a study's recipes are found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.optimizer.history import History, trial_label
from evomerge.recipe import Recipe, recipe_from_mapping
from evomerge.space import GenomeConfig, SearchSpace, SpaceConfig

BASE = "base"
UNIFORM = "uniform"
WARM = "warm"
_MODEL = "model "


@dataclass(frozen=True)
class Candidate:
    """A recipe under the name that log and ledger know it by: "trial 17", "base", "model 0" …"""

    label: str
    recipe: Recipe


def model_label(index: int) -> str:
    """The candidate name of the study's model number `index`."""
    return f"{_MODEL}{index}"


def warm_label(number: int) -> str:
    """The candidate name of entry `number` of a study's `warm_start:`."""
    return f"{WARM} {number}"


def candidate_titles(models: Sequence[str], warm_start: Sequence[str]) -> dict[str, str]:
    """The candidates that a study's file has a name for: the log's name -> the file's."""
    return {
        **{model_label(index): name for index, name in enumerate(models)},
        **{warm_label(index): name for index, name in enumerate(warm_start)},
    }


def uniform_label(scale: float) -> str:
    """The candidate name of the uniform merge whose weights are all `scale`."""
    return f"{UNIFORM} {scale:g}"


def baselines(space: SearchSpace) -> tuple[Candidate, ...]:
    """The base, each model, and the uniform merge (`SearchSpace.uniform_recipe`)."""
    return (
        Candidate(BASE, _plain(space.base_model, space.whole)),
        *(
            Candidate(model_label(index), _plain(model, space.whole))
            for index, model in enumerate(space.models)
        ),
        Candidate(UNIFORM, space.uniform_recipe()),
    )


def plain_recipe(model: str, dtype: str) -> Recipe:
    """The recipe that is `model` as it is, in `dtype`."""
    return _plain(model, {"dtype": dtype})


def _plain(model: str, whole: Mapping[str, object]) -> Recipe:
    mapping = {"merge_method": "passthrough", "models": [{"model": model}], **whole}
    return recipe_from_mapping(mapping, model)


def candidate_of(space: SearchSpace, history: History, label: str) -> Candidate:
    """The candidate of this name. Raises KeyError where there is none."""
    if label in (BASE, UNIFORM) or label.startswith(_MODEL):
        return {candidate.label: candidate for candidate in baselines(space)}[label]
    return Candidate(label, space.decode(genome_of(history, label)))


def genome_of(history: History, label: str) -> tuple[float, ...]:
    """The genome of a trial, or of a candidate with a name. Raises KeyError where there is none."""
    if label in history.named:
        return history.named[label]
    return history.genomes[trial_number(label)]


def trial_number(label: str) -> int:
    """The number of the trial of this name; KeyError for another candidate's."""
    kind, _, number = label.partition(" ")
    if kind != trial_label(0).partition(" ")[0] or not number.isdecimal():
        raise KeyError(label)
    return int(number)


def recipe_digest(recipe: Recipe) -> str:
    """A short hash of everything that a recipe says."""
    text = json.dumps(recipe.to_mapping(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def space_to_mapping(space: SearchSpace) -> dict[str, Any]:
    """A search space as plain values, for the log."""
    key = "genome" if isinstance(space.config, GenomeConfig) else "config"
    return {
        key: space.config.model_dump(mode="json"),
        "base_model": space.base_model,
        "models": list(space.models),
        "num_layers": space.num_layers,
        "dtype": space.dtype,
    }


def space_from_mapping(mapping: Mapping[str, Any]) -> SearchSpace:
    """The search space of `space_to_mapping`."""
    kind = GenomeConfig if "genome" in mapping else SpaceConfig
    return SearchSpace.build(
        kind.model_validate(mapping["genome" if "genome" in mapping else "config"]),
        base_model=mapping["base_model"],
        models=mapping["models"],
        num_layers=mapping["num_layers"],
        dtype=mapping["dtype"],
    )
