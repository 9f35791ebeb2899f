"""The command line: parse, call, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge import eval_commands
from evomerge.errors import CandidateError, ConfigError, EvomergeError, OutputExistsError, shown
from evomerge.resources import (
    PRESET_WORDS,
    PresetKind,
    locate,
    preset_file,
    preset_names,
    prompts_of,
)
from evomerge.terminal import (
    DEFAULT_STORAGE,
    INTERRUPTED,
    STORAGE_VARIABLE,
    JsonOption,
    OverwriteOption,
    StorageOption,
    refuse_existing_file,
    say,
    stdout_for_results,
    storage_directory,
    write_new,
)

if TYPE_CHECKING:
    from evomerge.evaluate.judge_config import JudgeConfig
    from evomerge.merge.extract import Extraction
    from evomerge.report.reproduction import Reproduced
    from evomerge.report.results import Results
    from evomerge.report.table import Row
    from evomerge.search.study import StudyConfig

app = typer.Typer(
    help="Search for the best merge of language models, inside a live vLLM engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
presets_app = typer.Typer(
    help="The searches, mixtures and suites that ship with evomerge.", rich_markup_mode=None
)
app.add_typer(presets_app, name="presets")

InputsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where models with applied adapters and read GGUF files are kept; "
        f"else ${STORAGE_VARIABLE}, else ./{DEFAULT_STORAGE}.",
    ),
]
LenientOption = Annotated[
    bool, typer.Option("--lenient", help="Drop keys and parameters that nobody knows.")
]
ShardSizeOption = Annotated[
    str, typer.Option(metavar="SIZE", help="The most bytes of one file, as 5GB or 500MB.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file, a hub name; each with +ADAPTER, too."
    ),
]
TrialsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="A new total of trials.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Let the study set any engine option, run code of its own (scorers), and send its "
        "judge any file and key.",
    ),
]


def _possible_output(out: Path) -> Path:
    """`out`, where a file or folder can have this name, and ours beside it while it is written."""
    try:
        os.lstat(f"{out.absolute()}.replaced")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{shown(str(out))}: cannot be written: {reason}") from error
    return out


OutFolderArgument = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="The folder to write.", callback=_possible_output),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="evomerge")
    except EvomergeError as error:
        say(f"error: {error}")
        return error.exit_status
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@app.command()
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
    _run(config, storage_directory(storage, config), trials, seed, trust_code=trust_code)


@app.command()
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
    _run(config, directory, trials, seed=None, trust_code=trust_code)


def _run(
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
            stdout_for_results(),
            warnings.catch_warnings(),
            SearchDisplay(Console(stderr=True)) as display,
            Evaluators() as evaluators,
        ):
            # Of vLLM's and torch's own code: nothing that a reader of the story could mend.
            warnings.simplefilter("ignore", FutureWarning)
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
        say(f"interrupted; {going_on if begun else 'nothing had begun yet'}")
        raise typer.Exit(INTERRUPTED) from None
    if show:
        _print_results(results)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A study; else all.")] = None,
    *,
    importance: Annotated[
        bool, typer.Option("--importance", help="Which genes, slices and tensor groups matter.")
    ] = False,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """What studies there are, or how one of them stands."""
    from evomerge.report.certainty import certainty_lines
    from evomerge.report.status import status_text, studies_text
    from evomerge.report.table import held_out_words, outcome_rows, task_counts
    from evomerge.search.status import list_studies, study_status

    directory = storage_directory(storage)
    if importance:
        eval_commands.show_importance(directory, name, as_json=as_json)
        return
    if name is None:
        studies = list_studies(directory)
        print(json.dumps({"studies": studies}, indent=2) if as_json else studies_text(studies))
        return
    found = study_status(directory, name)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(status_text(found))
    if found["outcome"] is not None:
        sentences = certainty_lines(found["outcome"])
        words = held_out_words(found)
        _show_outcome(outcome_rows(found), task_counts(found), words, sentences)


@app.command()
def export(
    name: NameArgument,
    *,
    storage: StorageOption = None,
    trial: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="A trial instead of the best.")
    ] = None,
    yaml: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write the model.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a study's best recipe, or its model.

    The recipe goes to stdout where neither is named.
    """
    from evomerge.merge.publishing import refuse_existing
    from evomerge.report.results import export_model
    from evomerge.search.status import trial_recipe

    directory = storage_directory(storage)
    recipe = trial_recipe(directory, name, trial)
    if yaml is not None:  # both places before either is written to
        refuse_existing_file(yaml, overwrite=overwrite)
    if model is not None:
        refuse_existing(model.absolute(), overwrite=overwrite)
    if yaml is not None:
        write_new(yaml, recipe.to_yaml(), overwrite=overwrite)
        print(yaml)
    if model is not None:
        print(export_model(directory, name, model, trial, overwrite=overwrite))
    if yaml is None and model is None:
        print(recipe.to_yaml(), end="")


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Any mergekit YAML.")],
    out: OutFolderArgument,
    *,
    max_shard_size: ShardSizeOption = "5GB",
    seed: Annotated[
        int, typer.Option(metavar="N", help="For methods that draw at random (dare, della).")
    ] = 0,
    lenient: LenientOption = False,
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Merge models as a mergekit YAML says.

    The output is a complete model folder, with tokenizer, chat template and card.
    """
    shard_bytes = parse_size(max_shard_size)
    from evomerge.recipe import read_recipe

    wanted = read_recipe(recipe, lenient=lenient, say=say)  # its mistakes need no torch
    from evomerge.merge.inputs import InputModels
    from evomerge.merge.publishing import refuse_existing
    from evomerge.report.export import merge_recipe
    from evomerge.report.merge_display import MergeDisplay

    refuse_existing(out.absolute(), overwrite=overwrite)
    inputs = InputModels(storage_directory(storage), say=say)
    with _mistakes_of(recipe), MergeDisplay(sys.stderr) as display:
        merge_recipe(
            wanted,
            out,
            inputs,
            verbatim=recipe.read_text(encoding="utf-8"),
            max_shard_size=shard_bytes,
            overwrite=overwrite,
            seed=seed,
            progress=display,
        )
    print(out)


@app.command()
def moe(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG.yaml|PRESET", help="Any mergekit-moe YAML, or a preset."),
    ],
    out: OutFolderArgument,
    *,
    seed: Annotated[int, typer.Option(metavar="N", help="For random gates and noise.")] = 0,
    max_shard_size: ShardSizeOption = "5GB",
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Warn of unknown keys and of equal experts, and go on."),
    ] = False,
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Build a mixture of experts from dense models.

    The output is a complete model folder, with tokenizer, chat template and card.
    """
    shard_bytes = parse_size(max_shard_size)
    from evomerge.merge.inputs import InputModels
    from evomerge.merge.publishing import refuse_existing
    from evomerge.moe_config import mixture_text, read_moe_config
    from evomerge.report.merge_display import MergeDisplay
    from evomerge.report.moe import build_moe

    file = locate(config, "mixtures")
    wanted = read_moe_config(file, lenient=lenient, say=say)
    refuse_existing(out.absolute(), overwrite=overwrite)
    inputs = InputModels(storage_directory(storage), say=say)
    with _mistakes_of(file), stdout_for_results(), MergeDisplay(sys.stderr) as display:
        build_moe(
            wanted,
            out,
            inputs,
            verbatim=mixture_text(file.read_text(encoding="utf-8")),
            seed=seed,
            max_shard_size=shard_bytes,
            overwrite=overwrite,
            progress=display,
            say=say,
        )
    print(out)


