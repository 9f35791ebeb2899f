"""The search: a study, its log, its course; `maximize` is the same without models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.search.maximizing import maximize

__all__ = ["maximize"]


def __getattr__(name: str) -> object:
    # Only when asked for: the command line imports this package for its errors and names alone.
    if name == "maximize":
        from evomerge.search.maximizing import maximize

        return maximize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
