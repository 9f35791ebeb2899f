"""The events of a study: what was asked, proposed, scored, told and chosen, as they are logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluate.ledger import UnitKey
from evomerge.evaluate.task import TaskResult
from evomerge.optimizer.history import Measurement, Part, Payload


@dataclass(frozen=True)
class Event:
    """One event as it is to be written; `once` names what may happen only once in a study.

    `unit` and `results` are the answers that belong to it, for the ledger; with `counts` False they
    have no part in any score.
    """

    kind: str
    payload: Payload
    once: str | None = None
    unit: UnitKey | None = None
    results: Sequence[TaskResult] = ()
    counts: bool = True


def begun(payload: Payload) -> Event:
    """The study as it was asked and resolved: all that a later run needs to be the same."""
    return Event("begun", payload, once="begun")


def opened(
    *,
    budget: Payload,
    asked_budget: Payload,
    process: str,
    engine_start: float,
    judge: Payload | None = None,
) -> Event:
    """A process took the study up, for `budget` in total; the study's file said `asked_budget`.

    `judge` is the file's, whose limits may be others than when the study began; `engine_start` are
    the seconds until the engine could take a candidate.
    """
    payload = {
        "trials": budget["trials"],
        "asked_trials": asked_budget["trials"],
        "task_evaluations": budget["task_evaluations"],
        "asked_task_evaluations": asked_budget["task_evaluations"],
        "process": process,
        "judge": judge,
    }
    return Event("opened", {**payload, "engine_start": round(engine_start, 3)})


def named(genomes: Mapping[str, Sequence[float]]) -> Event:
    """Genomes that are no trials' (uniform merges), by the candidate's name."""
    return Event("named", {"genomes": _plain(genomes)}, once="named")


def start(candidate: str | None, genome: Sequence[float], warm: str | None = None) -> Event:
    """Where the sampler begins: at the warm start of that name, else where `candidate` is.

    The latter is the best uniform merge of a sweep; None where there was none to choose from.
    """
    payload = {"candidate": candidate, "genome": [float(gene) for gene in genome]}
    return Event("start", payload | ({} if warm is None else {"warm": warm}), once="start")


def generation(
    block: int, genomes: Mapping[int, Sequence[float]], tasks: Sequence[str] | None = None
) -> list[Event]:
    """A generation's proposals, exactly as drawn (number -> genome), and its tasks (None: all).

    Belongs in one transaction.
    """
    head = Event(
        "generation",
        {"block": block, "numbers": list(genomes), "tasks": None if tasks is None else list(tasks)},
        once=f"generation {block}",
    )
    proposals = [
        Event(
            "proposed",
            {"number": number, "block": block, "genome": [float(gene) for gene in genome]},
            once=f"proposed {number}",
        )
        for number, genome in genomes.items()
    ]
    return [head, *proposals]


def scored(
    part: Part,
    measurement: Measurement,
    unit: UnitKey,
    results: Sequence[TaskResult],
    answered: int = 0,
) -> Event:
    """A unit was measured: its score, and in the ledger every answer and grade.

    `answered` tasks of this candidate's attempt came in units before.
    """
    payload = {
        "candidate": unit.candidate,
        "part": part,
        "attempt": unit.attempt,
        "score": measurement.score,
        "tasks": measurement.tasks,
        "unscored": measurement.unscored,
        "cut": measurement.cut,
        "recipe_digest": measurement.recipe_digest,
        "seconds": dict(measurement.seconds),
    }
    once = f"scored {unit.candidate} {part} {unit.attempt}" + f" after {answered}" * (answered > 0)
    return Event("scored", payload, once, unit, results)


def failed(
    candidate: str,
    part: Part,
    reason: str,
    seconds: Mapping[str, float],
    *,
    engine_died: bool = False,
    kept: tuple[UnitKey, Sequence[TaskResult]] | None = None,
) -> Event:
    """A candidate could not be scored, for a reason of its own, or killed the engine twice.

    `kept` are its answers, where it has any.
    """
    payload: dict[str, object] = {
        "candidate": candidate,
        "part": part,
        "reason": reason,
        "seconds": dict(seconds),
        "engine_died": engine_died,
    }
    if kept is None:
        return Event("failed", payload)
    unit, answers = kept
    payload["attempt"] = unit.attempt
    return Event("failed", payload, unit=unit, results=answers, counts=False)


def answered(part: Part, reason: str, unit: UnitKey, answers: Sequence[TaskResult]) -> Event:
    """A unit was answered, and the run ends before it is graded."""
    payload = {"candidate": unit.candidate, "part": part, "attempt": unit.attempt, "reason": reason}
    return Event("answered", payload, unit=unit, results=answers, counts=False)


def futile(candidate: str, reason: str) -> Event:
    """A candidate is not measured further: it credibly is among the worse of its generation."""
    payload = {"candidate": candidate, "reason": reason}
    return Event("futile", payload, once=f"futile {candidate}")


def told(block: int, values: Sequence[tuple[int, float]]) -> Event:
    """What the sampler learns of a generation: (number, value), higher is better."""
    return Event(
        "told", {"block": block, "values": [list(pair) for pair in values]}, once=f"told {block}"
    )


def pool(
    after: int,
    incumbent: str,
    challengers: Sequence[str],
    genomes: Mapping[str, Sequence[float]],
    left: int | None,
) -> Event:
    """Who is measured afresh after `after` blocks; `genomes` are those of candidates made for it.

    The incumbent wins unless one of the challengers beats it. `left` tasks may be answered for
    that; None: as many as it takes.
    """
    payload = {
        "after": after,
        "incumbent": incumbent,
        "challengers": list(challengers),
        "genomes": _plain(genomes),
        "left": left,
    }
    return Event("pool", payload, once=f"pool {after}")


def chosen(after: int, candidate: str, tests: Mapping[str, Mapping[str, float | None]]) -> Event:
    """Who won among the pool of `after` blocks; `tests` are the paired tests of challengers."""
    payload = {"after": after, "candidate": candidate, "tests": dict(tests)}
    return Event("chosen", payload, once=f"chosen {after}")


def stopped(reason: str, void: Sequence[tuple[str, Part]]) -> Event:
    """The run stopped for a reason not a candidate's own; the failures in `void` do not count."""
    return Event("stopped", {"reason": reason, "void": [list(key) for key in void]})


def finished(
    winner: Payload, budget: Payload, seconds: Mapping[str, float], summary: Payload | None
) -> Event:
    """The budget is spent and the winner chosen; `summary` is what can be said of it."""
    payload = {"winner": winner, **budget, "seconds": dict(seconds), "summary": summary}
    return Event("finished", payload)


def _plain(genomes: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {label: [float(gene) for gene in genome] for label, genome in genomes.items()}
