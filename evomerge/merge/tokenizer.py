"""Tokenizers as data: read, united, extended, and written so that transformers reads them back.

A united tokenizer goes on where the first one ends: all its ids stay, and it cuts text as before
until its own pieces are used up.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, reason_of
from evomerge.merge.chat_template import TEMPLATE_FILE
from evomerge.merge.model_files import (
    CONFIG_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
)

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIALS_FILE = "special_tokens_map.json"
_TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer as transformers reads it, without the tokens that have no row.

    `content` is that of a tokenizer.json; `ids` are all tokens, `added` the added ones with their
    flags; `roles` are the tokens with a role, such as {"eos_token": "</s>"}. `edited` says that
    its own files are no longer what it is.
    """

    name: str
    folder: Path
    content: Mapping[str, Any]
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str]
    edited: bool = False

    @property
    def kind(self) -> str:
        """The algorithm: BPE, Unigram, WordPiece or WordLevel."""
        return str(self.content["model"]["type"])

    @property
    def style(self) -> str:
        """What tokenizers with common pieces have in common: algorithm and spelling of pieces."""
        model = self.content["model"]
        steps = [self.content.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
        words = json.dumps(steps, ensure_ascii=False)
        if '"ByteLevel"' in words:
            spelling = "byte-level "
        else:
            spelling = "sentencepiece-style " if model.get("byte_fallback") or "▁" in words else ""
        marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
        marked = "".join(f" with {mark!r}" for mark in marks if mark)
        return f"{spelling}{self.kind}{marked}"

    @property
    def scores(self) -> dict[str, float]:
        """The pieces of a Unigram tokenizer with their logarithmic probabilities."""
        return {piece: float(score) for piece, score in self.content["model"]["vocab"]}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that a BPE tokenizer joins, the most urgent first."""
        pairs = self.content["model"]["merges"]
        halves = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
        return [(left, right) for left, right in halves]


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` has anything to make a tokenizer from."""
    return any((folder / file).is_file() for file in VOCABULARY_FILES)


def read_tokenizer(name: str, folder: Path, rows: int | None) -> Tokenizer:
    """The tokenizer in `folder`, without tokens beyond a model's `rows`.

    Raises ConfigError where there is none, or none that the tokenizers library runs.
    """
    inner = _loaded(folder)
    content = json.loads(inner.backend_tokenizer.to_str())
    roles = {role: str(token) for role, token in inner.special_tokens_map.items() if token}
    return _cut(_tokenizer(name, folder, content, roles), rows)


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ConfigError(
            f"{folder}: has no tokenizer to take (one of {', '.join(VOCABULARY_FILES)})"
        )
    try:
        inner: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        inner.backend_tokenizer.get_vocab_size()
    except Exception as error:  # whatever a broken file makes its many readers raise
        reason = reason_of(error)
        raise ConfigError(
            f"{folder}: its tokenizer cannot be read as a fast one, with which alone vocabularies "
            f"can be compared: {reason}; save a {_TOKENIZER_FILE} for it with transformers"
        ) from error
    return inner


def _tokenizer(
    name: str, folder: Path, content: Mapping[str, Any], roles: Mapping[str, str]
) -> Tokenizer:
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # of Unigram: pieces with scores, in the order of their ids
        ids = {piece: index for index, (piece, _) in enumerate(vocab)}
    else:
        ids = dict(vocab)
    added = {token["content"]: token for token in content["added_tokens"]}
    ids |= {token: int(flags["id"]) for token, flags in added.items()}
    return Tokenizer(name, folder, content, ids, added, roles)


def _cut(own: Tokenizer, rows: int | None) -> Tokenizer:
    """`own` without the tokens from id `rows` on: they have no embedding."""
    gone = {token for token, index in own.ids.items() if rows is not None and index >= rows}
    if not gone:
        return own
    model = dict(own.content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {t: index for t, index in model["vocab"].items() if t not in gone}
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in own.merges
            if not gone & {left, right, _joined(model, left, right)}
        ]
    added = {token: flags for token, flags in own.added.items() if token not in gone}
    return replace(
        own,
        content={**own.content, "model": model, "added_tokens": list(added.values())},
        ids={token: index for token, index in own.ids.items() if token not in gone},
        added=added,
        roles={role: token for role, token in own.roles.items() if token not in gone},
        edited=True,
    )


def _joined(model: Mapping[str, Any], left: str, right: str) -> str:
    """The piece that BPE makes of two: a continuing piece leaves its prefix."""
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def united(first: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """`first` with all tokens of `others` after its own.

    Pieces become pieces, so that text is made of them: BPE merges follow those of `first` (which
    cuts text in its own pieces as before), Unigram pieces keep their scores. A special token that
    `first` has as an ordinary piece becomes special. Raises ConfigError for other algorithms or
    spellings.
    """
    for other in others:
        _refuse_other_style(first, other)
    pieces = [
        token
        for other in others
        for token in sorted(other.ids.keys() - other.added.keys(), key=other.ids.__getitem__)
    ]
    special = [flags for other in others for flags in other.added.values()]
    ids = _numbered(_numbered(first.ids, pieces), [flags["content"] for flags in special])
    wanted = [
        flags
        for flags in special
        if flags["content"] not in first.ids or (flags["special"] and not _is_added(first, flags))
    ]
    return _rebuilt(first, others, ids, wanted)


def _is_added(own: Tokenizer, flags: Mapping[str, Any]) -> bool:
    return flags["content"] in own.added


def _numbered(ids: Mapping[str, int], tokens: Iterable[str]) -> dict[str, int]:
    """`ids` and, with the next free ids, those of `tokens` that are not there yet."""
    new = [token for token in dict.fromkeys(tokens) if token not in ids]
    start = max(ids.values(), default=-1) + 1
    return {**ids, **{token: start + place for place, token in enumerate(new)}}


def _refuse_other_style(first: Tokenizer, other: Tokenizer) -> None:
    if first.style != other.style:
        raise ConfigError(
            f"tokenizer_source: union: the tokenizers of {first.name} ({first.style}) and "
            f"{other.name} ({other.style}) cannot be united, as their pieces are not spelt or "
            f"joined alike; use 'base' or one of the models as the tokenizer's source"
        )


def with_tokens(
    own: Tokenizer, tokens: Sequence[str], tokenizers: Iterable[Tokenizer]
) -> Tokenizer:
    """`own` with `tokens` added: with the flags that one of `tokenizers` has for them, or plain."""
    new = [token for token in tokens if token not in own.ids]
    known: dict[str, Mapping[str, Any]] = {}
    for other in tokenizers:
        known = {**other.added, **known}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    wanted = [known.get(token, {"content": token, **plain}) for token in new]
    return _rebuilt(own, (), _numbered(own.ids, new), wanted)


def _rebuilt(
    own: Tokenizer,
    others: Sequence[Tokenizer],
    ids: Mapping[str, int],
    new_added: Iterable[Mapping[str, Any]],
) -> Tokenizer:
    """`own` with the tokens of `ids`, `new_added` of them as added ones; itself if it has them."""
    added = dict(own.added)
    for flags in new_added:
        added.setdefault(flags["content"], {**flags, "id": ids[flags["content"]]})
    if len(ids) == len(own.ids) and len(added) == len(own.added):
        return own
    content = {
        **own.content,
        "model": _model(own, others, ids),
        "added_tokens": sorted(added.values(), key=lambda flags: int(flags["id"])),
    }
    return replace(own, content=content, ids=ids, added=added, edited=True)


def _model(own: Tokenizer, others: Sequence[Tokenizer], ids: Mapping[str, int]) -> dict[str, Any]:
    """The `model` of a tokenizer.json with all of `ids`.

    Added tokens stand in it too: the library gives the next free id to those that do not,
    whatever id their entry says.
    """
    model = dict(own.content["model"])
    if own.kind == "Unigram":
        model["vocab"] = _scored(own, others, ids)
        return model
    model["vocab"] = dict(ids)
    if own.kind == "BPE":
        pairs = [pair for other in (own, *others) for pair in other.merges]
        model["merges"] = [
            [left, right]
            for left, right in dict.fromkeys(pairs)
            if left in ids and right in ids and _joined(model, left, right) in ids
        ]
    return model


def _scored(own: Tokenizer, others: Sequence[Tokenizer], ids: Mapping[str, int]) -> list[list[Any]]:
    """Unigram pieces and scores by id; added tokens, which are found before pieces, the lowest."""
    scores: dict[str, float] = {}
    for tokenizer in (own, *others):
        scores = tokenizer.scores | scores
    lowest = min(scores.values())
    by_id = sorted(ids, key=ids.__getitem__)
    if ids[by_id[-1]] != len(by_id) - 1:
        raise ConfigError(f"{own.folder}: the ids of its tokenizer have gaps")
    return [[piece, scores.get(piece, lowest)] for piece in by_id]


def files_of(own: Tokenizer) -> dict[str, str]:
    """The files of an edited tokenizer, by name; chat templates are not among them."""
    settings = _json_file(own.folder / _CONFIG_FILE)
    settings |= own.roles
    for key in ("added_tokens_decoder", "auto_map", "vocab_file", "tokenizer_file"):
        settings.pop(key, None)
    # The one class that takes a tokenizer.json as it is; others build their own pipeline.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    texts = {
        # Without line breaks: json writes those in Python, some seconds for 100,000 pieces.
        _TOKENIZER_FILE: json.dumps(own.content, ensure_ascii=False),
        _CONFIG_FILE: _as_text(_known_specials(settings, own)),
    }
    if (own.folder / _SPECIALS_FILE).is_file():
        specials = _json_file(own.folder / _SPECIALS_FILE)
        texts[_SPECIALS_FILE] = _as_text(_known_specials(specials, own))
    return texts


def _known_specials(settings: Mapping[str, Any], own: Tokenizer) -> dict[str, Any]:
    """`settings` without special tokens that the tokenizer lacks: transformers would add them."""
    known: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _TOKEN_LISTS and isinstance(value, list):
            known[key] = [token for token in value if _token_text(token) in own.ids]
        elif key in _TOKEN_LISTS and isinstance(value, Mapping):  # by a role of the model's own
            known[key] = {r: token for r, token in value.items() if _token_text(token) in own.ids}
        elif not key.endswith("_token") or not _names_missing(value, own):
            known[key] = value
    return known


def _names_missing(value: Any, own: Tokenizer) -> bool:
    return isinstance(value, str | Mapping) and _token_text(value) not in own.ids


def _token_text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, Mapping) else token)


