"""How little a search costs and how honest it is: ours against its peers, on landscapes of known
truth (`landscapes.py`), at equal or smaller cost in task evaluations.

    .venv/bin/python scripts/bench_search.py [--quick] [--seeds 24] [--only shares peers …]
        [--grades SCORES.csv.gz]

Parts: `shares` (what share of plain CMA-ES's cost reaches its result), `peers` (Optuna's samplers
at equal cost), `curse` (whether the stated interval holds the truth), `replay` (choosing the best
of 32 real models; needs --grades: a table with columns model, task_id, score), `overhead`. Scores
are true ones: the expected grade of the returned weights over all tasks. Runs offline, on two
cores.
"""

from __future__ import annotations

import os

# Before numpy: dozens of small matrices per search, and the cores are used by whole searches.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import gzip
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from landscapes import HIGH, KINDS, LOW, Array, Landscape

TASKS = 100
PARTS = ("shares", "peers", "curse", "replay", "overhead")
DIMENSIONS = (20, 40)
# What plain CMA-ES spends: 10 candidates per gene, each on all tasks.
PLAIN_CANDIDATES = {20: 200, 40: 400}
# The defaults were chosen on landscapes of the seeds below.
FIRST_SEED = 1000
SHARES = (0.10, 0.15, 0.25)
PEERS = ("tpe", "optuna cma-es", "gp")


@dataclass(frozen=True)
class Job:
    """One search: `way` is who searches, `budget` how many task evaluations it may spend."""

    way: str
    kind: str
    dimension: int
    seed: int
    budget: int
    tasks: int = TASKS


@dataclass(frozen=True)
class Found:
    """What a search returned: its true score, what was reported of it, and what was spent."""

    truth: float
    score: float = math.nan
    low: float = math.nan
    high: float = math.nan
    spent: int = 0


def main() -> None:
    options = _options()
    parts = options.only or PARTS
    seeds = range(FIRST_SEED, FIRST_SEED + (4 if options.quick else options.seeds))
    begun = time.perf_counter()
    with _workers(options.processes) as pool:
        if "shares" in parts:
            kinds = ("hill", "rugged") if options.quick else options.kinds
            shares(pool, kinds, DIMENSIONS[:1] if options.quick else DIMENSIONS, seeds)
        if "peers" in parts:
            peers(pool, seeds, options.quick)
        if "curse" in parts:
            curse(pool, 60 if options.quick else 400)
    if "replay" in parts and options.grades:
        replay(options.grades, 60 if options.quick else 1000)
    if "overhead" in parts:
        overhead(120 if options.quick else 1000)
    print(f"\n{time.perf_counter() - begun:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer of everything, in a minute")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--grades", type=Path, help="real grades, for the replay")
    parser.add_argument("--processes", type=int, default=min(2, len(os.sched_getaffinity(0))))
    return parser.parse_args()


@contextmanager
def _workers(processes: int) -> Iterator[Pool]:
    with get_context("spawn").Pool(processes, initializer=os.nice, initargs=(10,)) as pool:
        yield pool


def run(job: Job) -> Found:
    """Does a job; a function of it alone."""
    warnings.simplefilter("ignore")
    landscape = Landscape(KINDS[job.kind], job.dimension, job.tasks, job.seed)
    random = np.random.RandomState([job.seed, 1])
    if job.way == "ours":
        return _ours(landscape, random, job)
    way = plain if job.way == "plain" else optuna_search
    return Found(float(landscape.truth(way(landscape, random, job))[0]), spent=job.budget)


def _ours(landscape: Landscape, random: np.random.RandomState, job: Job) -> Found:
    from evomerge.search import maximize

    def grade(weights: Array, tasks: Sequence[int], attempt: int) -> list[float]:
        return [float(one) for one in landscape.grades(weights, tasks, random)[0]]

    found = maximize(
        grade,
        dimension=job.dimension,
        bounds=(LOW, HIGH),
        tasks=job.tasks,
        budget=job.budget,
        seed=job.seed,
    )
    assert found.spent <= job.budget
    truth = float(landscape.truth(found.weights)[0])
    low, high = found.interval
    return Found(truth, found.score, low, high, found.spent)


