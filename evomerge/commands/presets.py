"""`evomerge presets list`, `show` and `copy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.commands.options import OverwriteOption
from evomerge.commands.terminal import write_new
from evomerge.errors import ConfigError
from evomerge.resources import PRESET_WORDS, PresetKind, preset_file, preset_names, prompts_of

presets_app = typer.Typer(
    help="The searches, mixtures and suites that ship with evomerge.", rich_markup_mode=None
)


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
