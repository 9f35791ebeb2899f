"""A model directory's tokenizer as llama.cpp knows tokenizers: tokens, types, scores, merges."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, reason_of

# llama.cpp's token types, as in gguf.TokenType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Of what no merge makes: after every merge, so that no text is put together to it by accident.
_NO_SCORE = -1e9

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"

# How the text is cut into words before byte pairs are merged, by llama.cpp's name for it: the steps
# of a pre-tokenizer as `_word_steps` writes them.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN_WORDS = (
    r"%s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OPTIONAL_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORDS: dict[tuple[str, ...], str] = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (_PLAIN_WORDS % (_CONTRACTIONS, "{1,3}"), "bytes"): "llama-bpe",
    (_PLAIN_WORDS % (_CONTRACTIONS, ""), "bytes"): "qwen2",
    (_CASED_WORDS % ("", "", ""), "bytes"): "tekken",
    (
        _CASED_WORDS % (_OPTIONAL_CONTRACTIONS, _OPTIONAL_CONTRACTIONS, "{1,3}"),
        "bytes",
    ): "gpt-4o",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; ids are places in `tokens`.

    `model` is "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "t5" (Unigram), `words`
    llama.cpp's name for the way that text is cut into words. `scores` are empty for "gpt2",
    `merges` for the others. `special` holds the ids of bos, eos, unk, pad, sep and mask that there
    are; `adds_bos` and `adds_eos` say what is put around a text. `templates` are the chat templates
    by name, `notes` what llama.cpp cannot do of the tokenizer.
    """

    model: str
    words: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    removes_spaces: bool = False
    charsmap: bytes = b""
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def read_vocabulary(directory: Path, rows: int) -> Vocabulary:
    """The tokenizer in `directory`, filled up with unused tokens to the embeddings' `rows`.

    Tokens of ids beyond those, which the model cannot take, are left out. Raises ConfigError where
    it cannot be read or is of a kind that llama.cpp does not have.
    """
    tokenizer = _load(directory)
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = _model(directory, described)
    if model == "gpt2" and not described["model"]["merges"]:
        raise ConfigError(
            f"{directory}: the tokenizer merges no bytes, and llama.cpp takes none such"
        )
    tokens, types = _tokens(tokenizer, described, model, rows)
    plain = tokenizer.encode("a", add_special_tokens=False)
    around = tokenizer.encode("a")
    scores, merges = _ranks(model, described["model"], tokens)
    return Vocabulary(
        model=model,
        words=_words(directory, described) if model == "gpt2" else "default",
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        special=_special(tokenizer, rows),
        adds_bos=_is(around[:1], tokenizer.bos_token_id) and around[:1] != plain[:1],
        adds_eos=_is(around[-1:], tokenizer.eos_token_id) and around[-1:] != plain[-1:],
        adds_space=bool(plain) and tokens[plain[0]].startswith(_SPACE),
        removes_spaces=any("Regex" in str(step.get("pattern")) for step in _normalizers(described)),
        charsmap=_charsmap(described),
        templates=_templates(tokenizer),
        notes=(*_beyond(tokenizer, rows), *_notes(model, described)),
    )


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a broken file makes its many readers raise
        reason = reason_of(error)
        raise ConfigError(f"{directory}: no tokenizer can be read there: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"{directory}: {type(tokenizer).__name__} is written in Python and cannot be exported; "
            "save it with a tokenizer.json"
        )
    return tokenizer


def _model(directory: Path, described: Mapping[str, Any]) -> str:
    kind = described["model"]["type"]
    if kind == "BPE":
        is_byte_level = any(step["type"] == "ByteLevel" for step in _pre_tokenizers(described))
        return "gpt2" if is_byte_level else "llama"
    if kind == "Unigram":
        return "t5"
    raise ConfigError(
        f"{directory}: a tokenizer of kind {kind} cannot be exported; byte-level BPE, "
        "SentencePiece BPE and Unigram can"
    )