@app.command("gguf")
def export_gguf(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT.gguf", help="The file to write.", callback=_possible_output),
    ],
    *,
    kind: Annotated[
        str,
        typer.Option(
            "--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."
        ),
    ] = "f16",
    storage: StorageOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp.

    Tokenizer and chat template are in it.
    """
    from evomerge.merge.gguf import check_gguf_output, write_gguf
    from evomerge.merge.inputs import InputModels

    _refuse_input(out, model)
    check_gguf_output(out, kind, overwrite=overwrite)
    inputs = InputModels(storage_directory(storage), say=say)
    name = Path(model).name.removesuffix(".gguf")
    for note in write_gguf(inputs.resolve(model), out, kind, overwrite=overwrite, name=name):
        say(f"note: {note}")
    print(out)


@app.command("extract-lora")
def extract(
    fine: Annotated[
        str, typer.Argument(metavar="FINE", help="The fine-tuned model, as MODEL of `gguf`.")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was fine-tuned from.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The adapter's folder to write.", callback=_possible_output
        ),
    ],
    *,
    rank: Annotated[int, typer.Option(metavar="R", help="The rank of each module, at most.")],
    explained: Annotated[
        float, typer.Option(metavar="SHARE", help="Stop each module's rank at this share.")
    ] = 1.0,
    save_others: Annotated[
        bool, typer.Option("--save-others", help="Norms, biases, embeddings that differ, whole.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")
    ] = "float32",
    storage: InputsOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write what fine-tuning changed as a LoRA adapter.

    The adapter is PEFT's; how much of the change it explains is told.
    """
    from evomerge.merge.extract import check_extraction, extract_lora
    from evomerge.merge.inputs import InputModels

    _refuse_input(out, fine, base)
    settings: dict[str, Any] = {"explained": explained, "dtype": dtype, "overwrite": overwrite}
    check_extraction(out, rank, **settings)
    inputs = InputModels(storage_directory(storage), say=say)
    models = inputs.resolve(fine), inputs.resolve(base)
    found = extract_lora(
        *models,
        out,
        rank,
        save_others=save_others,
        base_name=base,
        report=_say_every(10.0, "modules"),
        **settings,
    )
    for note in found.notes:
        say(f"note: {note}")
    print(
        json.dumps(_extraction_json(out, found), indent=2)
        if as_json
        else _extraction_text(out, found)
    )