def _json_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return dict(content) if isinstance(content, dict) else {}


def _as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def check_readable(own: Tokenizer, texts: Mapping[str, str]) -> None:
    """Raises ConfigError unless transformers reads from `texts` the very tokens of `own`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        if (own.folder / CONFIG_FILE).is_file():  # which has a say in the tokenizer's class
            shutil.copyfile(own.folder / CONFIG_FILE, folder / CONFIG_FILE)
        ids: dict[str, int] = _loaded(folder).get_vocab()
    if different := dict(own.ids).items() ^ ids.items():
        token, _ = min(different, key=lambda item: item[1])
        raise ConfigError(
            f"tokenizer: transformers does not read the tokenizer made from that of {own.name} as "
            f"it was made: token {token!r} has id {ids.get(token)}, not {own.ids.get(token)}; use "
            "'base' or one of the models as its source"
        )


def stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the tokenizer files in `folder`."""
    files = [folder / name for name in TOKENIZER_FILES]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


def write_tokenizer(
    directory: Path, source: Path, texts: Mapping[str, str] | None, template: str | None
) -> None:
    """Writes into `directory` the tokenizer of the model in `source`, or the one in `texts`.

    `texts` are the files of `files_of`, None where those in `source` are right as they are; its
    chat templates come with both. `template` replaces them, in the file that transformers reads
    first.
    """
    for name in TOKENIZER_FILES if texts is None else _TEMPLATE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for name, text in (texts or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    if template is not None:
        _set_template(directory, template)
    elif (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, directory / TEMPLATE_FOLDER)


def _set_template(directory: Path, template: str) -> None:
    for name in _TEMPLATE_FILES:
        (directory / name).unlink(missing_ok=True)
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    settings = _json_file(directory / _CONFIG_FILE)
    if settings.pop("chat_template", None) is not None:
        (directory / _CONFIG_FILE).write_text(_as_text(settings), encoding="utf-8")


def different_tokenizers(folders: Mapping[str, Path]) -> str | None:
    """A warning where the models in `folders` have different tokens; else None.

    Without a tokenizer in the recipe their rows are merged by number, as in mergekit. Files with
    the same bytes are not read.
    """
    files = {
        name: folder / _TOKENIZER_FILE
        for name, folder in folders.items()
        if (folder / _TOKENIZER_FILE).is_file()
    }
    first, *others = files or [""]
    different = [name for name in others if not _same_tokens(files[first], files[name])]
    if not different:
        return None
    return (
        f"the tokenizers of {', '.join(different)} and {first} differ, and their embeddings are "
        "merged by number; tokenizer_source: union or base merges them by token"
    )


def _same_tokens(one: Path, other: Path) -> bool:
    if one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes():
        return True
    return _tokens_of(one) == _tokens_of(other)


def _tokens_of(file: Path) -> object:
    """What a tokenizer.json gives ids to; its bytes where it is not one."""
    content = file.read_bytes()
    try:
        return _tokenizer("", file.parent, json.loads(content), {}).ids
    except (ValueError, LookupError, TypeError):
        return content
