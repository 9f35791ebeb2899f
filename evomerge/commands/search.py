"""`evomerge search` and `evomerge resume`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.commands.options import (
    NameArgument,
    StorageOption,
    TrialsOption,
    TrustOption,
    storage_directory,
)
from evomerge.commands.status import show_outcome
from evomerge.commands.terminal import engines_at_work, from_here, interrupted, say

if TYPE_CHECKING:
    from evomerge.report.results import Results
    from evomerge.search.study import StudyConfig


def search(
    study: Annotated[
        str, typer.Argument(metavar="STUDY.yaml|PRESET", help="A study file, or a preset's name.")
    ],
    *,
    storage: StorageOption = None,
    trials: TrialsOption = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The seed, instead of the file's.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The study's name, instead of the file's.")
    ] = None,
    trust_code: TrustOption = False,
) -> None:
    """Run a study, or go on where it stopped."""
    from evomerge.search.study import check_study_name, read_study

    config = read_study(study, trust_code=trust_code)
    if name is not None:
        check_study_name(name)
        config = config.model_copy(update={"study": name})
    run(config, storage_directory(storage, config), trials, seed, trust_code=trust_code)


def resume(
    name: NameArgument,
    *,
    storage: StorageOption = None,
    trials: TrialsOption = None,
    trust_code: TrustOption = False,
) -> None:
    """Go on with a study, by its name."""
    from evomerge.search.status import stored_study

    directory = storage_directory(storage)
    config = stored_study(directory, name, trust_code=trust_code)
    run(config, directory, trials, seed=None, trust_code=trust_code)


def run(
    config: StudyConfig,
    storage: Path,
    trials: int | None,
    seed: int | None,
    *,
    trust_code: bool,
    show: bool = True,
) -> None:
    """The search with its display; at the end its model, its report and the table."""
    from rich.console import Console

    from evomerge.report.progress import SearchDisplay
    from evomerge.report.results import write_results
    from evomerge.search.evaluator import Evaluators
    from evomerge.search.loop import run_search
    from evomerge.search.storage import STUDY_FILE
    from evomerge.search.study import study_directory

    try:
        with (
            engines_at_work(),
            SearchDisplay(Console(stderr=True)) as display,
            Evaluators() as evaluators,
        ):
            run_search(
                config,
                storage=storage,
                open_evaluator=evaluators.open,
                trials=trials,
                seed=seed,
                report=display,
            )
            results = write_results(storage, config.study, say)
    except KeyboardInterrupt:
        begun = (study_directory(storage, config.study) / STUDY_FILE).exists()
        command = _resume_command(config.study, storage, trust_code=trust_code)
        going_on = f"go on with: {command}"
        words = f"interrupted; {going_on if begun else 'nothing had begun yet'}"
        raise interrupted(words) from None
    if show:
        _print_results(results)


def _resume_command(name: str, storage: Path, *, trust_code: bool) -> str:
    command = ["evomerge", "resume", name]
    if storage != storage_directory(None):
        command += ["--storage", str(storage)]
    if trust_code:
        command.append("--trust-code")
    return shlex.join(command)


def _print_results(results: Results) -> None:
    from evomerge.report.results import time_split

    show_outcome(results.rows, results.tasks, results.held_out, results.certainty)
    for words, seconds, share in time_split(results.seconds):
        print(f"{words:<24} {seconds:8.1f} s {share:6.1%}")
    for what, path in (
        ("recipe", results.config),
        ("model", results.model),
        ("report", results.report),
    ):
        print(f"{what:<7} {from_here(path)}")