@app.command()
def reproduce(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE|PRESET", help="A mixture with `reproduce:`, or a study."),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of a mixture; else its name.")
    ] = None,
    data: eval_commands.DataOption = None,
    limit: eval_commands.LimitOption = None,
    judge_model: eval_commands.JudgeModelOption = None,
    judge_url: eval_commands.JudgeUrlOption = None,
    judge_key_env: eval_commands.JudgeKeyOption = None,
    judge_local: eval_commands.JudgeLocalOption = None,
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
    judge = eval_commands.judge_of_options(judge_model, judge_url, judge_key_env, judge_local)
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
        print(json.dumps(found.document, indent=2, ensure_ascii=False))
    else:
        eval_commands.print_evaluation(found.document)
        for what, where in (("model", found.model), ("table", found.table), ("GGUF", found.gguf)):
            if where is not None:
                print(f"{what:<7} {_from_here(where.absolute())}")
        for chart in found.charts:
            print(f"{'chart':<7} {_from_here(chart.absolute())}")
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
        with eval_commands.engines_at_work():
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
        say("interrupted; the same command goes on where it stopped")
        raise typer.Exit(INTERRUPTED) from None


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
    from evomerge.merge.gguf import check_gguf_output
    from evomerge.merge.inputs import InputModels
    from evomerge.report.reproduction import check_gguf_tokenizer, evaluate_study, live_settings
    from evomerge.search.study import read_study, with_options

    config = read_study(str(path), trust_code=trust_code)
    config = with_options(config, data=data, judge=judge, engine=engine)
    directory = storage_directory(storage, config)
    kind = None if gguf == "none" else gguf or "q8_0"
    if kind is not None:
        check_gguf_output(directory / f"{config.study}.gguf", kind, overwrite=True)
    if kind is not None:
        with stdout_for_results():
            inputs = InputModels(directory, config.folder, config.engine.dtype, say=say)
            check_gguf_tokenizer(inputs.resolve(config.base_model))
    _run(config, directory, trials, seed=None, trust_code=trust_code, show=show)
    with eval_commands.engines_at_work():
        return evaluate_study(
            config,
            directory,
            live_settings(config.engine),
            gguf=kind,
            environment=os.environ,
            say=say,
        )


for _command in eval_commands.COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)


@presets_app.callback(invoke_without_command=True)
def presets(context: typer.Context) -> None:
    """The searches, mixtures and suites that ship with evomerge."""
    if context.invoked_subcommand is None:
        list_presets()


@presets_app.command("list")
def list_presets() -> None:
    """All presets: name, kind, first line."""
    from evomerge.report.screen import Screen, columns

    rows = [
        (name, PRESET_WORDS[kind], _first_comment(path))
        for name, (kind, path) in _presets().items()
    ]
    Screen().show(columns(rows))


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a preset's file."""
    print(_preset_file(name).read_text(encoding="utf-8"), end="")


