"""A suite's tasks asked as the table of its router says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.evaluate.router import Route, read_router
from evomerge.evaluate.suite_config import RouterConfig
from evomerge.evaluate.task import Task


def routed_tasks(
    config: RouterConfig, tasks: Sequence[Task], folder: Path, where: str
) -> tuple[Task, ...]:
    """The tasks with prompt, system message and settings of their routes.

    Relative paths start at `folder`. Raises ConfigError, which begins with `where` where the suite
    itself is wrong, and else names the table and its row.
    """
    embedding = None
    if config.embedding is not None:
        model = folder / Path(config.embedding).expanduser()
        if not model.is_dir():
            raise ConfigError(f"{where}: router.embedding: {model} is no folder of a model")
        from evomerge.evaluate.embedding import TransformersEmbedding

        embedding = TransformersEmbedding(model, prefix=config.embedding_prefix)
    table = folder / Path(config.table).expanduser()
    router = read_router(table, embedding=embedding, threshold=config.threshold)
    pairs = [(task.id, task.input) for task in tasks]
    routes = router.route(pairs, leave_one_out=config.leave_one_out)
    return tuple(_routed(task, route) for task, route in zip(tasks, routes, strict=True))


def _routed(task: Task, route: Route) -> Task:
    row = route.row
    return replace(
        task,
        user=task.user if row.prompt is None else route.render(task.input, task.id),
        system=row.system,
        settings=row.settings.said,
    )
