"""The commands that show, answer, evaluate and compare; heavy imports wait inside them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.errors import CandidateError, ConfigError
from evomerge.terminal import (
    INTERRUPTED,
    JsonOption,
    OverwriteOption,
    StorageOption,
    refuse_existing_file,
    require_folder_of,
    say,
    stdout_for_results,
    storage_directory,
    write_new,
)

if TYPE_CHECKING:
    from evomerge.engine.live_models import LiveSettings
    from evomerge.evaluate.answering import Answers, AskedTask
    from evomerge.evaluate.judge_config import JudgeConfig
    from evomerge.evaluate.router import Router
    from evomerge.evaluate.suite import Suite
    from evomerge.evaluate.task import Task
    from evomerge.merge.inputs import InputModels
    from evomerge.search.side_by_side import Contestant

DataOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The suite's tasks, in place of its own.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Let a suite grade by code that its file names, and a judge get any file and key.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="N tasks, of all categories alike.")
]
JudgeModelOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who grades, where the suite has a judge.")
]
JudgeUrlOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Its OpenAI-compatible API (…/v1).")
]
JudgeKeyOption = Annotated[
    str | None, typer.Option(metavar="VAR", help="The variable that holds its key.")
]
JudgeLocalOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A judge that vLLM serves here instead.")
]
EngineOption = Annotated[
    str,
    typer.Option(metavar="auto|vllm|transformers", help="auto: vLLM where it is installed."),
]
DtypeOption = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32; else its own.")
]
ContextOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens of prompt and answer together.")
]
MemoryOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Of the GPU's memory, for vLLM (its default: 0.9)."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU threads; else one per core.")
]


def radar(
    table: Annotated[Path, typer.Argument(metavar="TABLE.csv", help="Scores by category.")],
    out: Annotated[list[Path], typer.Argument(metavar="OUT.png", help="PNG, SVG or PDF files.")],
    *,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="What stands above.")] = None,
    low: Annotated[
        float | None, typer.Option("--min", metavar="X", help="The score in the middle.")
    ] = None,
    high: Annotated[
        float | None, typer.Option("--max", metavar="X", help="The score at the rim.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a radar chart of a table of scores.

    Models and categories are the table's, and error bars where it has them.
    """
    from evomerge.report.charts import check_charts
    from evomerge.report.radar import draw_radar
    from evomerge.report.radar_table import read_radar_table

    scores = read_radar_table(table)
    check_charts(out, overwrite=overwrite)
    for note in draw_radar(scores, out, title=title, bounds=(low, high)):
        say(f"note: {note}")
    for path in out:
        print(path)


def answers(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")],
    *,
    storage: StorageOption = None,
    trial: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=0, help="Of this trial; may be said more than once."),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="T", help="To this task alone.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all of them to a .parquet or .csv file."),
    ] = None,
    as_json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Show what a study's candidates answered.

    Answers stand side by side, with grades and the judge's words.

    Without --trial and --task: base and winner on the screen, all answers in JSON and files.
    """
    from evomerge.report.answers import answer_panels, check_export, export_answers, row_to_json
    from evomerge.search.answers import study_answers, study_titles

    if export is not None:
        check_export(export)
        refuse_existing_file(export, overwrite=overwrite)
    few = export is None and not as_json
    directory = storage_directory(storage)
    rows = study_answers(directory, name, trial or (), task, few=few)
    if export is not None:
        export_answers(rows, export)
        say(f"{len(rows)} answers")
        print(export)
    elif as_json:
        found = [row_to_json(row) for row in rows]
        print(json.dumps({"study": name, "answers": found}, indent=2, ensure_ascii=False))
    else:
        from evomerge.report.screen import Screen
        from evomerge.search.log import trial_label

        titles = study_titles(directory, name)
        Screen(page=True).show(*answer_panels(rows, titles))
        answered = {row.candidate for row in rows}
        for number in trial or ():
            if trial_label(number) not in answered:
                say(f"note: trial {number} was not asked {task or 'any task'}")


def compare(
    first: Annotated[str, typer.Argument(metavar="STUDY_A", help="A study's name.")],
    second: Annotated[str, typer.Argument(metavar="STUDY_B", help="Another one's.")],
    *,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the winners of two studies.

    They are paired on the tasks that both answered.
    """
    from evomerge.search.compare import compare_studies

    found = compare_studies(storage_directory(storage), first, second)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from evomerge.report.comparison import comparison_lines, comparison_table, tasks_table
    from evomerge.report.screen import Screen

    screen = Screen()
    screen.show(comparison_table(found), tasks_table(found))
    screen.tell(comparison_lines(found))