@presets_app.command("copy")
def copy_preset(
    name: Annotated[str, typer.Argument(metavar="NAME")], overwrite: OverwriteOption = False
) -> None:
    """Copy a preset's file here, with the prompts that it names, to be changed."""
    file = _preset_file(name)
    target = Path(f"{name}.yaml")
    write_new(target, file.read_text(encoding="utf-8"), overwrite=overwrite)
    print(target)
    for prompt in prompts_of(file):
        prompt.parent.mkdir(parents=True, exist_ok=True)
        text = (file.parent / prompt).read_text(encoding="utf-8")
        write_new(prompt, text, overwrite=overwrite)
        print(prompt)


def parse_size(text: str) -> int:
    """The bytes that "5GB", "500 MB", "2GiB" or a plain number mean; ConfigError else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        power = " KMGT".index(unit.upper()) if unit else 0
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise ConfigError(f"--max-shard-size: {text!r} is no size; right would be 5GB or 500MB")
    return size


def _presets() -> dict[str, tuple[PresetKind, Path]]:
    """Kind and file of every preset by its name."""
    return {
        name: (kind, preset_file(name, kind))
        for kind in PRESET_WORDS
        for name in preset_names(kind)
    }


def _preset_file(name: str) -> Path:
    presets = _presets()
    if name not in presets:
        raise ConfigError(f"{name}: no preset of this name; there are: {', '.join(presets)}")
    return presets[name][1]


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


@contextlib.contextmanager
def _mistakes_of(recipe: Path) -> Iterator[None]:
    """Names the recipe's file in what is wrong with it; weights that give no model are wrong."""
    try:
        yield
    except OutputExistsError:
        raise
    except (ConfigError, CandidateError) as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{recipe}: {line}" for line in lines)) from error


def _refuse_input(out: Path, *references: str) -> None:
    """Raises OutputExistsError where `out` is what one of `references` names."""
    parts = [part for reference in references for part in (reference, *reference.split("+"))]
    if out.exists() and any(Path(part).expanduser().resolve() == out.resolve() for part in parts):
        raise OutputExistsError(f"{out}: is an input, too; choose another name")


def _print_results(results: Results) -> None:
    from evomerge.report.results import time_split

    _show_outcome(results.rows, results.tasks, results.held_out, results.certainty)
    for words, seconds, share in time_split(results.seconds):
        print(f"{words:<24} {seconds:8.1f} s {share:6.1%}")
    for what, path in (
        ("recipe", results.config),
        ("model", results.model),
        ("report", results.report),
    ):
        print(f"{what:<7} {_from_here(path)}")


def _show_outcome(
    rows: Sequence[Row], tasks: tuple[int, int], held_out: str, certainty: Sequence[str]
) -> None:
    """The table of a finished study, and how sure it is."""
    from evomerge.report.screen import Screen
    from evomerge.report.table import outcome_table

    screen = Screen()
    screen.show(outcome_table(rows, tasks, held_out))
    screen.tell(certainty)


def _from_here(path: Path) -> Path:
    """The path as a person would write it: relative where it is inside the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _resume_command(name: str, storage: Path, *, trust_code: bool) -> str:
    command = ["evomerge", "resume", name]
    if storage != storage_directory(None):
        command += ["--storage", str(storage)]
    if trust_code:
        command.append("--trust-code")
    return shlex.join(command)


def _extraction_json(out: Path, found: Extraction) -> dict[str, Any]:
    return {
        "adapter": str(out),
        "explained": found.total,
        "groups": found.explained,
        "ranks": dict(found.ranks),
        "saved": list(found.saved),
        "lost": list(found.lost),
    }


def _extraction_text(out: Path, found: Extraction) -> str:
    counts = Counter(module.rpartition(".")[2] for module in found.ranks)
    lines = [
        f"{group:<20} {counts[group]:>5} modules  {share:8.3%}"
        for group, share in found.explained.items()
    ]
    lines.append(f"{'explained':<20} {len(found.ranks):>5} modules  {found.total:8.3%}")
    if found.saved:
        lines.append(f"{'saved whole':<20} {len(found.saved):>5} tensors")
    return "\n".join([*lines, f"adapter {out}"])


def _say_every(seconds: float, what: str) -> Callable[[int, int], None]:
    """Tells how many of how many are done, now and then."""
    told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > seconds:
            told = time.monotonic()
            say(f"{done} of {total} {what}")

    return report
