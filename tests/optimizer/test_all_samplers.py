from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.optimizer.names import SamplerName
from evomerge.optimizer.sampler_by_name import make_sampler
from evomerge.optimizer.samplers import Sampler, Scaling, Told
from evomerge.space import Genome

POPULATION = 4
LOW = np.array([-0.5, 0.1, 1e-6])
HIGH = np.array([2.0, 1.0, 1.0])
START = np.array([0.5, 0.9, 1e-3])
SCALING = Scaling(np.array([1.0, 0.36, 5.5]), np.array([False, False, True]))
NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
INSIDE: tuple[SamplerName, ...] = ("gp", "tpe", "random", "quasi-random")


def make(name: SamplerName, seed: int = 0) -> Sampler:
    return make_sampler(
        name,
        start=START,
        sigma0=0.25,
        population=POPULATION,
        seed=seed,
        scaling=SCALING,
        low=LOW,
        high=HIGH,
    )


def value(genome: Sequence[float] | Genome) -> float:
    """A hill with its top at (1.2, 0.5, 0.03)."""
    weight, density, small = genome
    return -((weight - 1.2) ** 2) - (density - 0.5) ** 2 - (np.log(small / 0.03) / 5.5) ** 2


def search(name: SamplerName, blocks: int) -> tuple[Sampler, list[list[Told]]]:
    sampler = make(name)
    told: list[list[Told]] = []
    for block in range(blocks):
        numbers = range(block * POPULATION, (block + 1) * POPULATION)
        genomes = {number: sampler.propose(number).tolist() for number in numbers}
        told.append([Told(at, genome, value(genome)) for at, genome in genomes.items()])
        sampler.tell(told[-1])
    return sampler, told


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_of_the_tells_proposes_bit_for_bit_what_the_first_run_did(
    name: SamplerName,
) -> None:
    first, told = search(name, blocks=4)
    again = make(name)
    for at, block in enumerate(told):
        if at >= 2:  # some are asked, and the last ones first
            for candidate in (block[3], block[1]):
                assert again.propose(candidate.number).tolist() == candidate.genome
        again.tell(block)
    for number in (18, 16, 17, 19):
        assert again.propose(number).tolist() == first.propose(number).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_proposals_differ_by_number_and_by_seed(name: SamplerName) -> None:
    sampler, other = make(name), make(name, seed=1)
    genomes = [tuple(each.propose(number)) for each in (sampler, other) for number in (1, 2, 3)]
    assert len(set(genomes)) == 6


@pytest.mark.parametrize("name", INSIDE)
def test_a_sampler_of_the_whole_box_keeps_inside_it_and_has_no_mean(name: SamplerName) -> None:
    sampler, told = search(name, blocks=4)
    genomes = np.array([candidate.genome for block in told for candidate in block])
    assert (genomes >= LOW).all()
    assert (genomes <= HIGH).all()
    assert sampler.mean is None


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_what_learns_from_the_box_begins_at_the_start(name: SamplerName) -> None:
    np.testing.assert_allclose(make(name).propose(0), START, rtol=1e-12)


@pytest.mark.parametrize("name", ["random", "quasi-random"])
def test_what_learns_nothing_spreads_evenly_in_each_genes_own_scale(name: SamplerName) -> None:
    sampler = make(name)
    genomes = np.array([sampler.propose(number) for number in range(256)])
    places = np.array([SCALING.place(genome) for genome in genomes])
    shares = (places - SCALING.place(LOW)) / (SCALING.place(HIGH) - SCALING.place(LOW))
    # The standard error of a random mean is 0.018.
    np.testing.assert_allclose(shares.mean(axis=0), 0.5, atol=0.06)
    np.testing.assert_allclose(np.quantile(shares, 0.9, axis=0), 0.9, atol=0.06)


@pytest.mark.parametrize("name", ["cma-es", "xnes"])
def test_the_mean_is_the_middle_of_what_is_proposed(name: SamplerName) -> None:
    sampler, _ = search(name, blocks=3)
    assert sampler.mean is not None
    places = [SCALING.place(sampler.propose(number)) for number in range(1000, 3000)]
    spread = np.std(places, axis=0) / np.sqrt(len(places))
    away = np.mean(places, axis=0) - SCALING.place(sampler.mean)
    assert (np.abs(away) < 4 * spread).all()


@pytest.mark.parametrize("name", ["cma-es", "xnes"])
def test_the_mean_begins_at_the_start_and_climbs(name: SamplerName) -> None:
    begin = make(name).mean
    assert begin is not None
    np.testing.assert_allclose(begin, START, rtol=1e-12)
    end = search(name, blocks=60)[0].mean
    assert end is not None
    np.testing.assert_allclose(end, [1.2, 0.5, 0.03], rtol=0.05)


def test_auto_is_xnes() -> None:
    assert make("auto").propose(7).tolist() == make("xnes").propose(7).tolist()


def test_xnes_searches_one_gene_too() -> None:
    def one() -> Sampler:
        return make_sampler(
            "xnes",
            start=np.array([0.5]),
            sigma0=0.25,
            population=8,
            seed=0,
            scaling=None,
            low=np.array([-0.5]),
            high=np.array([2.0]),
        )

    first, again = one(), one()
    for block in range(25):
        drawn = [
            (number, first.propose(number).tolist()) for number in range(8 * block, 8 * block + 8)
        ]
        told = [Told(number, genome, -abs(genome[0] - 1.3)) for number, genome in drawn]
        first.tell(told)
        again.tell(told)
    assert first.mean is not None
    assert first.mean == pytest.approx([1.3], abs=0.05)
    assert again.propose(999).tolist() == first.propose(999).tolist()


@pytest.mark.parametrize("name", ["gp", "quasi-random"])
def test_a_missing_scipy_is_an_error_with_the_line_that_installs_it(
    name: SamplerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"scipy.*pip install 'evomerge\[samplers\]'"):
        make(name)


@pytest.mark.parametrize("score", [lambda gene: -((gene - 1.3) ** 2), lambda gene: 1.0])
def test_xnes_goes_on_where_floats_end(score: Callable[[float], float]) -> None:
    def make_one() -> Sampler:
        return make_sampler(
            "xnes",
            start=np.array([0.5]),
            sigma0=0.25,
            population=POPULATION,
            seed=4,
            scaling=None,
            low=np.array([-0.5]),
            high=np.array([2.0]),
        )

    first, told = make_one(), []
    for number in range(0, 320 * POPULATION, POPULATION):
        genomes = {
            each: first.propose(each).tolist() for each in range(number, number + POPULATION)
        }
        scores = {at: score(min(2.0, max(-0.5, genes[0]))) for at, genes in genomes.items()}
        told.append([Told(at, genomes[at], scores[at]) for at in genomes])
        first.tell(told[-1])
    again = make_one()
    for block in told:
        again.tell(block)
    proposed = first.propose(5000)
    assert np.isfinite(proposed).all()
    assert again.propose(5000).tolist() == proposed.tolist()
