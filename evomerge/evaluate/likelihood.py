"""Grades from the likelihood of given texts: one prefill, no decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.engine.base import Engine
from evomerge.errors import CandidateError
from evomerge.evaluate.task import Task


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is after its prompt: the sum of log-probabilities (nats) of its tokens."""

    text: str
    total: float
    tokens: int


class LikelihoodScorer(Protocol):
    """Grades a model by how likely it finds given texts, in [low, high]; higher is better."""

    name: str
    low: float
    high: float

    def objection(self, task: Task) -> str | None:
        """Why `task` cannot be graded; None where it can."""

    def continuations(self, task: Task) -> tuple[str, ...]:
        """The texts whose likelihood is asked for."""

    def judge(self, task: Task, found: Sequence[Likelihood]) -> tuple[float, str]:
        """The grade, and the text that stands for the answer."""


class ChoiceScorer:
    """1.0 where the right one of the task's choices is the likeliest after the prompt, else 0.0."""

    name = "choice"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        choices = [choice.strip() for choice in task.choices]
        if len(choices) < 2:
            return "a choice needs two answers at least; name their columns by `choices:`"
        if len(set(choices)) < len(choices) or not all(choices):
            return "two of the choices are the same, or one is empty"
        if task.reference.strip() not in choices:
            by_place = task.reference.strip().isdecimal()
            hint = "; where it is a place, from 0: choice_index: true" * by_place
            return f"the reference {task.reference!r} is none of the choices{hint}"
        return None

    def continuations(self, task: Task) -> tuple[str, ...]:
        return task.choices

    def judge(self, task: Task, found: Sequence[Likelihood]) -> tuple[float, str]:
        likeliest = max(found, key=self._height)
        return float(likeliest.text.strip() == task.reference.strip()), likeliest.text

    def _height(self, choice: Likelihood) -> float:
        return choice.total


class NormalisedChoiceScorer(ChoiceScorer):
    """The same by the log-probability for each byte of a choice, which longer ones do not lose by.

    lm-evaluation-harness calls it acc_norm.
    """

    name = "choice_norm"

    def _height(self, choice: Likelihood) -> float:
        return choice.total / len(choice.text.encode())


class ReferenceScorer:
    """The geometric mean of the probabilities of the reference's tokens after the prompt.

    exp(mean log-probability), in [0, 1]; 1 is a model that would write the reference for certain.
    """

    name = "reference_likelihood"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        return None if task.reference.strip() else "the reference is empty"

    def continuations(self, task: Task) -> tuple[str, ...]:
        return (task.reference,)

    def judge(self, task: Task, found: Sequence[Likelihood]) -> tuple[float, str]:
        return math.exp(found[0].total / found[0].tokens), task.reference


LIKELIHOOD_SCORERS: dict[str, LikelihoodScorer] = {
    scorer.name: scorer for scorer in (ChoiceScorer(), NormalisedChoiceScorer(), ReferenceScorer())
}


def likelihoods(
    engine: Engine,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    delimiter: str = "",
    add_special_tokens: bool,
) -> list[list[Likelihood]]:
    """Per prompt the likelihood of each of its continuations, in one call to the engine.

    `delimiter` stands before each of them and belongs to it.

    A continuation's tokens begin where the tokens of prompt and continuation together first differ
    from those of the prompt alone, at the same place for all of a prompt: so a tokenizer that joins
    the last letter of the one with the first of the other does no harm. Raises CandidateError where
    a model gives no numbers.
    """
    texts = [
        prompt + delimiter + text
        for prompt, some in zip(prompts, continuations, strict=True)
        for text in some
    ]
    alone = engine.encode(prompts, add_special_tokens=add_special_tokens)
    whole = iter(engine.encode(texts, add_special_tokens=add_special_tokens))
    scored = iter(engine.log_probabilities(texts, add_special_tokens=add_special_tokens))
    found = []
    for prompt_ids, some in zip(alone, continuations, strict=True):
        ids = [next(whole) for _ in some]
        # The first token of all has no probability, whatever it is.
        start = max(1, min(_common(prompt_ids, each) for each in ids))
        logs = [next(scored)[start - 1 :] for _ in some]
        found.append(
            [
                Likelihood(text, _sum(each), max(1, len(each)))
                for text, each in zip(some, logs, strict=True)
            ]
        )
    return found


def _sum(logs: Sequence[float]) -> float:
    total = math.fsum(logs)
    if math.isnan(total):
        raise CandidateError("the model's probabilities are not numbers (NaN)")
    return total


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
