"""What a search is asked to do, without models: the numbers that its course depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from evomerge.errors import ConfigError
from evomerge.optimizer import defaults
from evomerge.optimizer.names import SamplerName
from evomerge.optimizer.samplers import Scaling
from evomerge.space import Genome

# What smoothing and a mean to return need: a distribution that candidates are drawn from.
STRATEGIES = ("cma-es", "xnes")


@dataclass(frozen=True)
class Budget:
    """The most that a search may spend: the sampler's candidates, or tasks answered, by anybody."""

    trials: int | None = None
    task_evaluations: int | None = None

    def to_mapping(self) -> dict[str, int | None]:
        """Plain values, for the log."""
        return {"trials": self.trials, "task_evaluations": self.task_evaluations}


@dataclass(frozen=True)
class Plan:
    """What the course of a search depends on, beside its log.

    `start`, `low`, `high` (genes,) are in the genes' own units. `categories` are the search tasks
    in their order, each with its category; `holdout` the held-out ones. `base` and `inputs` are the
    names of candidates that are no genomes: base and models are measured on all search tasks, the
    inputs may win. `sweep` are uniform merges, name -> genome: the best of them, on `sweep_tasks`
    tasks, is where the sampler starts, unless one of `warm`, from elsewhere, is better on the same
    tasks. `tasks_per_candidate` is a number of tasks, drawn afresh for each generation. `attempts`
    fresh measurements decide who wins; 0: the best observed does.
    """

    sampler: SamplerName
    start: Genome
    sigma0: float
    population: int
    seed: int
    scaling: Scaling
    low: Genome
    high: Genome
    categories: Mapping[str, str]
    tasks_per_candidate: int
    sweep: Mapping[str, Genome] = field(default_factory=dict)
    sweep_tasks: int = 0
    warm: Mapping[str, Genome] = field(default_factory=dict)
    base: str | None = None
    inputs: Sequence[str] = ()
    holdout: Sequence[str] = ()
    smoothing: bool = True
    futility_stop: bool = True
    attempts: int = 3

    @property
    def tasks(self) -> tuple[str, ...]:
        """The ids of all search tasks."""
        return tuple(self.categories)

    @property
    def starts(self) -> Mapping[str, Genome]:
        """Where the sampler may start, by name."""
        return {**self.sweep, **self.warm}

    @property
    def references(self) -> tuple[str, ...]:
        """The names of candidates that are no genomes."""
        return (*(() if self.base is None else (self.base,)), *self.inputs)

    @property
    def smooths(self) -> bool:
        """Whether scores are smoothed before they are told."""
        return self.smoothing and self.sampler in STRATEGIES

    @property
    def generation_cost(self) -> int:
        """Tasks that a whole generation answers."""
        return self.population * self.tasks_per_candidate

    @property
    def start_cost(self) -> int:
        """Tasks that are answered before the first generation."""
        return len(self.starts) * self.sweep_tasks + len(self.references) * len(self.tasks)

    @property
    def end_cost(self) -> int:
        """Tasks that must be kept back for the end: the incumbent's fresh measurements, and what
        the table at the end shows.
        """
        fresh = self.attempts * len(self.tasks)
        return fresh + self.table_cost

    @property
    def table_cost(self) -> int:
        """Tasks that the table at the end may still need: greedy scores, search and held out.

        Only where there are references to compare with: a search without models ends at the winner.
        """
        if not self.references:
            return 0
        uniforms = min(2, len(self.sweep)) + 1  # and the winner
        whole = uniforms * len(self.tasks)
        return whole + (len(self.references) + uniforms) * len(self.holdout)


def with_tasks_for(plan: Plan, budget: Budget) -> Plan:
    """The plan with as many tasks for each candidate as suit the budget."""
    left = None
    if budget.task_evaluations is not None:
        left = budget.task_evaluations - plan.start_cost - plan.end_cost
    number = defaults.tasks_per_candidate(len(plan.tasks), plan.population, left)
    return replace(plan, tasks_per_candidate=number)


def check_budget(plan: Plan, budget: Budget, where: str) -> None:
    """Raises ConfigError where the budget does not allow one generation; `where` is its key."""
    if budget.trials is not None and budget.trials < plan.population:
        raise ConfigError(
            f"{where}.trials: {budget.trials} is less than one generation of {plan.population}; at "
            f"least {plan.population} are needed, or a smaller sampler.population"
        )
    least = plan.start_cost + plan.generation_cost + plan.end_cost
    if budget.task_evaluations is not None and budget.task_evaluations < least:
        raise ConfigError(
            f"{where}.task_evaluations: {budget.task_evaluations} is less than one generation: at "
            f"least {least} are needed ({plan.start_cost} for what the search starts from, "
            f"{plan.generation_cost} for {plan.population} candidates on "
            f"{plan.tasks_per_candidate} tasks each, {plan.end_cost} to measure the winner afresh)"
        )
