"""Studies that an older evomerge began, and studies with each of the samplers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from evomerge.errors import ConfigError
from evomerge.optimizer.names import SamplerName
from evomerge.search.loop import run_search
from evomerge.search.study import StudyConfig
from tests.search.formula import opener

Study = Callable[..., StudyConfig]
POPULATION = {"population": 6, "seed": 3}
# As the first version searched: what a study file of its time says nothing of.
OLD_SIGMA0 = 0.25
PLAIN = {"smoothing": False, "futility_stop": False, "sweep": False, "selection": {"attempts": 0}}
SILENT = {"sweep": True, "selection": {"attempts": 3}}


def genomes(storage: Path, config: StudyConfig, trials: int) -> list[list[float]]:
    outcome = run_search(config, storage=storage, open_evaluator=opener(), trials=trials)
    return [trial["genome"] for trial in outcome.status["trials"]]


def make_old(storage: Path) -> None:
    """Rewrites the study as the first version of evomerge, which knew cma-es alone, wrote it."""
    with sqlite3.connect(storage / "evomerge.db") as database:
        query = "SELECT id, payload FROM events WHERE kind = 'begun'"
        ((row, text),) = database.execute(query).fetchall()
        begun = json.loads(text)
        del begun["course"]
        begun["study"]["sampler"]["name"] = "auto"
        for later in ("sweep", "smoothing", "futility_stop", "selection"):
            del begun["study"][later]
        for key in ("sweep", "smoothing", "futility_stop", "selection.attempts"):
            del begun["fingerprint"][key]
        database.execute("UPDATE events SET payload = ? WHERE id = ?", (json.dumps(begun), row))


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_study_goes_on_with_the_proposals_of_an_unbroken_one(
    study: Study, tmp_path: Path, name: SamplerName
) -> None:
    config = study(sampler={**POPULATION, "name": name})
    first = genomes(tmp_path / "broken", config, 12)
    broken = genomes(tmp_path / "broken", config, 18)
    assert broken[:12] == first
    assert broken == genomes(tmp_path / "unbroken", config, 18)


def test_auto_is_xnes_and_differs_from_cma_es(study: Study, tmp_path: Path) -> None:
    found = {
        name: genomes(tmp_path / name, study(sampler={**POPULATION, "name": name}), 12)
        for name in ("auto", "xnes", "cma-es")
    }
    assert found["auto"] == found["xnes"]
    assert found["auto"][6:] != found["cma-es"][6:]


def test_auto_goes_on_as_cma_es_where_an_older_version_began(study: Study, tmp_path: Path) -> None:
    cma_es = study(**PLAIN, sampler={**POPULATION, "name": "cma-es", "sigma0": OLD_SIGMA0})
    auto = study(**SILENT)
    genomes(tmp_path / "old", cma_es, 12)
    make_old(tmp_path / "old")
    old = genomes(tmp_path / "old", auto, 18)
    assert old == genomes(tmp_path / "whole", cma_es, 18)


def test_an_older_study_is_not_continued_with_another_sampler(study: Study, tmp_path: Path) -> None:
    genomes(
        tmp_path, study(**PLAIN, sampler={**POPULATION, "name": "cma-es", "sigma0": OLD_SIGMA0}), 12
    )
    make_old(tmp_path)
    with pytest.raises(ConfigError, match=r"sampler\.name: was cma-es, is xnes"):
        genomes(tmp_path, study(**SILENT, sampler={**POPULATION, "name": "xnes"}), 18)
