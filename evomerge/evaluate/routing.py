"""A suite's tasks asked as the table of its router says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.evaluate.router import Route, read_router
from evomerge.evaluate.suite_config import RouterConfig
from evomerge.evaluate.task import Task

# The folder of a model by its name, as `merge.inputs.InputModels.resolve`. Raises ConfigError.
FindModel = Callable[[str], Path]


def routed_tasks(
    config: RouterConfig,
    tasks: Sequence[Task],
    folder: Path,
    where: str,
    find_model: FindModel | None = None,
) -> tuple[Task, ...]:
    """The tasks with prompt, system message and settings of their routes.

    Relative paths start at `folder`; an embedding that is no folder there is found by `find_model`.
    Raises ConfigError, which begins with `where` where the suite itself is wrong, and else names
    the table and its row.
    """
    embedding = None
    if config.embedding is not None:
        model = _embedding_folder(config.embedding, folder, where, find_model)
        from evomerge.evaluate.embedding import TransformersEmbedding

        embedding = TransformersEmbedding(model, prefix=config.embedding_prefix)
    table = folder / Path(config.table).expanduser()
    router = read_router(table, embedding=embedding, threshold=config.threshold)
    pairs = [(task.id, task.input) for task in tasks]
    routes = router.route(pairs, leave_one_out=config.leave_one_out)
    return tuple(_routed(task, route) for task, route in zip(tasks, routes, strict=True))


def _embedding_folder(
    embedding: str, folder: Path, where: str, find_model: FindModel | None
) -> Path:
    model = folder / Path(embedding).expanduser()
    if model.is_dir():
        return model
    try:
        if find_model is not None:
            return find_model(embedding)
    except ConfigError as error:
        raise ConfigError(f"{where}: router.embedding: {error}") from error
    raise ConfigError(f"{where}: router.embedding: {model} is no folder of a model")


def _routed(task: Task, route: Route) -> Task:
    row = route.row
    return replace(
        task,
        user=task.user if row.prompt is None else route.render(task.input, task.id),
        system=row.system,
        settings=row.settings.said,
    )
