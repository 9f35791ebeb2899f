"""Names that a study file, its log and its readers share; nothing heavy is imported for them."""

from __future__ import annotations

from typing import Literal, TypeAlias

SamplerName: TypeAlias = Literal["auto", "cma-es", "xnes", "gp", "tpe", "random", "quasi-random"]

# How a search goes, by version: 0 is a search with cma-es only, on all tasks, without a sweep of
# scales, whose best observed candidate wins. What began with one version goes on with it.
COURSE = 1


def resolved_sampler(name: SamplerName, course: int) -> SamplerName:
    """What "auto" means in a study of this version of the course."""
    if name != "auto":
        return name
    return "xnes" if course else "cma-es"
