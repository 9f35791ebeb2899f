"""`evomerge eval`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.commands.options import (
    ContextOption,
    DataOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    JudgeKeyOption,
    JudgeLocalOption,
    JudgeModelOption,
    JudgeUrlOption,
    LimitOption,
    MemoryOption,
    OverwriteOption,
    StorageOption,
    ThreadsOption,
    input_models,
    judge_of_options,
    live_settings,
    storage_directory,
)
from evomerge.commands.terminal import (
    engines_at_work,
    interrupted,
    print_json,
    refuse_existing_file,
    require_folder_of,
    say,
    write_new,
)
from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.evaluate.suite import Suite
    from evomerge.evaluate.task import Task
    from evomerge.merge.inputs import InputModels
    from evomerge.search.side_by_side import Contestant


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folders, .gguf files, hub names; each with +ADAPTER, too."
        ),
    ],
    *,
    suite: Annotated[str, typer.Option(metavar="SUITE", help="A preset's name, or a suite file.")],
    data: DataOption = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="The split of the suite to take.")
    ] = None,
    limit: LimitOption = None,
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_key_env: JudgeKeyOption = None,
    judge_local: JudgeLocalOption = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the tables as Markdown.")
    ] = None,
    radar: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.png", help="Draw a radar chart (.png, .svg, .pdf); repeatable."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all answers, with grades, to a .parquet or .csv file."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Answer again what the ledger has already.")
    ] = False,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
    max_model_len: ContextOption = None,
    gpu_memory_utilization: MemoryOption = None,
    threads: ThreadsOption = None,
    storage: StorageOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Let a suite grade by code that its file names, and a judge get any file and key.",
        ),
    ] = False,
) -> None:
    """Evaluate models side by side.

    Each is compared with the first one, paired task by task.
    """
    from evomerge.evaluate.graders import check_graders, needs_judge
    from evomerge.report.answers import export_answers
    from evomerge.report.radar import draw_radar
    from evomerge.report.side_by_side import evaluation_markdown, evaluation_radar
    from evomerge.search.side_by_side import answer_rows, evaluation_json, measure_models

    live = live_settings(engine, dtype, max_model_len, gpu_memory_utilization, threads)
    inputs = input_models(storage, dtype)
    wanted, tasks = _suite(suite, inputs, data, limit, split=split, trust_code=trust_code)
    judge = judge_of_options(judge_model, judge_url, judge_key_env, judge_local)
    if needs_judge(wanted) and judge is None:
        raise ConfigError(
            f"--judge-model: is missing, and {suite} is graded by a judge; as --judge-model "
            "gpt-4.1 --judge-key-env OPENAI_API_KEY, or --judge-model NAME --judge-url "
            "http://127.0.0.1:8000/v1, or --judge-local MODEL"
        )
    check_graders(wanted, judge, trust_code=trust_code, environment=os.environ)
    _check_outputs(markdown, answers, radar or (), tasks, overwrite=overwrite)
    with engines_at_work():
        contestants = _contestants(models, inputs)
        try:
            measured = measure_models(
                wanted,
                tasks,
                contestants,
                live=live,
                judge=judge,
                storage=storage_directory(storage),
                folder=Path(),
                environment=os.environ,
                fresh=fresh,
                say=say,
                trust_code=trust_code,
            )
        except KeyboardInterrupt:
            words = "interrupted; the same command goes on, and pays for nothing twice"
            raise interrupted(words) from None
    name = suite if split is None else f"{suite}, split {split}"
    found = evaluation_json(name, wanted, measured, judge)
    if as_json:
        print_json(found)
    else:
        print_evaluation(found)
    if markdown is not None:
        write_new(markdown, evaluation_markdown(found), overwrite=overwrite)
    if answers is not None:
        export_answers(answer_rows(measured), answers)
    if radar and any(one.score is not None for one in measured):
        for note in draw_radar(evaluation_radar(found), radar, title=Path(suite).stem):
            say(f"note: {note}")
    if any(one.reason is not None for one in measured):
        raise typer.Exit(1)


def _check_outputs(
    markdown: Path | None,
    answers: Path | None,
    radar: Sequence[Path],
    tasks: Sequence[Task],
    *,
    overwrite: bool,
) -> None:
    """Raises ConfigError or OutputExistsError where a file that is to be written cannot be."""
    from evomerge.report.answers import check_export
    from evomerge.report.charts import check_charts
    from evomerge.report.side_by_side import check_radar_categories

    if answers is not None:
        check_export(answers)
    for path in (markdown, answers):
        if path is not None:
            refuse_existing_file(path, overwrite=overwrite)
    if radar:
        check_radar_categories(task.category for task in tasks)
        check_charts(radar, overwrite=overwrite)
        for path in radar:
            require_folder_of(path)


def _suite(
    reference: str,
    inputs: InputModels,
    data: Path | None,
    limit: int | None,
    *,
    split: str | None,
    trust_code: bool,
) -> tuple[Suite, list[Task]]:
    """A suite, and its tasks or as many of them as `limit`, of all categories alike."""
    from evomerge.evaluate.suite import load_suite
    from evomerge.optimizer.tasks import draw_tasks

    suite = load_suite(
        reference,
        Path(),
        data=data,
        trust_code=trust_code,
        typed=True,
        split=split,
        find_model=inputs.resolve,
    )
    if limit is None or limit >= len(suite.tasks):
        return suite, list(suite.tasks)
    drawn = set(draw_tasks({task.id: task.category for task in suite.tasks}, limit, 0, 0))
    return suite, [task for task in suite.tasks if task.id in drawn]


def _contestants(models: Sequence[str], inputs: InputModels) -> list[Contestant]:
    """The models with their folders; every one that is not to be had is told at once."""
    from evomerge.search.side_by_side import Contestant

    twice = [f"{name}: is there twice" for name in dict.fromkeys(models) if models.count(name) > 1]
    folders, wrong = inputs.resolve_all(models)
    if twice or wrong:
        raise ConfigError("\n".join([*twice, *map(str, wrong.values())]))
    return [Contestant(name, folders[name]) for name in models]


def print_evaluation(found: Mapping[str, Any]) -> None:
    from evomerge.report.screen import Screen
    from evomerge.report.side_by_side import categories_table, evaluation_notes, evaluation_table

    screen = Screen()
    screen.show(evaluation_table(found), categories_table(found))
    screen.tell(evaluation_notes(found))
