"""The model card of a merge, in the form that mergekit's cards have on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from evomerge.recipe import Recipe


@dataclass(frozen=True)
class CardModel:
    """A model of the recipe as a reader knows it, and the hub repositories it was made from."""

    written: str
    hub_ids: tuple[str, ...] = ()

    def linked(self) -> str:
        """The name, as a link to the hub where it is one repository there."""
        if len(self.hub_ids) == 1 and self.written.partition("@")[0] == self.hub_ids[0]:
            return f"[{self.written}](https://huggingface.co/{self.hub_ids[0]})"
        return self.written


def model_card(
    title: str, recipe: Recipe, models: Mapping[str, CardModel], origin: str = ""
) -> str:
    """README.md for the model of `recipe`.

    `models` says how a reader knows the recipe's models; those it lacks are called as in the
    recipe. `origin` is a sentence on how the recipe was found. The front matter lists hub
    repositories only, without revisions. The recipe is shown with the names that a reader knows,
    not with the folders that they are on this machine.
    """
    known = {name: models.get(name, CardModel(name)) for name in recipe.model_names()}
    readable = recipe.with_models({name: model.written for name, model in known.items()})
    parts = [
        _front_matter(known.values()),
        f"# {title}\n",
        f"This is a merge of language models made with evomerge. {origin}".rstrip() + "\n",
        "## Merge Details",
        f"### Merge Method\n\n{_method(recipe, known)}\n",
        f"### Models Merged\n\n{_merged(recipe, known)}\n",
        "### Configuration\n",
        "The configuration, in mergekit's format:\n",
        f"```yaml\n{readable.to_yaml()}```\n",
    ]
    return "\n".join(parts)


def _front_matter(models: Iterable[CardModel]) -> str:
    hub_ids = list(dict.fromkeys(hub_id for model in models for hub_id in model.hub_ids))
    front: dict[str, object] = {"base_model": hub_ids} if hub_ids else {}
    front |= {"library_name": "transformers", "tags": ["mergekit", "merge", "evomerge"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _method(recipe: Recipe, known: Mapping[str, CardModel]) -> str:
    rules = recipe.rules
    method = f"[{rules.title}]({rules.paper})" if rules.paper else rules.title
    base = f", with {known[recipe.base_model].linked()} as base" if recipe.base_model else ""
    return f"Merged with the {method} method{base}."


def _merged(recipe: Recipe, known: Mapping[str, CardModel]) -> str:
    names = recipe.model_names()
    others = [name for name in names if name != recipe.base_model] or names
    return "\n".join(f"* {known[name].linked()}" for name in others)
