"""`evomerge reproduce`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.commands.eval import print_evaluation
from evomerge.commands.options import (
    DataOption,
    JsonOption,
    JudgeKeyOption,
    JudgeLocalOption,
    JudgeModelOption,
    JudgeUrlOption,
    LimitOption,
    OverwriteOption,
    StorageOption,
    TrialsOption,
    TrustOption,
    judge_of_options,
    storage_directory,
)
from evomerge.commands.search import run
from evomerge.commands.terminal import (
    engines_at_work,
    from_here,
    interrupted,
    print_json,
    say,
    stdout_for_results,
)
from evomerge.errors import ConfigError
from evomerge.resources import locate

if TYPE_CHECKING:
    from evomerge.evaluate.judge_config import JudgeConfig
    from evomerge.report.reproduction import Reproduced


def reproduce(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE|PRESET", help="A mixture with `reproduce:`, or a study."),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of a mixture; else its name.")
    ] = None,
    data: DataOption = None,
    limit: LimitOption = None,
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_key_env: JudgeKeyOption = None,
    judge_local: JudgeLocalOption = None,
    engine: Annotated[
        str | None, typer.Option(metavar="vllm|transformers", help="Instead of the file's.")
    ] = None,
    trials: TrialsOption = None,
    gguf: Annotated[
        str | None, typer.Option(metavar="TYPE|none", help="The GGUF file's type; else q8_0.")
    ] = None,
    storage: StorageOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    trust_code: TrustOption = False,
) -> None:
    """Build or search what a file describes, and evaluate it.

    The result is evaluated beside its parents and drawn; its card and GGUF file are written.
    """
    from evomerge.report.reproduction import is_mixture_file

    path = locate(file, "mixtures", "search_spaces")
    judge = judge_of_options(judge_model, judge_url, judge_key_env, judge_local)
    if is_mixture_file(path):
        if trials is not None:
            raise ConfigError(f"--trials: {path} describes a mixture, which is not searched for")
        found = _reproduce_mixture(
            path, out, data, limit, judge, engine, gguf, storage_directory(storage),
            overwrite=overwrite, trust_code=trust_code,
        )  # fmt: skip
    else:
        for option, value in (("--out", out), ("--limit", limit)):
            if value is not None:
                raise ConfigError(f"{option}: {path} is a study; this is for mixtures")
        found = _reproduce_study(
            path,
            data,
            judge,
            engine,
            gguf,
            storage,
            trials,
            trust_code=trust_code,
            show=not as_json,
        )
    if as_json:
        print_json(found.document)
    else:
        print_evaluation(found.document)
        for what, where in (("model", found.model), ("table", found.table), ("GGUF", found.gguf)):
            if where is not None:
                print(f"{what:<7} {from_here(where.absolute())}")
        for chart in found.charts:
            print(f"{'chart':<7} {from_here(chart.absolute())}")
    if any(row["reason"] is not None for row in found.document["models"]):
        raise typer.Exit(1)


def _reproduce_mixture(  # noqa: PLR0917
    path: Path,
    out: Path | None,
    data: Path | None,
    limit: int | None,
    judge: JudgeConfig | None,
    engine: str | None,
    gguf: str | None,
    storage: Path,
    *,
    overwrite: bool,
    trust_code: bool,
) -> Reproduced:
    from evomerge.report.merge_display import MergeDisplay
    from evomerge.report.reproduction import Reproduction, read_mixture_file

    wanted = read_mixture_file(path, trust_code=trust_code)
    if gguf is not None:
        wanted = wanted.with_gguf(None if gguf == "none" else gguf)
    try:
        with engines_at_work():
            return Reproduction(
                file=wanted,
                out=out or Path(wanted.reproduce.name),
                storage=storage,
                live=wanted.live(engine),
                judge=judge or wanted.reproduce.judge,
                environment=os.environ,
                data=data,
                limit=limit,
                overwrite=overwrite,
                say=say,
                display=lambda: MergeDisplay(sys.stderr),
            ).run()
    except KeyboardInterrupt:
        raise interrupted("interrupted; the same command goes on where it stopped") from None


def _reproduce_study(  # noqa: PLR0917
    path: Path,
    data: Path | None,
    judge: JudgeConfig | None,
    engine: str | None,
    gguf: str | None,
    storage: Path | None,
    trials: int | None,
    *,
    trust_code: bool,
    show: bool,
) -> Reproduced:
    from evomerge.report.reproduction import check_study, evaluate_study, live_settings
    from evomerge.search.study import read_study, with_options

    config = read_study(str(path), trust_code=trust_code)
    config = with_options(config, data=data, judge=judge, engine=engine)
    directory = storage_directory(storage, config)
    kind = None if gguf == "none" else gguf or "q8_0"
    with stdout_for_results():
        check_study(config, directory, kind, os.environ)
    run(config, directory, trials, seed=None, trust_code=trust_code, show=show)
    with engines_at_work():
        return evaluate_study(
            config,
            directory,
            live_settings(config.engine),
            gguf=kind,
            environment=os.environ,
            say=say,
        )
