"""Where a search starts beside its sweep: merges from recipe files, and other studies' winners."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import CandidateError, ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.inputs import InputModels
from evomerge.merge.plan import make_plan
from evomerge.recipe import Recipe, read_recipe
from evomerge.search.candidates import space_from_mapping, warm_label
from evomerge.search.log import begun_with
from evomerge.search.resolve import ResolvedStudy
from evomerge.search.status import best_so_far, best_trial, existing_log, trial_recipe
from evomerge.space import Genome
from evomerge.space.adopt import adopted

_RECIPES = (".yaml", ".yml")


def warm_starts(study: ResolvedStudy) -> dict[str, list[float]]:
    """The genomes of what `warm_start:` names, by `warm_label`; they are within the bounds.

    What ends in .yaml is a recipe's file, relative to the study's, else a study of this storage.
    Raises ConfigError that says of each what is wrong with it.
    """
    genomes: dict[str, list[float]] = {}
    mistakes: list[str] = []
    for number, reference in enumerate(study.config.warm_start):
        try:
            genomes[warm_label(number)] = _genome(study, reference).tolist()
        except (ConfigError, CandidateError) as error:
            mistakes.append(f"{study.config.where}: warm_start.{number}: {reference}: {error}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return genomes


def _genome(study: ResolvedStudy, reference: str) -> Genome:
    if Path(reference).suffix not in _RECIPES:
        return _of_study(study, reference)
    path = study.config.folder / Path(reference).expanduser()
    return _checked(study, _with_folders(study, read_recipe(path), path.parent))


def _of_study(study: ResolvedStudy, name: str) -> Genome:
    """The winner of another study, of one that is not finished its best trial so far.

    Where a model as it is has won, the best trial stands in.
    """
    if name == study.name:
        raise ConfigError("is this very study; it goes on by itself")
    log = existing_log(study.storage, name)
    log.close()
    history = log.history
    best, trial = best_so_far(history), best_trial(history)
    if best is not None and best.source == "model":
        best = trial
    if best is None:
        raise ConfigError("has no scored merge yet")
    if best.number is not None and space_from_mapping(begun_with(log)["space"]) == study.space:
        return study.space.clip(history.genomes[best.number])
    return _checked(study, trial_recipe(study.storage, name, best.number))


def _with_folders(study: ResolvedStudy, recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the folders of its models, which it names as the study does, or by path."""
    config = study.config
    written = (config.base_model, *config.models)
    folders = dict(zip(written, map(str, (study.base, *study.models)), strict=True))
    inputs = InputModels(study.storage, folder, config.engine.dtype)
    for name in recipe.model_names():
        if name not in folders and inputs.local_paths(name):
            folders[name] = str(inputs.resolve(name))
    return recipe.with_models(folders)


def _checked(study: ResolvedStudy, recipe: Recipe) -> Genome:
    """The genome of the recipe, which is the same merge to the last number of every tensor."""
    genome, fitting = adopted(study.space, recipe)
    checkpoints = {str(folder): Checkpoint.open(folder) for folder in (study.base, *study.models)}
    plans = [make_plan(each, checkpoints) for each in (fitting, study.space.decode(genome))]
    if plans[0].digest != plans[1].digest:
        raise ConfigError(
            "is no merge of this search space: its numbers for some tensors, or its settings "
            "beside them, are none that the space can say"
        )
    return genome
