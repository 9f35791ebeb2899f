"""The model card has the parts that hub pages and mergekit's cards have."""

from __future__ import annotations

from typing import Any

import yaml

from evomerge.recipe import Recipe, parse_recipe
from evomerge.report.card import CardModel, model_card

MODELS = {
    "/models/base_1": CardModel("owner/base@main", ("owner/base",)),
    "/models/expert_2": CardModel("owner/base+me/lora", ("owner/base", "me/lora")),
    "/models/mine": CardModel("./mine"),
}


def recipe(method: str = "task_arithmetic") -> Recipe:
    base = "base_model: /models/base_1\n" if method == "task_arithmetic" else ""
    return parse_recipe(
        f"merge_method: {method}\n{base}"
        "models:\n"
        "- {model: /models/expert_2, parameters: {weight: 0.25}}\n"
        "- {model: /models/mine, parameters: {weight: 0.5}}\n",
        "recipe.yaml",
    )


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(front)
    return content


def test_the_front_matter_lists_hub_repositories_only_and_once() -> None:
    assert front_matter(model_card("merged", recipe(), MODELS)) == {
        "base_model": ["owner/base", "me/lora"],
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "evomerge"],
    }


def test_without_hub_models_no_base_model_is_claimed() -> None:
    assert "base_model" not in front_matter(model_card("merged", recipe(), {}))


def test_the_method_links_its_paper_and_names_the_base() -> None:
    card = model_card("merged", recipe(), MODELS)
    assert "[Task Arithmetic](https://arxiv.org/abs/2212.04089)" in card
    assert "with [owner/base@main](https://huggingface.co/owner/base) as base" in card
    linear = model_card("merged", recipe("linear"), MODELS)
    assert "[Linear](https://arxiv.org/abs/2203.05482) method." in linear


def test_merged_models_are_listed_as_written_without_the_base() -> None:
    card = model_card("merged", recipe(), MODELS)
    assert [line for line in card.splitlines() if line.startswith("* ")] == [
        "* owner/base+me/lora",
        "* ./mine",
    ]


def test_the_card_tells_no_folder_of_a_model_that_has_a_name() -> None:
    assert "/models/" not in model_card("merged", recipe(), MODELS)
    unnamed = model_card("merged", recipe(), {"/models/mine": MODELS["/models/mine"]})
    assert "* /models/expert_2\n* ./mine\n" in unnamed


def test_the_card_holds_the_recipe_as_a_reader_knows_it() -> None:
    card = model_card("merged", recipe(), MODELS, origin="It is trial 3.")
    block = card.split("```yaml\n")[1].split("```")[0]
    names = {folder: model.written for folder, model in MODELS.items()}
    assert parse_recipe(block, "card") == recipe().with_models(names)
    assert "made with evomerge. It is trial 3.\n" in card
