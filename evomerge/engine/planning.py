"""What every engine knows of its recipes: their plans, and which of them it can become live."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import MergePlan, make_plan
from evomerge.recipe import Recipe


class Planner:
    """Plans recipes over the checkpoints that an engine was started with.

    `model` is the directory that the engine serves, `sources` what recipes may name besides.
    """

    def __init__(self, model: str, sources: tuple[str, ...], dtype: str) -> None:
        names = dict.fromkeys([model, *sources])
        self.checkpoints: Mapping[str, Checkpoint] = {
            name: Checkpoint.open(Path(name)) for name in names
        }
        self._served = {n: h.shape for n, h in self.checkpoints[model].tensors.items()}
        self._dtype: torch.dtype = getattr(torch, dtype)

    def plan(self, recipe: Recipe) -> MergePlan:
        """The plan of `recipe`; ConfigError or CandidateError where there is none."""
        return make_plan(recipe, self.checkpoints)

    def obstacle(self, plan: MergePlan) -> str | None:
        """Why the served model cannot become that of `plan` in place; None if it can."""
        wanted = {entry.name: tuple(entry.shape) for entry in plan.entries}
        if plan.dtype != self._dtype:
            return f"its dtype is {plan.dtype}, the engine's {self._dtype}"
        if differing := wanted.keys() ^ self._served.keys():
            return f"it and the served model do not both have the tensor {min(differing)}"
        for name, shape in wanted.items():
            if shape != tuple(self._served[name]):
                return f"{name} has shape {shape}, in the served model {self._served[name]}"
        return None


def update_message(recipe: Recipe, plan: MergePlan, *, clear: bool) -> dict[str, Any]:
    """What the backend in vLLM's workers is sent for one candidate: some kilobytes of JSON.

    `clear` has the key-value cache emptied, after a candidate that left NaN in it.
    """
    return {"recipe": recipe.to_mapping(), "digest": plan.digest, "clear": clear}
