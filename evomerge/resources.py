"""Where the files are that ship with evomerge: searches, mixtures, suites, storage helpers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from evomerge.errors import ConfigError

PresetKind = Literal["search_spaces", "mixtures", "evaluators"]

PRESET_WORDS: dict[PresetKind, str] = {
    "search_spaces": "study",
    "mixtures": "mixture",
    "evaluators": "suite",
}
_PROMPT_FILE = re.compile(r"\{file: ([\w./-]+\.jinja)\}")
# Mixtures of experts stand beside the studies; this key tells them apart.
_MIXTURE_KEY = re.compile(r"^experts\s*:", re.MULTILINE)


def data_root() -> Path:
    """The folder that holds search_spaces/, evaluators/ and storage/.

    In a wheel that is `evomerge/_data`, in a clone the folder above the package.
    """
    package = Path(__file__).resolve().parent
    packed = package / "_data"
    return packed if packed.is_dir() else package.parent


def preset_names(kind: PresetKind) -> list[str]:
    """The bare names of the presets of `kind`, sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml") if _is_of(kind, path))


def preset_file(name: str, kind: PresetKind) -> Path:
    """Where the preset `name` of `kind` is, if there is one."""
    return _folder(kind) / f"{name}.yaml"


def prompts_of(preset: Path) -> list[Path]:
    """The prompt files that a suite's file names, relative to its folder."""
    return [Path(name) for name in _PROMPT_FILE.findall(preset.read_text(encoding="utf-8"))]


def _folder(kind: PresetKind) -> Path:
    return data_root() / ("search_spaces" if kind == "mixtures" else kind)


def _is_of(kind: PresetKind, path: Path) -> bool:
    if kind == "evaluators":
        return True
    is_mixture = _MIXTURE_KEY.search(path.read_text(encoding="utf-8")) is not None
    return is_mixture == (kind == "mixtures")


def is_bare_name(reference: str) -> bool:
    """Whether `reference` names a preset: no suffix and no separator, else it is a path."""
    return not set(reference) & {".", "/", "\\"}


def locate(reference: str, *kinds: PresetKind, folder: Path = Path()) -> Path:
    """The file that `reference` means: a preset's if it is a bare name, else the path itself.

    The preset may be of any of `kinds`; a relative path starts at `folder`. The working directory
    is never searched for a bare name.
    Raises ConfigError where there is no such preset or no such file.
    """
    if is_bare_name(reference):
        return _preset(reference, kinds)
    path = folder / Path(reference).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: this {_words(kinds)} file {what}")
    return path


def _preset(name: str, kinds: Sequence[PresetKind]) -> Path:
    names = [(each, kind) for kind in kinds for each in preset_names(kind)]
    for each, kind in names:
        if each == name:
            return preset_file(name, kind)
    known = [each for each, _ in names]
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    available = ", ".join(known) or "none"
    raise ConfigError(
        f"{name}: no {_words(kinds)} preset of this name; {hint}available: {available} "
        f"(a file of yours is given with its suffix or folder, as ./{name}.yaml)"
    )


def _words(kinds: Sequence[PresetKind]) -> str:
    return " or ".join(PRESET_WORDS[kind] for kind in kinds)
