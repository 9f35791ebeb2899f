"""What turns one answer into a grade; a suite names its scorer."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

from evomerge.evaluate.task import Task

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

# A sign counts only where no digit stands before it: "7-3" holds 7 and 3, not 7 and -3.
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Scorer(Protocol):
    """Grades answers against references, in [low, high]; higher is better."""

    name: str
    low: float
    high: float

    def objection(self, task: Task) -> str | None:
        """Why no answer to `task` can be graded; None where that is possible."""

    def grade(self, task: Task, answer: str) -> float:
        """The grade of `answer` to `task`."""


class ExactScorer:
    """1.0 where answer and reference are the same text but for outer white space, else 0.0.

    Both are put in Unicode's NFKC form first, so that "１２" is "12" (as Japanese models write it).
    """

    name = "exact"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        return _needs_reference(task)

    def grade(self, task: Task, answer: str) -> float:
        return float(_normal(answer) == _normal(task.reference))


class NumericScorer:
    """1.0 where the last number in the answer is the reference's to 1e-6 of its size, else 0.0.

    Numbers may have a sign, thousands commas, decimals and an exponent.
    """

    name = "numeric"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        found = last_number(task.reference)
        return None if found is not None else f"{task.reference!r} holds no number"

    def grade(self, task: Task, answer: str) -> float:
        given, right = last_number(answer), last_number(task.reference)
        if given is None or right is None:
            return 0.0
        return float(math.isclose(given, right, rel_tol=1e-6, abs_tol=1e-9))


class ChrfScorer:
    """chrF of the answer against the reference, in [0, 1]: F₂ over n-grams of 1 to 6 characters.

    Made of characters, it needs no word borders, which Japanese does not write.
    Source: Popović 2015, W15-3049; computed by sacrebleu with its usual settings.
    """

    name = "chrf"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        return _needs_reference(task)

    def grade(self, task: Task, answer: str) -> float:
        score: float = _chrf().sentence_score(_normal(answer), [_normal(task.reference)]).score
        return score / 100


class RougeLScorer:
    """ROUGE-L of the answer against the reference, in [0, 1]: F₁ of the longest common subsequence.

    Words are those of scripts that write spaces; a Japanese, Chinese or Korean character is a word
    of its own. (The usual tokenizer keeps a to z and 0 to 9 alone, and finds nothing in Japanese.)
    Source: Lin 2004, W04-1013, §3.
    """

    name = "rouge_l"
    low, high = 0.0, 1.0

    def objection(self, task: Task) -> str | None:
        return None if _words(task.reference) else "the reference has no word"

    def grade(self, task: Task, answer: str) -> float:
        given, right = _words(answer), _words(task.reference)
        common = _longest_common_subsequence(given, right)
        return 2 * common / (len(given) + len(right))


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (ExactScorer(), NumericScorer(), ChrfScorer(), RougeLScorer())
}


def last_number(text: str) -> float | None:
    """The last number written in `text` (in NFKC form); None where there is none."""
    numbers = _NUMBER.findall(_normal(text))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


def _needs_reference(task: Task) -> str | None:
    return None if _normal(task.reference) else "the reference is empty"


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


# A character of a script without spaces; else a run of letters, marks and digits.
_WORD = re.compile(
    "[\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
    "|[^\\W_\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)


def _words(text: str) -> list[str]:
    return _WORD.findall(_normal(text).lower())


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit of an integer for each word of `one`.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(one)) - 1
    rest = everything
    for word in other:
        matches = rest & places.get(word, 0)
        rest = ((rest + matches) | (rest - matches)) & everything
    return (everything ^ rest).bit_count()
