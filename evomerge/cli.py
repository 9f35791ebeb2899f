"""The command line: the commands in the order of `evomerge --help`, and their exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer

from evomerge.commands.answer import answer
from evomerge.commands.answers import answers
from evomerge.commands.compare import compare
from evomerge.commands.eval import evaluate
from evomerge.commands.export import export
from evomerge.commands.extract_lora import extract
from evomerge.commands.gguf import gguf
from evomerge.commands.merge import merge
from evomerge.commands.moe import moe
from evomerge.commands.plot import plot
from evomerge.commands.presets import presets_app
from evomerge.commands.radar import radar
from evomerge.commands.reproduce import reproduce
from evomerge.commands.search import resume, search
from evomerge.commands.status import status
from evomerge.commands.terminal import say
from evomerge.errors import EvomergeError

COMMANDS: dict[str, Callable[..., None]] = {
    "search": search,
    "resume": resume,
    "status": status,
    "export": export,
    "plot": plot,
    "merge": merge,
    "moe": moe,
    "gguf": gguf,
    "extract-lora": extract,
    "reproduce": reproduce,
    "eval": evaluate,
    "answer": answer,
    "answers": answers,
    "radar": radar,
    "compare": compare,
}

app = typer.Typer(
    help="Search for the best merge of language models, inside a live vLLM engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(presets_app, name="presets")


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