def plain(landscape: Landscape, random: np.random.RandomState, job: Job) -> Array:
    """CMA-ES as mergekit-evolve runs it: textbook population, all tasks, the best observed wins.

    It starts at weights of 0.5 with steps of 0.25, which suits it better than its own 1/6.
    """
    from evomerge.optimizer.evolution_samplers import CmaEs
    from evomerge.optimizer.samplers import Told

    population = 4 + math.floor(3 * math.log(job.dimension))
    sampler = CmaEs(
        start=np.full(job.dimension, 0.5), sigma0=0.25, population=population, seed=job.seed
    )
    best, best_value, number = np.full(job.dimension, 0.5), -math.inf, 0
    while (number + population) * job.tasks <= job.budget:
        genomes = np.array([sampler.propose(number + each) for each in range(population)])
        values = landscape.grades(genomes, range(job.tasks), random).mean(axis=1)
        numbered = enumerate(zip(genomes, values, strict=True), start=number)
        sampler.tell([Told(index, x.tolist(), float(value)) for index, (x, value) in numbered])
        if values.max() > best_value:
            best, best_value = genomes[values.argmax()], float(values.max())
        number += population
    return best


def optuna_search(landscape: Landscape, random: np.random.RandomState, job: Job) -> Array:
    """One of Optuna's samplers with its defaults, all tasks; the best observed wins."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=job.seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=job.seed),
        "optuna cma-es": lambda: optuna.samplers.CmaEsSampler(seed=job.seed),
    }
    study = optuna.create_study(direction="maximize", sampler=samplers[job.way]())

    def objective(trial: optuna.Trial) -> float:
        weights = [trial.suggest_float(str(gene), LOW, HIGH) for gene in range(job.dimension)]
        return float(landscape.grades(np.array(weights), range(job.tasks), random).mean())

    study.optimize(objective, n_trials=job.budget // job.tasks)
    return np.array([study.best_params[str(gene)] for gene in range(job.dimension)])


def shares(pool: Pool, kinds: Sequence[str], dimensions: Sequence[int], seeds: range) -> None:
    """Prints what shares of plain CMA-ES's cost give, less what it finds with all of it."""
    print(
        f"\n## Share of plain CMA-ES's task evaluations, {len(seeds)} seeds\n\n"
        "True score of what is returned, less plain CMA-ES's (± standard error); all is counted.\n"
    )
    heads = " | ".join(f"ours, {share:.0%}" for share in SHARES)
    print(f"| landscape | genes | plain | {heads} |\n|---|---|---|{'---|' * len(SHARES)}")
    for kind in kinds:
        for dimension in dimensions:
            whole = PLAIN_CANDIDATES[dimension] * TASKS
            jobs = [Job("plain", kind, dimension, seed, whole) for seed in seeds]
            for share in SHARES:
                jobs += [Job("ours", kind, dimension, seed, round(share * whole)) for seed in seeds]
            truths = _truths(pool, jobs).reshape(-1, len(seeds))
            cells = [_difference(ours - truths[0]) for ours in truths[1:]]
            row = f"| {kind} | {dimension} | {truths[0].mean():.3f} | {' | '.join(cells)} |"
            print(row, flush=True)


def peers(pool: Pool, seeds: range, quick: bool) -> None:
    """Prints ours less each peer, at equal budgets."""
    print(
        "\n## Optuna's samplers at equal cost, landscape `hill`\n\n"
        f"True score of ours less the peer's, {len(seeds)} seeds (± standard error).\n"
    )
    names = PEERS[:2] if quick else PEERS
    print(f"| genes | task evaluations | ours | {' | '.join(names)} |\n|---|---|---|{'---|' * 3}")
    for dimension, candidates in ((20, 100),) if quick else ((20, 100), (20, 200), (40, 200)):
        budget = candidates * TASKS
        ours = _truths(pool, [Job("ours", "hill", dimension, seed, budget) for seed in seeds])
        cells = []
        for name in names:
            theirs = _truths(pool, [Job(name, "hill", dimension, seed, budget) for seed in seeds])
            cells.append(_difference(ours - theirs))
        print(f"| {dimension} | {budget} | {ours.mean():.3f} | {' | '.join(cells)} |", flush=True)