def show_importance(storage: Path, name: str | None, *, as_json: bool) -> None:
    """`evomerge status NAME --importance`: the status with one key more, or its table."""
    if name is None:
        raise ConfigError("--importance is about one study: evomerge status NAME --importance")
    from evomerge.search.sensitivity import study_sensitivity

    found = study_sensitivity(storage, name)
    if as_json:
        from evomerge.search.status import study_status

        document = {**study_status(storage, name), "importance": found}
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    from evomerge.report.importance import importance_lines, importance_table, sums_table
    from evomerge.report.screen import Screen

    screen = Screen()
    screen.show(importance_table(found), sums_table(found))
    screen.tell(importance_lines(found))


def answer(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a .gguf file, a hub name; each with +ADAPTER, too."
        ),
    ],
    tasks: Annotated[
        Path, typer.Argument(metavar="TASKS.jsonl", help='Lines of {"task_id", "input"}.')
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT.jsonl", help="The file to write.")
    ],
    router: Annotated[
        Path | None,
        typer.Option(metavar="TABLE.xlsx", help="Prompts by example: .xlsx, .csv or .jsonl."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="Least likeness of an example; else the default prompt."),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare by this model's vectors, not by letters."),
    ] = None,
    embedding_prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Before each text (E5: 'query: ').")
    ] = "",
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Never use a task as its own example.")
    ] = False,
    routes: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write where each task went.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEMPLATE", help="Jinja: {{ input }}, {{ id }}.")
    ] = "{{ input }}",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="By the chat template; else if there is one."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="The most tokens of an answer.")
    ] = 512,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="X", min=0.000001, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(metavar="X", min=0.01)] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends an answer; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of sampled answers.")] = 0,
    unit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tasks in one call; a kill loses no more.")
    ] = 64,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
    max_model_len: ContextOption = None,
    gpu_memory_utilization: MemoryOption = None,
    threads: ThreadsOption = None,
    storage: StorageOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Answer tasks with a model into a JSONL file.

    After a kill the same command goes on.
    """
    from evomerge.engine.base import GenerationSettings
    from evomerge.evaluate.answering import (
        Answers,
        AnswerSettings,
        answers_digest,
        ask_all,
        read_open_tasks,
    )
    from evomerge.evaluate.prompts import Chat
    from evomerge.evaluate.router import summary

    live = _live_settings(engine, dtype, max_model_len, gpu_memory_utilization, threads)
    asked_of = read_open_tasks(tasks)
    if routes is not None:
        refuse_existing_file(routes, overwrite=overwrite)
    inputs = _inputs(storage, dtype)
    with engines_at_work():
        table = _router(router, inputs, embedding, embedding_prefix, threshold)
        settings = AnswerSettings(
            generation=GenerationSettings(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                stop=tuple(stop or ()),
                seed=seed if temperature else None,
            ),
            chat=Chat(chat, system),
            prompt=prompt,
            leave_one_out=leave_one_out,
        )
        asked = ask_all(asked_of, settings, table)
        found = [one.route for one in asked if one.route is not None]
        if found:
            say(f"routes: {summary(found)}")
        folder = inputs.resolve(model)
        digest = answers_digest(asked, unit, *_identity(folder, live))
        answers = Answers(out, asked_of, digest)
        answers.begin(overwrite=overwrite)
        _answer_all(folder, live, asked, answers, unit)
        if routes is not None:
            lines = [
                json.dumps({"task_id": one.task.key, **one.route.to_mapping()}, ensure_ascii=False)
                for one in asked
                if one.route is not None
            ]
            write_new(routes, "".join(f"{line}\n" for line in lines), overwrite=overwrite)
        answers.finish()
    print(out)


@contextlib.contextmanager
def engines_at_work() -> Iterator[None]:
    """What engines print goes to stderr, and nothing of what their libraries warn themselves of."""
    with stdout_for_results(), warnings.catch_warnings():
        # Of vLLM's and torch's own code: nothing that a reader could mend.
        warnings.simplefilter("ignore", FutureWarning)
        yield


def eval_(
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
    trust_code: TrustOption = False,
) -> None:
    """Evaluate models side by side.

    Each is compared with the first one, paired task by task.
    """
    from evomerge.evaluate.graders import check_graders, needs_judge
    from evomerge.report.charts import check_charts
    from evomerge.report.radar import draw_radar
    from evomerge.report.side_by_side import (
        check_radar_categories,
        evaluation_markdown,
        evaluation_radar,
    )
    from evomerge.search.side_by_side import evaluation_json, measure_models

    live = _live_settings(engine, dtype, max_model_len, gpu_memory_utilization, threads)
    inputs = _inputs(storage, dtype)
    wanted, tasks = _suite(suite, inputs, data, limit, split=split, trust_code=trust_code)
    judge = judge_of_options(judge_model, judge_url, judge_key_env, judge_local)
    if needs_judge(wanted) and judge is None:
        raise ConfigError(
            f"--judge-model: is missing, and {suite} is graded by a judge; as --judge-model "
            "gpt-4.1 --judge-key-env OPENAI_API_KEY, or --judge-model NAME --judge-url "
            "http://127.0.0.1:8000/v1, or --judge-local MODEL"
        )
    check_graders(wanted, judge, trust_code=trust_code, environment=os.environ)
    if markdown is not None:
        refuse_existing_file(markdown, overwrite=overwrite)
    if radar:
        check_radar_categories(task.category for task in tasks)
        check_charts(radar, overwrite=overwrite)
        for path in radar:
            require_folder_of(path)
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
            say("interrupted; the same command goes on, and pays for nothing twice")
            raise typer.Exit(INTERRUPTED) from None
    name = suite if split is None else f"{suite}, split {split}"
    found = evaluation_json(name, wanted, measured, judge)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_evaluation(found)
    if markdown is not None:
        write_new(markdown, evaluation_markdown(found), overwrite=overwrite)
    if radar and any(one.score is not None for one in measured):
        for note in draw_radar(evaluation_radar(found), radar, title=Path(suite).stem):
            say(f"note: {note}")
    if any(one.reason is not None for one in measured):
        raise typer.Exit(1)


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
    from evomerge.search.tasks import draw_tasks

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


def judge_of_options(
    model: str | None, url: str | None, key_env: str | None, local: str | None
) -> JudgeConfig | None:
    from evomerge.evaluate.judge_config import judge_from_mapping

    said = {"model": model, "base_url": url, "api_key_env": key_env, "local": local}
    given = {key: value for key, value in said.items() if value is not None}
    return judge_from_mapping(given, "--judge-…") if given else None


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


def _answer_all(
    folder: Path, live: LiveSettings, asked: Sequence[AskedTask], answers: Answers, unit: int
) -> None:
    """Starts an engine, unless all is answered already; Ctrl-C says how to go on."""
    from evomerge.engine.live_models import LiveModels
    from evomerge.evaluate.answering import answer as answer_all
    from evomerge.report.bar import TaskBar

    if len(answers.done) == len(asked):
        return
    if answers.done:
        say(f"going on after {len(answers.done)} of {len(asked)} tasks")
    try:
        with LiveModels([folder], live, say).opened() as each, TaskBar(len(asked)) as bar:
            bar(len(answers.done))
            for _, engine in each:
                if isinstance(engine, CandidateError):
                    raise engine
                answer_all(engine, asked, answers, unit=unit, told=bar)
    except KeyboardInterrupt:
        say(
            f"interrupted after {len(answers.done)} of {len(asked)} tasks; the same command goes on"
        )
        raise typer.Exit(INTERRUPTED) from None


def _live_settings(
    engine: str,
    dtype: str | None,
    max_model_len: int | None,
    memory: float | None,
    threads: int | None,
) -> LiveSettings:
    from evomerge.engine.live_models import LiveSettings
    from evomerge.search.evaluator import NO_VLLM
    from evomerge.search.resolve import engine_name

    if engine not in {"auto", "vllm", "transformers"}:
        raise ConfigError(f"--engine: {engine!r} is none; there are auto, vllm and transformers")
    if dtype not in {None, "bfloat16", "float16", "float32"}:
        raise ConfigError(f"--dtype: {dtype!r} is none; there are bfloat16, float16 and float32")
    name = engine_name(engine)
    if name != engine and name == "transformers":
        say(NO_VLLM)
    options: dict[str, object] = {}
    if max_model_len is not None:
        options["max_model_len"] = max_model_len
    if memory is not None and name == "vllm":
        options["gpu_memory_utilization"] = memory
    return LiveSettings(name, dtype, threads, options)


def _inputs(storage: Path | None, dtype: str | None) -> InputModels:
    from evomerge.merge.inputs import InputModels

    return InputModels(storage_directory(storage), dtype=dtype or "bfloat16", say=say)


def _router(
    table: Path | None,
    inputs: InputModels,
    embedding: str | None,
    prefix: str,
    threshold: float | None,
) -> Router | None:
    from evomerge.evaluate.router import read_router

    if table is None:
        if embedding is not None or threshold is not None:
            raise ConfigError("--embedding and --threshold are for a --router TABLE.xlsx")
        return None
    if embedding is None:
        return read_router(table, threshold=threshold)
    from evomerge.evaluate.embedding import TransformersEmbedding

    by = TransformersEmbedding(inputs.resolve(embedding), prefix=prefix)
    return read_router(table, embedding=by, threshold=threshold)


def _identity(folder: Path, live: LiveSettings) -> list[object]:
    """What of a model and its engine decides its answers, as plain values."""
    from evomerge.merge.checkpoint import Checkpoint

    # Not how much memory or how many threads: they may be others when it goes on.
    options = {key: live.options[key] for key in ("max_model_len",) if key in live.options}
    return [Checkpoint.open(folder).fingerprint(), live.name, live.dtype, options]


COMMANDS = (eval_, answer, answers, radar, compare)
