"""A second suite, all of whose tasks are held out: in a search's books under names of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

from evomerge.errors import ConfigError
from evomerge.evaluate.evaluation import when_all_done
from evomerge.evaluate.suite import Suite
from evomerge.evaluate.task import AnsweredError, Task, TaskResult

# Suites number their tasks alike.
_PREFIX = "holdout/"


@dataclass(frozen=True)
class HeldOutSuite:
    """`suite`, whose task T a search calls holdout/T."""

    suite: Suite

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks as the search calls them."""
        return tuple(replace(task, id=name_of(task.id)) for task in self.suite.tasks)

    def check_apart_from(self, searched: Suite) -> None:
        """Raises ConfigError where one of the tasks is among those that are searched on."""
        named_alike = [task.id for task in searched.tasks if task.id.startswith(_PREFIX)]
        if named_alike:
            raise ConfigError(
                f"suite: the id {named_alike[0]!r} begins as those of a second suite's tasks do "
                f"({_PREFIX!r}); give that task another one"
            )
        seen: dict[tuple[object, ...], list[Task]] = {}
        for task in searched.tasks:
            seen.setdefault(_question(task), []).append(task)
        both = [
            task.id
            for task in self.suite.tasks
            if any(_agree(task, other) for other in seen.get(_question(task), ()))
        ]
        if both:
            raise ConfigError(
                f"holdout: {self.suite.where}: {len(both)} of its {len(self.suite.tasks)} tasks "
                f"({both[0]!r} for one) are among those that are searched on, so they are not held "
                "out; name a suite of other tasks, or a share of this one, as holdout: 0.3"
            )

    def has(self, task_ids: Sequence[str]) -> bool:
        """Whether these tasks, all or none, are this suite's."""
        return all(name.startswith(_PREFIX) for name in task_ids)

    def own_ids(self, task_ids: Sequence[str]) -> list[str]:
        """What the suite itself calls the tasks of these names."""
        return [name.removeprefix(_PREFIX) for name in task_ids]


def name_of(task_id: str) -> str:
    """What a search calls the task of this id of a second suite."""
    return _PREFIX + task_id


def under_names(
    names: Sequence[str], begin: Callable[[], Future[list[TaskResult]]]
) -> Future[list[TaskResult]]:
    """The results that `begin` gives, or its error's answers, under these names of their tasks."""

    def outcome() -> list[TaskResult]:
        with _answers_named(names):
            return _named(own.result(), names)

    with _answers_named(names):
        own = begin()
    return when_all_done([own], outcome)


@contextmanager
def _answers_named(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except AnsweredError as error:
        error.answers = tuple(_named(error.answers, names))
        raise


def _named(results: Sequence[TaskResult], names: Sequence[str]) -> list[TaskResult]:
    return [replace(one, task_id=name) for one, name in zip(results, names, strict=True)]


def _question(task: Task) -> tuple[object, ...]:
    """What is asked, whatever it is called and however it is put."""
    return task.input, task.turns, task.choices


def _agree(one: Task, other: Task) -> bool:
    """Whether two tasks of one question are the same; a suite may do without right answers."""
    return one.reference == other.reference or not (one.reference and other.reference)
