"""The sampler that a study names."""

from __future__ import annotations

from evomerge.optimizer.evolution_samplers import CmaEs, Xnes
from evomerge.optimizer.names import SamplerName
from evomerge.optimizer.samplers import Sampler, Scaling
from evomerge.space import Genome


def make_sampler(
    name: SamplerName,
    *,
    start: Genome,
    sigma0: float,
    population: int,
    seed: int,
    scaling: Scaling | None,
    low: Genome,
    high: Genome,
) -> Sampler:
    """The sampler of this name, told nothing yet.

    `start` (genes,) is where it begins and `low`, `high` (genes,) are the bounds, in the genes' own
    units; `sigma0` is the first step after `scaling` (None: all steps are 1); whole blocks of
    `population` candidates are told. cma-es and xnes draw beyond the bounds, who decodes clips; the
    others stay inside, do not look at `sigma0`, and propose `start` first (random ones do not).
    """
    scaling = scaling or Scaling.none(len(start))
    strategies: dict[str, type[CmaEs | Xnes]] = {"auto": Xnes, "xnes": Xnes, "cma-es": CmaEs}
    if name in strategies:
        strategy = strategies[name]
        return strategy(
            start=start, sigma0=sigma0, population=population, seed=seed, scaling=scaling
        )
    # Only here: Optuna is slow to import, and its mirror is the only other reader of it.
    from evomerge.optimizer.optuna_samplers import OptunaSampler, QuasiRandom

    if name == "quasi-random":
        return QuasiRandom(seed=seed, scaling=scaling, low=low, high=high)
    assert name in ("gp", "tpe", "random")
    return OptunaSampler(
        name,
        start=start,
        population=population,
        seed=seed,
        scaling=scaling,
        low=low,
        high=high,
    )
