from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evomerge.optimizer.evolution_samplers import CmaEs
from evomerge.optimizer.samplers import Scaling, Told
from evomerge.space import Genome

POPULATION = 8


def make(dimension: int, seed: int = 0, sigma0: float = 0.25) -> CmaEs:
    start = np.full(dimension, 0.5)
    return CmaEs(start=start, sigma0=sigma0, population=POPULATION, seed=seed)


def value(genome: Sequence[float] | Genome) -> float:
    """A rotated hill with its top at 0.9."""
    away = np.asarray(genome) - 0.9
    return -float(np.sum(np.cumsum(away) ** 2))


def block_of(sampler: CmaEs, block: int) -> list[Told]:
    numbers = range(block * POPULATION, (block + 1) * POPULATION)
    genomes = {number: sampler.propose(number).tolist() for number in numbers}
    return [Told(number, genome, value(genome)) for number, genome in genomes.items()]


def search(dimension: int, blocks: int) -> tuple[CmaEs, list[list[Told]]]:
    sampler = make(dimension)
    told: list[list[Told]] = []
    for block in range(blocks):
        told.append(block_of(sampler, block))
        sampler.tell(told[-1])
    return sampler, told


@pytest.mark.parametrize("dimension", [1, 2, 7, 40])
def test_a_sampler_that_is_told_the_log_proposes_what_the_first_one_would(dimension: int) -> None:
    _, told = search(dimension, blocks=12)
    again = make(dimension)
    for block in told:
        for candidate in reversed(block[:5]):  # asked in another order, and not for all
            assert again.propose(candidate.number).tolist() == candidate.genome
        again.tell(block)
    first, _ = search(dimension, blocks=12)
    for number in (96, 97, 5000):
        assert again.propose(number).tolist() == first.propose(number).tolist()


def test_a_proposal_depends_on_nothing_but_seed_number_and_tells() -> None:
    sampler = make(5)
    genome = sampler.propose(3)
    np.random.seed(1)
    sampler.propose(4)
    assert sampler.propose(3).tolist() == genome.tolist()
    assert make(5, seed=1).propose(3).tolist() != genome.tolist()
    assert sampler.propose(4).tolist() != genome.tolist()


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(7)
    expected = np.random.random(3).tolist()
    np.random.seed(7)
    search(4, blocks=2)
    assert np.random.random(3).tolist() == expected


def test_a_signals_file_in_the_working_directory_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cma reads this file of options, and evaluates them, in each tell unless it is told not to.
    marker = tmp_path / "evaluated"
    (tmp_path / "cma_signals.in").write_text(
        f"{{'verb_disp': __import__('os').mkdir({os.fspath(marker)!r})}}\n"
    )
    monkeypatch.chdir(tmp_path)
    search(4, blocks=3)
    assert not marker.exists()


@pytest.mark.parametrize("dimension", [1, 6])
def test_the_search_climbs(dimension: int) -> None:
    _, told = search(dimension, blocks=40)
    best = max((candidate for block in told for candidate in block), key=lambda told: told.value)
    assert best.value > -1e-3
    assert value([0.5] * dimension) < -0.1
    np.testing.assert_allclose(best.genome, 0.9, atol=0.05)


def test_the_first_generation_is_spread_by_sigma0_around_the_start() -> None:
    sampler = make(50, sigma0=0.3)
    genomes = np.array([sampler.propose(number) for number in range(200)])
    assert abs(genomes.mean() - 0.5) < 0.01  # standard error 0.003
    assert abs(genomes.std() - 0.3) < 0.01


def test_genomes_far_outside_are_learned_from_as_they_are() -> None:
    """cma shortens what it does not remember to have drawn, which would tell replays apart."""
    sampler, again = make(3), make(3)
    block = block_of(sampler, 0)
    far = [Told(told.number, [9.0, -9.0, 9.0], told.value) for told in block[:4]] + block[4:]
    sampler.tell(far)
    again.tell(far)
    assert sampler.propose(8).tolist() == again.propose(8).tolist()
    assert np.abs(sampler.propose(8)).max() > 2


MIXED = Scaling(np.array([1.0, 0.36, 2.0]), np.array([False, False, True]))


def scaled(seed: int = 0) -> CmaEs:
    start = np.array([0.5, 0.9, 1e-3])
    return CmaEs(start=start, sigma0=0.25, population=POPULATION, seed=seed, scaling=MIXED)


def test_each_gene_is_spread_in_its_own_units() -> None:
    genomes = np.array([scaled().propose(number) for number in range(400)])
    weights, densities, logarithms = genomes[:, 0], genomes[:, 1], np.log(genomes[:, 2])
    assert (weights.mean(), weights.std()) == pytest.approx((0.5, 0.25), abs=0.04)
    assert (densities.mean(), densities.std()) == pytest.approx((0.9, 0.09), abs=0.015)
    assert (logarithms.mean(), logarithms.std()) == pytest.approx((np.log(1e-3), 0.5), abs=0.08)


def test_a_scaled_sampler_that_is_told_the_log_proposes_what_the_first_one_would() -> None:
    def top(genome: Sequence[float]) -> float:
        weight, density, small = genome
        return -((weight - 1.2) ** 2) - (density - 0.5) ** 2 - np.log(small / 0.03) ** 2

    first, again = scaled(), scaled()
    for block in range(40):
        numbers = range(block * POPULATION, (block + 1) * POPULATION)
        told = [Told(at, first.propose(at).tolist(), 0.0) for at in numbers]
        told = [Told(one.number, one.genome, top(one.genome)) for one in told]
        first.tell(told)
        again.tell(told)
    assert again.propose(999).tolist() == first.propose(999).tolist()
    np.testing.assert_allclose(first.propose(999), [1.2, 0.5, 0.03], rtol=0.05)


def test_steps_of_1_change_no_bit_of_a_proposal() -> None:
    told = search(5, blocks=3)[1]
    plain, unit = (
        make(5),
        CmaEs(
            start=np.full(5, 0.5),
            sigma0=0.25,
            population=POPULATION,
            seed=0,
            scaling=Scaling.none(5),
        ),
    )
    for block in told:
        for candidate in block:
            assert unit.propose(candidate.number).tolist() == candidate.genome
        plain.tell(block)
        unit.tell(block)


def test_a_logarithmic_gene_stays_finite_however_far_it_is_drawn() -> None:
    place = np.array([0.0, 0.0, 1e6])
    assert np.isfinite(MIXED.genome(place)).all()
    assert MIXED.genome(-place)[2] > 0
