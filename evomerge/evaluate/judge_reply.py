"""What a judge's reply says: its grade and reason, by the first rung of a ladder that holds.

The rungs: a JSON object with the grade; the last number behind a word for "grade"; the last whole
number that can be a grade. Never the first number: judges quote the rubric before they decide (of
1,300 real replies the first number was right in 753, the last one in all).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# What reasoning models write before their reply; where its beginning is in the prompt, the end
# stands alone.
_THOUGHT = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"<think(?:ing)?>", re.IGNORECASE)

_GRADE_KEYS = ("grade", "score", "rating", "final_score", "評価", "点数", "採点", "スコア")
_REASON_KEYS = ("reason", "explanation", "rationale", "理由", "説明")

_WORDS = r"final[ _]score|score|grade|rating|採点結果|最終評価|評価|点数|得点|採点|スコア"
_TAGGED = re.compile(
    rf"""\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]                             # [[4]], of MT-Bench
    | <(?:score|grade|rating)>\s*(-?\d+(?:\.\d+)?)                   # <score>4
    | (?:^|[^\w])["'*_]*(?:{_WORDS})["'*_]*\s*(?::|=|は)\s*["'*_\[]*\s*(-?\d+(?:\.\d+)?)
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
# A scale, which is no grade: "4/5", "4 out of 5", "5点満点", "5段階".
_SCALE = re.compile(r"(?:/|out\s+of)\s*\d+|\d+\s*(?:点満点|段階)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d.\w-])-?\d+(?:\.\d+)?(?![\d\w-]|\.\d)", re.ASCII)


@dataclass(frozen=True)
class Verdict:
    """A judge's grade, in the range that was asked for, and why."""

    grade: float
    reason: str


def read_verdict(reply: str, low: int, high: int) -> Verdict | None:
    """The grade in a whole `reply`; None where it has none, or one that is not in [low, high].

    A JSON object that breaks off gives None: numbers in its reason are no grade.
    """
    text = _without_thoughts(unicodedata.normalize("NFKC", reply)).strip()
    found = _last_object(text)
    if found is not None:
        return _in_range(*found, low, high)
    tagged = _last_tagged(text)
    if tagged is not None:
        return _in_range(tagged, text, low, high)
    if text.removeprefix("```json").removeprefix("```").lstrip().startswith("{"):
        return None
    numbers = [float(number) for number in _NUMBER.findall(_SCALE.sub(" ", text))]
    grades = [number for number in numbers if low <= number <= high and number.is_integer()]
    return Verdict(grades[-1], text) if grades else None


def _without_thoughts(text: str) -> str:
    """`text` less what stands in <think>; nothing where the thinking has no end."""
    rest = _THOUGHT.sub("", text)
    return _OPEN_THOUGHT.split(rest, maxsplit=1)[0]


def _in_range(grade: float, reason: str, low: int, high: int) -> Verdict | None:
    return Verdict(grade, reason) if low <= grade <= high else None


def _last_object(text: str) -> tuple[float, str] | None:
    """Grade and reason of the last JSON object in `text` that has a grade."""
    found = None
    for mapping in _objects(text):
        grade = _grade_of(mapping)
        if grade is not None:
            reasons = (mapping[key] for key in _REASON_KEYS if key in mapping)
            found = grade, str(next(reasons, ""))
    return found


def _objects(text: str) -> Iterator[Mapping[str, object]]:
    """The JSON objects in `text` that are not inside of another one."""
    decoder = json.JSONDecoder(strict=False)  # models write line ends into strings
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # no JSON, or a number of 5000 digits
            end = start + 1
        else:
            if isinstance(value, dict):
                yield {str(key).lower(): inner for key, inner in value.items()}
        start = text.find("{", end)


def _grade_of(mapping: Mapping[str, object]) -> float | None:
    for key in _GRADE_KEYS:
        value = mapping.get(key)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", value.strip()):
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < 1e9 else math.inf
    return None


def _last_tagged(text: str) -> float | None:
    numbers = [next(filter(None, match.groups())) for match in _TAGGED.finditer(text)]
    return float(numbers[-1]) if numbers else None
