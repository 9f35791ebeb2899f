from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from evomerge.engine.base import Completion, Each, Engine, GenerationSettings, Loaded
from evomerge.evaluate.suite import Suite, SuiteConfig, Task
from evomerge.recipe import Recipe
from evomerge.search.candidates import plain_recipe
from evomerge.search.evaluator import EngineEvaluator


class DiskEngine(Engine):
    """Loads all but the model "live" by disk, and echoes prompts."""

    name = "disk"
    max_model_len = 8

    def supports(self, recipe: Recipe) -> str | None:
        return None if "live" in recipe.model_names() else "it has 3 layers, the engine 2"

    def load(self, recipe: Recipe) -> Loaded:
        return Loaded("v", "disk" if self.supports(recipe) else "live", 0.0)

    bos_token_id = None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        template: str | None = None,
        cue: bool = True,
    ) -> str:
        raise NotImplementedError

    def has_chat_template(self) -> bool:
        return False

    def encode(self, prompts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [[1 for _ in prompt.split()] for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        add_special_tokens: bool,
        each: Each | None = None,
    ) -> list[Completion]:
        written = [Completion(prompt, (1,), "stop", 1, "v") for prompt in prompts]
        for place, completion in enumerate(written):
            if each is not None:
                each(place, completion)
        return written

    def log_probabilities(
        self, prompts: Sequence[str], *, add_special_tokens: bool
    ) -> list[list[float]]:
        raise NotImplementedError

    def close(self) -> None: ...


SUITE = Suite(SuiteConfig(data="tasks.jsonl"), (Task("a", "x", "x", "all", "x"),))


@pytest.mark.parametrize(("by_disk_is_news", "times"), [(True, 1), (False, 0)])
def test_that_candidates_go_by_disk_is_said_once(by_disk_is_news: bool, times: int) -> None:
    told: list[str] = []
    evaluator = EngineEvaluator(
        DiskEngine(), SUITE, say=told.append, by_disk_is_news=by_disk_is_news
    )
    for model in ("live", "deep", "live", "deeper"):
        (result,) = evaluator.begin(plain_recipe(model, "float32"), ["a"], 0).result()
        assert result.grade == 1.0
    assert told == times * [
        "candidates go by disk, which takes longer than a live switch: "
        "it has 3 layers, the engine 2"
    ]
