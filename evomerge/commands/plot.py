"""`evomerge plot`."""

from __future__ import annotations

from evomerge.commands.options import NameArgument, StorageOption, storage_directory
from evomerge.commands.terminal import say


def plot(name: NameArgument, *, storage: StorageOption = None) -> None:
    """Draw a study's course so far, and its best recipe.

    The pictures go into the study's folder, where a finished study has them already.
    """
    from evomerge.report.plots import plot_study

    for path in plot_study(storage_directory(storage), name, say):
        print(path)
