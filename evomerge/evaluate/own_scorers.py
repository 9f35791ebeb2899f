"""A user's own scorers: functions of a module or a file, and entry points of installed packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, RunError
from evomerge.evaluate.scorers import Scorer
from evomerge.evaluate.task import Task

ENTRY_POINTS = "evomerge.scorers"


class FunctionScorer:
    """Grades by `function(task, answer)`, in the range of its attributes low and high (0, 1)."""

    def __init__(self, name: str, function: Callable[[Task, str], float]) -> None:
        """Raises ValueError or TypeError where the function, or its range, is not what grades."""
        self.name = name
        self.low = float(getattr(function, "low", 0.0))
        self.high = float(getattr(function, "high", 1.0))
        self.function = function
        with contextlib.suppress(ValueError):  # of some that are written in C nothing is known
            inspect.signature(function).bind("task", "answer")

    def objection(self, task: Task) -> str | None:
        return None

    def grade(self, task: Task, answer: str) -> float:
        """Raises RunError where the function fails: that is no matter of one candidate."""
        try:
            returned = self.function(task, answer)
            grade = float(returned)
        except Exception as error:
            raise RunError(
                f"scorer {self.name}: task {task.id}: {type(error).__name__}: {error}"
            ) from error
        if not (math.isfinite(grade) and self.low <= grade <= self.high):
            raise RunError(
                f"scorer {self.name}: task {task.id}: {returned!r} is not in {self.low:g} to "
                f"{self.high:g}, the function's low and high"
            )
        return grade


def is_code(name: str) -> bool:
    """Whether a scorer's name says where code is: module:function or FILE.py:function."""
    return ":" in name


def entry_point_names() -> list[str]:
    """The scorers of installed packages."""
    return sorted(entry_points(group=ENTRY_POINTS).names)


def find_scorer(name: str, folder: Path) -> Scorer:
    """The scorer that `name` stands for; FILE.py is relative to `folder`.

    Raises ConfigError where there is none, or it is not what grades answers.
    """
    if is_code(name):
        found = _in_code(name, folder)
    else:
        try:
            (point,) = entry_points(group=ENTRY_POINTS, name=name)
            found = point.load()
        except (Exception, SystemExit) as error:  # whatever another package's code runs into
            raise ConfigError(f"scorer {name}: cannot be loaded: {error}") from error
    return _as_scorer(name, found)


def _in_code(name: str, folder: Path) -> Any:
    place, _, attribute = name.rpartition(":")
    try:
        module = _from_file(folder / place) if place.endswith(".py") else _from_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's code runs into
        raise ConfigError(f"scorer {name}: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"scorer {name}: {place} has no {attribute!r}")
    return getattr(module, attribute)


def _from_module(name: str) -> Any:
    return importlib.import_module(name)


def _from_file(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _as_scorer(name: str, found: Any) -> Scorer:
    try:
        if inspect.isclass(found):
            found = found()
        is_scorer = all(hasattr(found, part) for part in ("grade", "objection", "low", "high"))
        if not is_scorer and not callable(found):
            raise TypeError("it is neither")
        scorer: Scorer = found if is_scorer else FunctionScorer(name, found)
        is_range = math.isfinite(scorer.low) and math.isfinite(scorer.high)
    except Exception as error:  # whatever the user's code runs into
        raise ConfigError(
            f"scorer {name}: right is a function of (task, answer) that returns a number, or a "
            f"class with grade, objection, low and high: {error}"
        ) from error
    if not (is_range and scorer.low < scorer.high):
        raise ConfigError(
            f"scorer {name}: its grades are {scorer.low:g} to {scorer.high:g}; low must be below "
            "high, and both finite"
        )
    return scorer


def code_digest(scorer: Scorer) -> str:
    """SHA-256 of the file with a scorer's code; of its name where there is no file."""
    code = scorer.function if isinstance(scorer, FunctionScorer) else type(scorer)
    try:
        path = inspect.getsourcefile(code)
        content = Path(path).read_bytes() if path else b""
    except (TypeError, OSError):
        content = scorer.name.encode()
    return hashlib.sha256(content).hexdigest()