def curse(pool: Pool, runs: int) -> None:
    """Prints how often the stated 95 % interval of the winner's score holds the true one."""
    print(f"\n## The winner's curse, {runs} runs of 10 genes, 40 tasks, 1,200 task evaluations\n")
    jobs = [Job("ours", "hill", 10, seed, 1200, tasks=40) for seed in range(runs)]
    found = pool.map(run, jobs, chunksize=4)
    held = [each.low <= each.truth <= each.high for each in found]
    widths = [each.high - each.low for each in found]
    errors = np.array([each.score - each.truth for each in found])
    # What errors of this spread would need, if it were known.
    needed = 2 * 1.96 * errors.std(ddof=1)
    print("| | | bar |\n|---|---|---|")
    print(f"| the 95 % interval holds the true score | **{np.mean(held):.1%}** | 93–97 % |")
    print(f"| its mean width | {np.mean(widths):.3f} | |")
    print(f"| over what the errors' own spread needs | **{np.mean(widths) / needed:.2f}** | ≈ 1 |")
    print(f"| reported less true score | {_difference(errors)} | ≈ 0 |")


def replay(path: Path, runs: int) -> None:
    """Prints what a race among 32 real sibling models loses, and what share of grades it needs."""
    from evomerge.optimizer.selection import race

    table = _siblings(path)
    regrets, spent = [], []
    for seed in range(runs):
        random = np.random.RandomState(seed)
        grades = table[random.choice(len(table), 32, replace=False)]
        order = random.permutation(grades.shape[1]).tolist()
        ended = race(_looked_up(grades), len(grades), order)
        means = grades.mean(axis=1)
        regrets.append(means.max() - means[ended.winner])
        spent.append(ended.spent / grades.size)
    print(f"\n## The best of 32 of {len(table)} real siblings, {runs} draws\n")
    print("| | | bar |\n|---|---|---|")
    print(f"| regret, in grades | **{np.mean(regrets):.4f}** | ≤ 0.012 |")
    print(f"| share of all grades | **{np.mean(spent):.1%}** | ≤ 37 % |")


def _looked_up(grades: Array) -> Callable[[Sequence[int], Sequence[int]], Array]:
    return lambda rows, tasks: np.asarray(grades[np.ix_(rows, tasks)])


def _siblings(path: Path) -> Array:
    """(models, tasks) the grades of fine-tunes of Llama-3.1-8B whose mean is above 3."""
    grades: dict[str, dict[str, float]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = row["model"].lower()
            if "llama-3.1-8b" in name or "llama3.1-8b" in name:
                grades.setdefault(name, {})[row["task_id"]] = float(row["score"])
    tasks = sorted(set.intersection(*(set(each) for each in grades.values())))
    table = np.array([[each[task] for task in tasks] for each in grades.values()])
    return np.asarray(table[table.mean(axis=1) > 3])


def overhead(candidates: int) -> None:
    """Prints what ask, tell and log cost per candidate."""
    from evomerge.search import maximize

    grading = 0.0
    random = np.random.RandomState(0)

    def grade(weights: Array, tasks: Sequence[int], attempt: int) -> list[float]:
        nonlocal grading
        begun = time.perf_counter()
        away = float(((weights - 1) ** 2).mean())
        grades = np.round(random.normal(4 - away, 1.0, len(tasks)))
        grading += time.perf_counter() - begun
        return [float(one) for one in grades]

    begun, cpu = time.perf_counter(), time.process_time()
    found = maximize(
        grade,
        dimension=64,
        bounds=(LOW, HIGH),
        tasks=TASKS,
        budget=candidates * 25 + 1000,
        settings={"tasks_per_candidate": 25},
    )
    spent, busy = time.perf_counter() - begun, time.process_time() - cpu
    print(f"\n## Ask, tell and log of {found.trials} candidates of 64 genes\n")
    print("| | per candidate | bar |\n|---|---|---|")
    print(f"| wall clock | **{(spent - grading) / found.trials * 1e3:.2f} ms** | < 5 ms |")
    print(f"| processor | {(busy - grading) / found.trials * 1e3:.2f} ms | |")


def _truths(pool: Pool, jobs: Sequence[Job]) -> Array:
    return np.array([found.truth for found in pool.map(run, jobs, chunksize=1)])


def _difference(values: Array) -> str:
    """Mean ± standard error."""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    return f"{values.mean():+.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
