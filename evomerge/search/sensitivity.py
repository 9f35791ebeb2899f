"""Which genes matter: what the candidates of a study say of slices, models and tensor groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import ConfigError
from evomerge.search.candidates import space_from_mapping
from evomerge.search.log import begun_with
from evomerge.search.mirror import importances
from evomerge.search.status import existing_log, trials_of
from evomerge.space import SearchSpace

Array = npt.NDArray[np.float64]

# Below these the best quarter is a handful, and what stands out is chance.
_FEWEST = 20
_FEWEST_PER_GENE = 2
_BEST_SHARE = 0.25
# Shuffled scores against which importances are held: of 20 maxima the largest is the 95 % mark.
_SHUFFLES = 20
# Shrinkages to choose from, as shares of the number of candidates.
_SHRINKAGES = np.logspace(-3, 2, 26)


@dataclass(frozen=True)
class Linear:
    """A ridge regression of scores on standardised genes.

    `effects` (genes,): the change of the score per standard deviation of a gene, all others fixed.
    `explained`: the share of the scores' variance that it predicts of candidates left out; at most
    1, and 0 or below where it predicts no better than their mean.
    """

    effects: Array
    explained: float


def study_sensitivity(storage: Path, name: str) -> dict[str, Any]:
    """What the scored trials of study `name` say of its genes, as plain values.

    Raises ConfigError where there are too few of them.
    """
    log = existing_log(storage, name)
    log.close()
    space = space_from_mapping(begun_with(log)["space"])
    scored = [trial for trial in trials_of(log.history) if trial["adjusted"] is not None]
    needed = max(_FEWEST, _FEWEST_PER_GENE * space.dimension)
    if len(scored) < needed:
        raise ConfigError(
            f"study {name}: --importance needs {needed} scored trials for {space.dimension} genes "
            f"({_FEWEST_PER_GENE} each, {_FEWEST} at least); there are {len(scored)}"
        )
    genomes = np.array([space.clip(trial["genome"]) for trial in scored])
    return sensitivity(space, genomes, np.array([trial["adjusted"] for trial in scored]))


def sensitivity(space: SearchSpace, genomes: Array, scores: Array) -> dict[str, Any]:
    """The same of `genomes` (n, genes), clipped, and their `scores` (n,), higher is better.

    `importance` is each gene's share of all by PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255):
    how differently the best quarter of the candidates is spread from all of them.
    """
    places = genomes.copy()
    places[:, space.logarithmic] = np.log(places[:, space.logarithmic])
    shares, chance = _importances(places, scores)
    linear = ridge(places, scores)
    best, weights = _best_quarter(scores)
    best_mean, best_spread = _mean_and_spread(genomes[best], weights)
    all_mean, all_spread = _mean_and_spread(genomes, np.full(len(genomes), 1 / len(genomes)))
    genes = [
        {
            "gene": gene.name,
            **{key: dict(gene.place).get(key) for key in ("layers", "model", "group")},
            "importance": float(shares[index]),
            "effect": float(linear.effects[index]),
            "best": {"mean": float(best_mean[index]), "spread": float(best_spread[index])},
            "all": {"mean": float(all_mean[index]), "spread": float(all_spread[index])},
            "bounds": [gene.low, gene.high],
        }
        for index, gene in enumerate(space.form.genes)
    ]
    return {
        "candidates": len(scores),
        "best_quarter": len(best),
        "method": "PED-ANOVA",
        "chance": chance,
        "explained_linearly": linear.explained,
        "genes": genes,
        "sums": {key: _sums(genes, key) for key in ("layers", "model", "group")},
    }


def ridge(places: Array, scores: Array) -> Linear:
    """The ridge regression of `scores` (n,) on `places` (n, genes) that predicts best.

    Its shrinkage is the one of the least error of candidates left out, which for ridge needs no
    refitting (Golub, Heath & Wahba 1979, doi:10.1080/00401706.1979.10489751).
    """
    deviations = places.std(axis=0)
    varying = deviations > 0
    centred = scores - scores.mean()
    effects = np.zeros(places.shape[1])
    total = float((centred**2).sum()) * (len(scores) / (len(scores) - 1)) ** 2
    if not varying.any() or total == 0:
        return Linear(effects, 0.0)
    design = (places[:, varying] - places[:, varying].mean(axis=0)) / deviations[varying]
    left, sizes, right = np.linalg.svd(design, full_matrices=False)
    errors = []
    for shrinkage in _SHRINKAGES * len(scores):
        kept = sizes**2 / (sizes**2 + shrinkage)
        leverage = 1 / len(scores) + (left**2) @ kept
        residuals = centred - left @ (kept * (left.T @ centred))
        errors.append(float(((residuals / (1 - leverage)) ** 2).sum()))
    chosen = int(np.argmin(errors))
    shrinkage = _SHRINKAGES[chosen] * len(scores)
    effects[varying] = right.T @ (sizes / (sizes**2 + shrinkage) * (left.T @ centred))
    return Linear(effects, 1 - errors[chosen] / total)


def _importances(places: Array, scores: Array) -> tuple[Array, float]:
    """Each gene's share of all importance, and the greatest share by chance.

    The latter is what the most important gene has of shuffled scores, in the same measure: 95 % of
    the times that no gene matters none exceeds it. Genes that do not vary have the share 0.
    """
    shares = np.zeros(places.shape[1])
    varying = np.flatnonzero(np.ptp(places, axis=0) > 0)
    if not len(varying) or not np.ptp(scores):
        return shares, 1.0
    source = np.random.RandomState(0)
    shuffled = [source.permutation(scores) for _ in range(_SHUFFLES)]
    found = importances(places[:, varying], np.array([scores, *shuffled]), _BEST_SHARE)
    total = float(found[0].sum())
    if total <= 0:
        return shares, 1.0
    shares[varying] = found[0] / total
    return shares, min(float(found[1:].max()) / total, 1.0)


def _best_quarter(scores: Array) -> tuple[npt.NDArray[np.intp], Array]:
    """The candidates with the highest scores, and weights that fall with the rank and sum to 1."""
    count = max(int(_BEST_SHARE * len(scores)), 1)
    best = np.argsort(-scores, kind="stable")[:count]
    # Those of CMA-ES's recombination: Hansen 2016, arXiv:1604.00772, eq. 49.
    weights = np.log(count + 0.5) - np.log(np.arange(1, count + 1))
    return best, weights / weights.sum()


def _mean_and_spread(genomes: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted mean and standard deviation of each gene, each (genes,)."""
    mean = weights @ genomes
    return mean, np.sqrt(weights @ (genomes - mean) ** 2)


def _sums(genes: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """The importances of a slice's, a model's or a group's genes together; none for one alone."""
    sums: dict[str, float] = {}
    for gene in genes:
        if gene[key] is not None:
            sums[gene[key]] = sums.get(gene[key], 0.0) + gene["importance"]
    return sums if len(sums) > 1 else {}
