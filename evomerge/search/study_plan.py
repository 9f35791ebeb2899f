"""The plan of a study: its search without its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evomerge.optimizer.defaults import sweep_scales, sweep_tasks
from evomerge.optimizer.plan import Budget, Plan, with_tasks_for
from evomerge.optimizer.samplers import Scaling
from evomerge.search.candidates import BASE, UNIFORM, model_label, uniform_label
from evomerge.search.resolve import ResolvedStudy
from evomerge.space import Genome, SearchSpace


def plan_of(study: ResolvedStudy, warm: Mapping[str, Sequence[float]], budget: Budget) -> Plan:
    """What the course of the study's search depends on; `warm` are its warm starts by name.

    A study of course 0 is searched as it was then: all tasks, no sweep, the best observed wins.
    Where candidates go by disk, and a switch is dear, each answers all tasks, in one go.
    """
    config, space = study.config, study.space
    categories = {task.id: task.category for task in study.search_tasks}
    old, dear = study.course == 0, config.engine.load == "disk"
    sweep = {UNIFORM: space.clip(space.uniform(1 / len(space.models)))}
    if not old:
        sweep |= {uniform_label(scale): space.uniform(scale) for scale in scales_of(study)}
    plan = Plan(
        sampler=study.sampler,
        start=space.start,
        sigma0=study.sigma0,
        population=study.population,
        seed=config.sampler.seed,
        scaling=Scaling(space.steps, space.logarithmic),
        low=space.low,
        high=space.high,
        categories=categories,
        tasks_per_candidate=len(categories) if old or dear else study.tasks_per_candidate,
        sweep=sweep,
        sweep_tasks=sweep_tasks(len(categories)) if len(sweep) + len(warm) > 1 else len(categories),
        warm={label: np.array(genome) for label, genome in warm.items()},
        base=BASE,
        inputs=[model_label(index) for index in range(len(space.models))],
        holdout=[task.id for task in study.holdout_tasks],
        smoothing=config.smoothing and not old,
        futility_stop=config.futility_stop and not (old or dear),
        attempts=0 if old else config.selection.attempts,
    )
    if config.tasks_per_candidate is not None:
        return replace(plan, tasks_per_candidate=study.tasks_per_candidate)
    return plan if old or dear else with_tasks_for(plan, budget)


def scales_of(study: ResolvedStudy) -> Sequence[float]:
    """The scales of the sweep, beside 1 / number of models; none where scales change nothing."""
    asked, space = study.config.sweep, study.space
    if asked is False or not _scale_matters(space):
        return ()
    wanted = sweep_scales(len(space.models)) if asked is True else asked
    plain = 1 / len(space.models)
    return [scale for scale in wanted if abs(scale - plain) > 1e-6 and _is_within(space, scale)]


def _is_within(space: SearchSpace, scale: float) -> bool:
    genome: Genome = space.uniform(scale)
    return bool((genome == space.clip(genome)).all())


def _scale_matters(space: SearchSpace) -> bool:
    """Whether the merge is another one when all its weights are multiplied by a number."""
    if not any(gene.is_weight for gene in space.form.genes):
        return False
    recipe = space.uniform_recipe()
    normalize = recipe.rules.parameter("normalize")
    if normalize is None:
        return False
    return not recipe.parameters.get("normalize", normalize.default)
