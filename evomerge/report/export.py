"""A recipe whose models are references of any kind, as a model folder with its card."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.merge.inputs import InputModels
from evomerge.merge.materialize import RECIPE_FILE, materialize, refuse_inputs_as_output
from evomerge.merge.plan import open_checkpoints, tokenizer_notes
from evomerge.merge.streaming import Progress
from evomerge.recipe import TOKENIZER_PLACES, Recipe
from evomerge.report.card import CardModel, model_card


def merge_recipe(
    recipe: Recipe,
    out: Path,
    inputs: InputModels,
    *,
    verbatim: str,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Writes the model of a recipe whose models are references of any kind; `verbatim` is its file.

    Raises ConfigError before any work where recipe, models or `out` do not allow it.
    """
    # What a reference is made of, too: an applied adapter and its model lie in another folder.
    named = [path for name in recipe.references() for path in inputs.local_paths(name)]
    refuse_inputs_as_output(out.absolute(), named)
    folders = _folders(recipe, inputs)
    known = {folder: CardModel(name, inputs.hub_ids(name)) for name, folder in folders.items()}
    resolved = recipe.with_models(folders)
    checkpoints = open_checkpoints(resolved)
    for note in tokenizer_notes(resolved, checkpoints):
        inputs.say(f"warning: {note}")
    texts = {"README.md": model_card(out.name, resolved, known), RECIPE_FILE: verbatim}
    return materialize(
        resolved,
        out,
        checkpoints=checkpoints,
        extra_files=texts,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        seed=seed,
        progress=progress,
    )


def _folders(recipe: Recipe, inputs: InputModels) -> dict[str, str]:
    """The folder of every model; all that are not to be had are told at once, with their keys."""
    places = recipe.places()
    folders, mistakes = inputs.resolve_all(places)
    if mistakes:
        raise ConfigError("\n".join(_told(places[name], mistakes[name]) for name in mistakes))
    return {name: str(folder) for name, folder in folders.items()}


def _told(place: str, mistake: ConfigError) -> str:
    hint = " (or write base or union)" if place in TOKENIZER_PLACES else ""
    return f"{place}: {mistake}{hint}"
