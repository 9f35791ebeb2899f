"""A recipe as a complete model directory: weights, config, tokenizer, the recipe itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint, ShardedOutput, total_bytes
from evomerge.merge.headers import TensorSpec
from evomerge.merge.model_files import GENERATION_FILE, read_json, require_tokenizer
from evomerge.merge.plan import MergePlan, make_plan, open_checkpoints
from evomerge.merge.publishing import disk_failure, published, refuse_existing
from evomerge.merge.streaming import Progress, write_merged
from evomerge.merge.tokenizer import write_tokenizer
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    from evomerge.merge.recall import Statistics

RECIPE_FILE = "mergekit_config.yml"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def materialize(
    recipe: Recipe,
    directory: Path,
    *,
    checkpoints: Mapping[str, Checkpoint] | None = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
) -> Path:
    """Writes the model of `recipe` to `directory`, which appears only when it is whole.

    `seed` is that of random methods. `extra_files` are texts by file name (README.md, …).
    `workers`, `progress` and `statistics` are those of `write_merged`, which tells of memory.
    Raises ConfigError before any work where recipe, models, disk or directory do not allow it;
    CandidateError where an output number is NaN or infinite; RunError where the disk fails or is
    full.
    """
    directory = directory.absolute()
    refuse_existing(directory, overwrite=overwrite)
    if checkpoints is None:
        checkpoints = open_checkpoints(recipe)
    plan = make_plan(recipe, checkpoints, seed=seed)
    donor = checkpoints[plan.donor].directory
    tokenizer = plan.vocabulary.source if plan.vocabulary else donor
    refuse_inputs_as_output(
        directory, [checkpoint.directory for checkpoint in checkpoints.values()] + [tokenizer]
    )
    require_tokenizer(tokenizer)
    require_space(directory, plan.entries)
    with published(directory, overwrite=overwrite) as partial:
        with ShardedOutput(partial, plan.entries, max_shard_size) as output:
            write_merged(
                plan,
                checkpoints,
                output,
                workers=workers,
                progress=progress,
                statistics=statistics,
            )
        try:
            _write_tokenizer_and_code(partial, donor, plan)
            _write_texts(partial, donor, plan, recipe, extra_files or {})
        except OSError as error:
            raise disk_failure(partial, error) from error
    return directory


def refuse_inputs_as_output(directory: Path, inputs: Iterable[Path]) -> None:
    """Raises ConfigError where `directory` is, holds or lies in one of the inputs: folders, files.

    Links are followed, those to an input's files too.
    """
    output = directory.resolve()
    for named in inputs:
        if named.resolve() in output.parents:
            raise ConfigError(
                f"{directory}: lies in {named}, which goes into the merge; choose another folder"
            )
        for path in (named, *(named.iterdir() if named.is_dir() else ())):
            source = path.resolve()
            if output == source or output in source.parents:
                raise ConfigError(
                    f"{directory}: holds {path}, which goes into the merge; choose another folder"
                )


def require_space(directory: Path, specs: Sequence[TensorSpec]) -> None:
    """Raises ConfigError where the disk of `directory` has no room for tensors of these `specs`."""
    parent = next(path for path in directory.parents if path.exists())
    needed, free = total_bytes(specs), shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{directory}: the model needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are "
            f"free on this disk"
        )


def _write_tokenizer_and_code(directory: Path, donor: Path, plan: MergePlan) -> None:
    vocabulary = plan.vocabulary
    source, texts = (vocabulary.source, vocabulary.texts) if vocabulary else (donor, None)
    write_tokenizer(directory, source, texts, plan.chat_template)
    for code in donor.glob("*.py"):  # of a model that brings its own (auto_map in its config)
        shutil.copyfile(code, directory / code.name)


def _write_texts(
    directory: Path, donor: Path, plan: MergePlan, recipe: Recipe, extra_files: Mapping[str, str]
) -> None:
    texts = {
        "config.json": as_json(plan.config),
        GENERATION_FILE: _generation_config(donor, plan),
        RECIPE_FILE: recipe.to_yaml(),
        **extra_files,
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _generation_config(donor: Path, plan: MergePlan) -> str:
    file = donor / GENERATION_FILE
    if file.is_file() and plan.vocabulary is not None:
        return as_json(plan.vocabulary.configured(read_json(file), plan.donor))
    return generation_config(donor, plan.config)


def generation_config(donor: Path, config: Mapping[str, Any]) -> str:
    """The donor's, or else the token ids of `config`, as transformers derives it."""
    file = donor / GENERATION_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    tokens = {key: config[key] for key in _TOKEN_KEYS if config.get(key) is not None}
    return as_json({"_from_model_config": True, **tokens})


def as_json(content: Mapping[str, Any]) -> str:
    """`content` as the text of a file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
