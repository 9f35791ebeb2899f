"""Logs that a newer evomerge wrote: refused by every command, with what to do, and left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sql

from evomerge import schema
from evomerge.database import open_database
from evomerge.errors import ConfigError
from evomerge.search.loop import run_search
from evomerge.search.study import StudyConfig
from tests.search.formula import opener
from tests.test_cli import run


def make_newer(engine: sql.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sql.update(schema.schema_table).values(version=schema.VERSION + 1))
    engine.dispose()


def test_every_command_refuses_the_database_of_a_newer_version(
    study: Callable[..., StudyConfig], study_file: Callable[..., Path], tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6)
    make_newer(open_database(storage))
    before = (storage / "evomerge.db").read_bytes()
    for command in (
        ("status",),
        ("status", "formula"),
        ("status", "formula", "--importance"),
        ("export", "formula"),
        ("plot", "formula"),
        ("compare", "formula", "other"),
        ("resume", "formula"),
        ("search", study_file()),
    ):
        ran = run(*command, "--storage", storage)
        # In a list of studies the reason stands beside each.
        assert ran.status == (0 if command == ("status",) else 2), command
        said = ran.out + ran.err
        assert f"its schema has version {schema.VERSION + 1}" in said
        assert f"this evomerge knows version {schema.VERSION}" in said
        assert "Traceback" not in said
    assert (storage / "evomerge.db").read_bytes() == before


def test_all_that_differs_from_what_a_study_began_with_is_listed(
    study: Callable[..., StudyConfig], models: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    run_search(study(), storage=storage, open_evaluator=opener(), trials=6)
    changed = study(
        tasks=11,
        models=[str(models / "right"), str(models / "left")],
        search_space={"layer_granularity": 2, "weight": [0.0, 1.0]},
        sampler={"population": 8, "seed": 3, "name": "tpe"},
        engine={"name": "transformers", "dtype": "float32", "load": "disk"},
        smoothing=False,
    )

    def never(*asked: object) -> NoReturn:
        raise AssertionError("an engine was opened")

    with pytest.raises(ConfigError) as refused:
        run_search(changed, storage=storage, open_evaluator=never)
    first, *lines, last = str(refused.value).splitlines()
    assert first.endswith("study formula began with other settings:")
    assert {line.strip().partition(": was ")[0] for line in lines} == {
        "models.0",
        "models.1",
        "models.0 (its files)",
        "models.1 (its files)",
        "search_space.weight.0",
        "search_space.weight.1",
        "sampler.name",
        "sampler.population",
        "engine.dtype",
        "smoothing",
        "suite (tasks, prompt, scorer, settings)",
    }
    assert "  sampler.name: was xnes, is tpe" in lines
    assert last == "put them back, or give this study another name"


def test_a_server_of_a_newer_version_is_refused_without_its_password(
    tmp_path: Path, postgresql: str
) -> None:
    maker = sql.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with maker.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE newer")
    maker.dispose()
    place = sql.make_url(postgresql).set(database="newer", password="secret")
    url = place.render_as_string(hide_password=False)
    make_newer(open_database(tmp_path, url))
    with pytest.raises(ConfigError, match="use the evomerge that wrote it") as refused:
        open_database(tmp_path, url)
    assert "secret" not in str(refused.value)
