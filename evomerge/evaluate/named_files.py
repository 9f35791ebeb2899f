"""The files that studies and suites name, and whether they lie beside who names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evomerge.resources import data_root

_OF_PRESETS = ("evaluators", "search_spaces")


@dataclass(frozen=True)
class NamedFile:
    """The file `path`, which a study or suite file in `folder` names by `key`."""

    key: str
    path: Path
    folder: Path

    @property
    def is_elsewhere(self) -> bool:
        """Whether it lies outside of that folder, links followed.

        Presets never do, nor what they name: everybody has them.
        """
        if _is_of_presets(self.folder) or _is_of_presets(self.path):
            return False
        return not self.path.resolve().is_relative_to(self.folder.resolve())


def _is_of_presets(path: Path) -> bool:
    # By its name: some installers make links of a package's files.
    whole = path.absolute()
    folders = (data_root() / name for name in _OF_PRESETS)
    return ".." not in whole.parts and any(whole.is_relative_to(folder) for folder in folders)
