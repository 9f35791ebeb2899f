"""Gates: what is wrong with an answer on its face, whatever a scorer makes of it.

They are counted in every report. A grade changes by them only where the suite says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from evomerge.evaluate.task import Task, TaskResult

Gate = Literal["language", "repetition", "length", "empty"]
GATES: tuple[Gate, ...] = get_args(Gate)

# Answers above this are loops more often than not: in recorded gradings their mean is 2.0 to 2.7
# of 5, that of shorter ones above 3.
_RUNAWAY_CHARACTERS = 4000
# Fewer letters say nothing of a language: a name, a number with its unit, a term.
_LETTERS_AT_LEAST = 40
_JAPANESE_AT_LEAST = 0.3
# Chinese shares the characters, not the kana between them.
_KANA_AT_LEAST = 0.05

_KANA = re.compile("[\u3041-\u30ff\uff66-\uff9f]")
_KANJI = re.compile("[\u3005\u3400-\u4dbf\u4e00-\u9fff]")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_ADDRESS = re.compile(r"https?://\S+")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+・●]|\(?\d+[.)、:：]|\|)")
# What lines of programs have and sentences have not.
_CODE_LINE = re.compile(
    r"[{};]\s*$|^\s*(?:def|class|import|from|for|if|return|#include|SELECT)\b|\w\(.*\)\s*:?$|=>|==|:=|</"
)

# How often a piece has to follow itself at the end of a text, and how long all of it has to be.
_TIMES_AT_LEAST = 4
_LOOP_AT_LEAST = 60
_LONGEST_PIECE = 200
# Of what pieces of this length most stand more than once, nothing new is said.
_PIECE = 12
_DIFFERENT_AT_LEAST = 0.35
_LONG_ENOUGH = 300


def gates_of(task: Task, answer: str, *, cut: bool) -> tuple[Gate, ...]:
    """Which gates close for this answer, in the order of `GATES`; `cut`: at max_tokens.

    "language": a Japanese task is answered in another language, in sentences (code and lists are
    no sentences, and nobody is asked for Japanese whose right answer has none). "repetition": the
    text runs in a loop at its end, or says the same again and again. "length": it was cut, or has
    more than 4000 characters. "empty": it has no words.
    """
    if not answer.strip():
        return ("empty",)
    closed = {
        "language": _is_japanese_task(task) and _is_foreign(answer),
        "repetition": is_repetitive(answer),
        "length": cut or len(answer) > _RUNAWAY_CHARACTERS,
        "empty": False,
    }
    return tuple(gate for gate in GATES if closed[gate])


def count_gates(results: Iterable[TaskResult]) -> dict[str, int]:
    """How many answers each gate closed for, where there are such; in the order of `GATES`."""
    counts = Counter(gate for result in results for gate in result.gates)
    return {gate: counts[gate] for gate in GATES if counts[gate]}


def japanese_share(text: str) -> float | None:
    """The share of kana and kanji among the letters of the sentences of `text`, in [0, 1].

    Code, addresses and items of lists are left out; None where fewer than 40 letters remain.
    """
    prose = _prose(text)
    letters = sum(character.isalpha() for character in prose)
    if letters < _LETTERS_AT_LEAST:
        return None
    kana, kanji = len(_KANA.findall(prose)), len(_KANJI.findall(prose))
    if kana < _KANA_AT_LEAST * letters:
        return 0.0
    return min(1.0, (kana + kanji) / letters)


def is_repetitive(text: str) -> bool:
    """Whether `text` ends in a loop, or most of it was said before."""
    return _ends_in_loop(text.rstrip()) or _says_the_same(text)


def _is_japanese_task(task: Task) -> bool:
    """Whether an answer in Japanese is asked for, as far as task and right answer tell."""
    if not _KANA.search(task.user):
        return False
    if not task.reference.strip():
        return True
    share = japanese_share(task.reference)
    return share is None or share >= _JAPANESE_AT_LEAST


def _is_foreign(answer: str) -> bool:
    share = japanese_share(answer)
    return share is not None and share < _JAPANESE_AT_LEAST


def _prose(text: str) -> str:
    text = _ADDRESS.sub(" ", _CODE_BLOCK.sub(" ", text))
    lines = text.splitlines()
    return "\n".join(
        line for line in lines if not _LIST_ITEM.match(line) and not _CODE_LINE.search(line)
    )


def _ends_in_loop(text: str) -> bool:
    for size in range(1, min(_LONGEST_PIECE, len(text) // _TIMES_AT_LEAST) + 1):
        piece = text[-size:]
        times = max(_TIMES_AT_LEAST, -(-_LOOP_AT_LEAST // size))
        if text.endswith(piece * times) and any(map(str.isalnum, piece)):
            return True
    return False


def _says_the_same(text: str) -> bool:
    if len(text) < _LONG_ENOUGH:
        return False
    pieces: Sequence[str] = [text[at : at + _PIECE] for at in range(len(text) - _PIECE + 1)]
    return len(set(pieces)) < _DIFFERENT_AT_LEAST * len(pieces)