def _tokens(
    tokenizer: Any, described: Mapping[str, Any], model: str, rows: int
) -> tuple[list[str], list[int]]:
    """The text and the type of each id below `rows`."""
    texts = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    has_bytes = bool(described["model"].get("byte_fallback"))
    for text, index in tokenizer.get_vocab().items():
        if index < rows:
            texts[index] = text
            types[index] = BYTE if has_bytes and _BYTE_TOKEN.fullmatch(text) else NORMAL
    for added in described["added_tokens"]:
        index, is_special = added["id"], added["special"]
        if index < rows:
            types[index] = CONTROL if is_special else USER_DEFINED
            # llama.cpp finds these in the text as it is, before spaces are replaced.
            texts[index] = added["content"] if is_special else added["content"].replace(_SPACE, " ")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown < rows and model != "gpt2":
        types[unknown] = UNKNOWN
    return texts, types


def _ranks(
    model: str, described: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[list[float], list[str]]:
    """The scores and the merges, of which each kind of tokenizer has one."""
    if model == "t5":
        scores = [float(score) for _, score in described["vocab"]][: len(tokens)]
        return [*scores, *[_NO_SCORE] * (len(tokens) - len(scores))], []
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in described["merges"]]
    if model == "gpt2":
        return [], [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    # SentencePiece merges the pair that makes the piece of the highest score first: the order of
    # the merges, which transformers made from the scores, or a trainer learned.
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, index)
    return [float(-rank[text]) if text in rank else _NO_SCORE for text in tokens], []


def _words(directory: Path, described: Mapping[str, Any]) -> str:
    steps = tuple(_word_steps(described))
    if steps not in _WORDS:
        raise ConfigError(
            f"{directory}: the tokenizer cuts text into words in a way that is not known by name "
            f"in llama.cpp ({' + '.join(steps)}); known are {', '.join(_WORDS.values())}"
        )
    return _WORDS[steps]


def _word_steps(described: Mapping[str, Any]) -> Iterator[str]:
    for step in _pre_tokenizers(described):
        if step["type"] == "ByteLevel":
            yield "bytes of words" if step.get("use_regex", True) else "bytes"
        elif step["type"] == "Digits" and step.get("individual_digits"):
            yield "digits"
        elif step["type"] == "Split":
            yield str(next(iter(step["pattern"].values())))
        else:
            yield str(step["type"])


def _pre_tokenizers(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _steps(described.get("pre_tokenizer"), "pretokenizers")


def _normalizers(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _steps(described.get("normalizer"), "normalizers")


def _steps(described: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not described:
        return []
    return list(described[key]) if described["type"] == "Sequence" else [described]


def _charsmap(described: Mapping[str, Any]) -> bytes:
    """SentencePiece's table of normalised letters; empty without one."""
    for step in _normalizers(described):
        if step["type"] == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"] or "")
    return b""


def _special(tokenizer: Any, rows: int) -> dict[str, int]:
    found = {
        name: getattr(tokenizer, f"{name}_token_id", None)
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
    }
    return {name: index for name, index in found.items() if index is not None and index < rows}


def _is(ids: Sequence[int], special: int | None) -> bool:
    return special is not None and list(ids) == [special]


def _templates(tokenizer: Any) -> dict[str, str]:
    template = tokenizer.chat_template
    if not template:
        return {}
    return {"default": template} if isinstance(template, str) else dict(template)


def _beyond(tokenizer: Any, rows: int) -> tuple[str, ...]:
    beyond = [text for text, index in tokenizer.get_vocab().items() if index >= rows]
    if not beyond:
        return ()
    named = ", ".join(beyond[:3]) + (" …" if len(beyond) > 3 else "")
    return (
        f"tokenizer: {len(beyond)} tokens ({named}) have ids beyond the model's {rows} embeddings "
        "and are left out",
    )


def _notes(model: str, described: Mapping[str, Any]) -> tuple[str, ...]:
    if model != "t5":
        return ()
    notes = []
    if described["model"].get("byte_fallback"):
        notes.append(
            "tokenizer: llama.cpp's Unigram has no byte fallback: letters that are not in the "
            "vocabulary become the unknown token"
        )
    lost = {step["type"] for step in _normalizers(described)} & {"NFC", "NFD", "NFKC", "NFKD"}
    if lost:
        notes.append(f"tokenizer: llama.cpp does not normalise text ({', '.join(sorted(lost))})")
    return tuple(notes)
