"""Where the files are that ship with evomerge: presets of searches and suites, storage helpers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from evomerge.errors import ConfigError

PresetKind = Literal["search_spaces", "evaluators"]

_WORDS: dict[PresetKind, str] = {"search_spaces": "study", "evaluators": "suite"}


def data_root() -> Path:
    """The folder that holds search_spaces/, evaluators/ and storage/.

    In a wheel that is `evomerge/_data`, in a clone the folder above the package.
    """
    package = Path(__file__).resolve().parent
    packed = package / "_data"
    return packed if packed.is_dir() else package.parent


def preset_names(kind: PresetKind) -> list[str]:
    """The bare names of the presets of `kind`, sorted."""
    return sorted(path.stem for path in (data_root() / kind).glob("*.yaml"))


def is_bare_name(reference: str) -> bool:
    """Whether `reference` names a preset: no suffix and no separator, else it is a path."""
    return not set(reference) & {".", "/", "\\"}


def locate(reference: str, kind: PresetKind) -> Path:
    """The file that `reference` means: a preset's if it is a bare name, else the path itself.

    The working directory is never searched for a bare name. Raises ConfigError where there is no
    such preset or no such file.
    """
    if is_bare_name(reference):
        return _preset(reference, kind)
    path = Path(reference).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: this {_WORDS[kind]} file {what}")
    return path


def _preset(name: str, kind: PresetKind) -> Path:
    names = preset_names(kind)
    if name in names:
        return data_root() / kind / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    available = ", ".join(names) or "none"
    raise ConfigError(
        f"{name}: no {_WORDS[kind]} preset of this name; {hint}available: {available} "
        f"(a file of yours is given with its suffix or folder, as ./{name}.yaml)"
    )
