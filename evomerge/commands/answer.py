"""`evomerge answer`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.commands.options import (
    ContextOption,
    DtypeOption,
    EngineOption,
    MemoryOption,
    ModelArgument,
    OverwriteOption,
    StorageOption,
    ThreadsOption,
    input_models,
    live_settings,
)
from evomerge.commands.terminal import (
    engines_at_work,
    interrupted,
    refuse_existing_file,
    say,
    write_new,
)
from evomerge.errors import CandidateError, ConfigError

if TYPE_CHECKING:
    from evomerge.engine.live_models import LiveSettings
    from evomerge.evaluate.answering import Answers, AskedTask
    from evomerge.evaluate.router import Router
    from evomerge.merge.inputs import InputModels


def answer(
    model: ModelArgument,
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

    live = live_settings(engine, dtype, max_model_len, gpu_memory_utilization, threads)
    asked_of = read_open_tasks(tasks)
    if routes is not None:
        refuse_existing_file(routes, overwrite=overwrite)
    inputs = input_models(storage, dtype)
    with engines_at_work():
        table = _router(router, inputs, embedding, embedding_prefix, threshold)
        settings = AnswerSettings(
            generation=GenerationSettings(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                stop=tuple(stop or ()),
                seed=seed,
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
        raise interrupted(
            f"interrupted after {len(answers.done)} of {len(asked)} tasks; the same command goes on"
        ) from None
