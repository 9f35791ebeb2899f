from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import pytest

from evomerge.engine.base import Completion, Each, Engine, GenerationSettings, Loaded
from evomerge.errors import RunError
from evomerge.evaluate.suite import Suite, SuiteConfig, Task
from evomerge.evaluate.task import AnsweredRunError, GradeRequest, ScorerGrade
from evomerge.recipe import Recipe
from evomerge.search.candidates import plain_recipe
from evomerge.search.evaluator import EngineEvaluator
from evomerge.search.held_out import HeldOutSuite


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


class GoneAtFirst:
    """A grader that is gone when it is first asked, and gives 4 to everything from then on."""

    name = "judge"
    low, high = 1.0, 5.0
    needs_gpu = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def grade_all(self, items: Sequence[GradeRequest]) -> Future[list[ScorerGrade]]:
        self.asked += [item.task.id for item in items]
        grades: Future[list[ScorerGrade]] = Future()
        if len(self.asked) == len(items):
            grades.set_exception(RunError("gone"))
        else:
            grades.set_result([ScorerGrade("judge", 4.0) for _ in items])
        return grades


def test_a_second_suites_answers_are_kept_and_graded_under_the_names_of_the_search() -> None:
    rubric = {"prompt": "{{ answer }}", "low": 1, "high": 5}
    config = SuiteConfig.model_validate({"scorer": "judge", "rubric": rubric, "data": "a.jsonl"})
    suite = Suite(config, tuple(Task(name, name, "", "all", name) for name in ("a", "b")))
    judge = GoneAtFirst()
    evaluator = EngineEvaluator(
        DiskEngine(), suite, held_out=HeldOutSuite(suite), held_out_graders={"judge": judge}
    )
    names = ["holdout/b", "holdout/a"]
    with pytest.raises(AnsweredRunError) as caught:
        evaluator.begin(plain_recipe("live", "float32"), names, 0).result()
    kept = caught.value.answers
    assert [(one.task_id, one.answer, one.grade) for one in kept] == [
        ("holdout/b", "b", None),
        ("holdout/a", "a", None),
    ]
    graded = evaluator.grade(kept, 0).result()
    assert [(one.task_id, one.answer, one.grade) for one in graded] == [
        ("holdout/b", "b", 4.0),
        ("holdout/a", "a", 4.0),
    ]
    assert judge.asked == ["b", "a", "b", "a"]
