"""Options and arguments that several commands have, and what they mean."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.commands.terminal import say
from evomerge.errors import ConfigError, shown

if TYPE_CHECKING:
    from evomerge.engine.live_models import LiveSettings
    from evomerge.evaluate.judge_config import JudgeConfig
    from evomerge.merge.inputs import InputModels
    from evomerge.search.study import StudyConfig

STORAGE_VARIABLE = "EVOMERGE_STORAGE"
DEFAULT_STORAGE = "evol_merge_storage"

StorageOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help=f"Where studies are kept; else ${STORAGE_VARIABLE}, else ./{DEFAULT_STORAGE}.",
    ),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where models with applied adapters and read GGUF files are kept; "
        f"else ${STORAGE_VARIABLE}, else ./{DEFAULT_STORAGE}.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there already.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]
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
ShardSizeOption = Annotated[
    str, typer.Option(metavar="SIZE", help="The most bytes of one file, as 5GB or 500MB.")
]
DataOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The suite's tasks, in place of its own.")
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


def possible_output(out: Path) -> Path:
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
    typer.Argument(metavar="OUT", help="The folder to write.", callback=possible_output),
]


def storage_directory(option: Path | None, study: StudyConfig | None = None) -> Path:
    """Where studies are kept: the option, else the study's own key, else the environment's.

    What a study's file says starts at the file's folder, as all its relative paths do.
    """
    if option is None and study is not None and study.storage.directory:
        return study.folder / Path(study.storage.directory).expanduser()
    named = option or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE
    return Path(named).expanduser()


def input_models(storage: Path | None, dtype: str | None = None) -> InputModels:
    """Where models are looked up; what is made of them is kept in the storage."""
    from evomerge.merge.inputs import InputModels

    return InputModels(storage_directory(storage), dtype=dtype or "bfloat16", say=say)


def live_settings(
    engine: str,
    dtype: str | None,
    max_model_len: int | None,
    memory: float | None,
    threads: int | None,
) -> LiveSettings:
    """The engine that a command's options describe; "auto" without vLLM is said."""
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


def judge_of_options(
    model: str | None, url: str | None, key_env: str | None, local: str | None
) -> JudgeConfig | None:
    """The judge that a command's options describe, where they do."""
    from evomerge.evaluate.judge_config import judge_from_mapping

    said = {"model": model, "base_url": url, "api_key_env": key_env, "local": local}
    given = {key: value for key, value in said.items() if value is not None}
    return judge_from_mapping(given, "--judge-…") if given else None


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
