"""The vocabulary of a merge: which tokens the output has, and each model's rows for them.

Every model's embeddings are put into the order of the output's tokens before they are merged; a
token that a model lacks gets a row from those that have it, the same in all models, so that it
survives the merge.
"""

# Shape letters: V = tokens of the output, R = rows of the output (V and padding), M = the models
# that go into one tensor.

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import ConfigError, nearest
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.tokenizer import (
    Tokenizer,
    check_readable,
    files_of,
    has_tokenizer,
    read_tokenizer,
    stamps,
    united,
    with_tokens,
)
from evomerge.recipe import ModelToken, Recipe, TokenChoice

# Keys of config.json and generation_config.json whose values are token ids.
_ID_KEY = re.compile(r".*_token_ids?|.*_token_index|(begin_)?suppress_tokens|bad_words_ids")
_LAYERED_KEY = "vocab_size_per_layer_input"
_MISSING = -1
_ROWS_AT_ONCE = 4096  # bounds the numbers that means and copies take beside the embeddings
_BLOCK = (
    1 << 18
)  # elements that are made at a time, as a merge asks for them one range after another


@dataclass(frozen=True)
class _Choice:
    """Where one token's row comes from: a row of a model, or zero (None)."""

    row: tuple[str, int] | None
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a merge's output, and where each model has their rows.

    `tokens` are by id (V; None where an id has none). `rows[model]` (V, int64) are the rows that
    the tokens have in a model's embeddings, -1 where it lacks one. The output has `size` rows: the
    tokens', and padding. `source` is the folder that the tokenizer comes from, `texts` the files
    that replace its own (None where its own are right). `notes` are warnings for the user.
    """

    tokens: tuple[str | None, ...]
    size: int
    rows: Mapping[str, Tensor]
    source: Path
    texts: Mapping[str, str] | None
    notes: tuple[str, ...]
    digest: str
    _base: str | None
    _choices: Mapping[int, _Choice]
    _old_sizes: Mapping[str, int]
    _roles: Mapping[str, int]

    def is_that_of(self, folder: Path) -> bool:
        """Whether it is the tokenizer in `folder` as it is, and that of every model, row by row."""
        same = torch.arange(self.size)
        return (
            self.source == folder
            and self.texts is None
            and not any(choice.force for choice in self._choices.values())
            and all(rows == self.size for rows in self._old_sizes.values())
            and all(torch.equal(rows, same) for rows in self.rows.values())
        )

    def require(self, tensor: str, models: Sequence[str]) -> None:
        """Raises ConfigError where `tensor`, merged of `models`, lacks a token's chosen source."""
        for index, choice in self._choices.items():
            if choice.row is not None and choice.row[0] not in models:
                raise ConfigError(
                    f"tokenizer: tokens: {self.tokens[index]}: source: {choice.row[0]} does not "
                    f"go into {tensor}; these do: {', '.join(models)}"
                )

    def aligned(
        self, models: Sequence[str], tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor | AlignedRows]:
        """The embeddings of `models` as they enter the merge: (rows, …) to (R, …), one for each.

        A row that a model lacks is the only one there is, the base model's, the plain mean of
        those that have it, or what the recipe chose; 0 where none has it. Padding is the mean of a
        model's other rows. Means are taken in float32 and rounded once, to the widest of the
        inputs' dtypes and `dtype` (that of the merged tensor), which is the outputs' dtype. Inputs
        are not changed, and returned as views where nothing moves.
        """
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), dtype)
        self._check_rows(models, tensors)
        rows_MV = torch.stack([self.rows[model] for model in models])
        forced_V = torch.zeros(len(self.tokens), dtype=torch.bool)
        forced_V[[index for index, choice in self._choices.items() if choice.force]] = True
        shared = _SharedRows(rows_MV, *self._origins(rows_MV, models), tensors, dtype)
        found: list[Tensor | AlignedRows] = []
        for rows_V, tensor in zip(rows_MV, tensors, strict=True):
            own_V = (rows_V != _MISSING) & ~forced_V
            if own_V.all() and torch.equal(rows_V, torch.arange(self.size)):
                found.append(tensor[: self.size])
            else:
                one = AlignedRows(
                    self.size,
                    is_token=self._is_token,
                    own_V=own_V,
                    rows_V=rows_V,
                    tensor=tensor,
                    shared=shared,
                )
                found.append(one)
        return found

    def _check_rows(self, models: Sequence[str], tensors: Sequence[Tensor]) -> None:
        for model, tensor in zip(models, tensors, strict=True):
            needed = int(self.rows[model].max()) + 1
            if len(tensor) < needed:
                raise ConfigError(
                    f"{model}: an output embedding has {len(tensor)} rows, but its tokenizer "
                    f"needs {needed}"
                )

    @cached_property
    def _is_token(self) -> Tensor:
        return torch.tensor([token is not None for token in self.tokens])

    def _origins(self, rows_MV: Tensor, models: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token's common row: a model's index (-1: none), its row there, or a mean (V)."""
        has_MV = rows_MV != _MISSING
        counts = has_MV.sum(0)
        owner = torch.where(counts == 1, has_MV.int().argmax(0), _MISSING)
        if self._base in models:
            index = models.index(self._base)
            owner[(counts > 1) & has_MV[index]] = index
        is_mean = (counts > 1) & (owner == _MISSING)
        row = rows_MV.gather(0, owner.clamp(min=0)[None])[0]
        for token, choice in self._choices.items():
            model, chosen = choice.row or (None, _MISSING)
            is_mean[token] = False
            owner[token] = models.index(model) if model is not None else _MISSING
            row[token] = chosen
        return owner, row, is_mean

    def configured(self, content: Mapping[str, Any], donor: str) -> dict[str, Any]:
        """`donor`'s config (or generation config) with this vocabulary's size and token ids.

        An id whose token is gone becomes that of the output's own token of the same role, and is
        None where it has none. (mergekit leaves the ids as they are.)
        """
        old = self.rows[donor]
        new_ids = {row: index for index, row in enumerate(old.tolist()) if row != _MISSING}
        sizes = {content.get("vocab_size"), self._old_sizes[donor]}
        return {
            key: self._configured_value(key, value, new_ids, sizes)
            for key, value in content.items()
        }

    def _configured_value(
        self, key: str, value: Any, new_ids: Mapping[int, int], sizes: set[int | None]
    ) -> Any:
        if isinstance(value, Mapping):
            return {
                inner: self._configured_value(inner, own, new_ids, sizes)
                for inner, own in value.items()
            }
        if key == "vocab_size" and value in sizes:
            return self.size
        if _ID_KEY.fullmatch(key):
            return _renumbered(value, new_ids, self._roles.get(key))
        return value


@dataclass(frozen=True)
class _SharedRows:
    """The rows that models have in common where one lacks its own; see `Vocabulary.aligned`.

    `rows_MV` are the models' own; `owner`, `row` and `is_mean` those of `Vocabulary._origins`.
    """

    rows_MV: Tensor
    owner: Tensor
    row: Tensor
    is_mean: Tensor
    tensors: Sequence[Tensor]
    dtype: torch.dtype

    def of(self, ids: Tensor) -> Tensor:
        """The rows (len(ids), …) of the tokens `ids`."""
        out = torch.zeros((len(ids), *self.tensors[0].shape[1:]), dtype=self.dtype)
        for index, tensor in enumerate(self.tensors):
            mine = self.owner[ids] == index
            out[mine] = tensor[self.row[ids[mine]]].to(self.dtype)
        means = self.is_mean[ids]
        out[means] = self._mean(ids[means])
        return out

    def _mean(self, ids: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros((len(ids), *self.tensors[0].shape[1:]), dtype=wide)
        for rows_V, tensor in zip(self.rows_MV, self.tensors, strict=True):
            has = rows_V[ids] != _MISSING
            total[has] += tensor[rows_V[ids[has]]].to(wide)
        counts = (self.rows_MV[:, ids] != _MISSING).sum(0)
        return (total / counts.reshape(-1, *[1] * (total.dim() - 1))).to(self.dtype)


class AlignedRows:
    """One model's embeddings (R, …) in the order of the output's tokens, made when asked for.

    What a merge asks of a tensor it answers as one: shape, dtype, device, and ranges of itself as
    one line. So it takes some rows' memory in each thread, and not that of the embeddings.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        size: int,
        *,
        is_token: Tensor,
        own_V: Tensor,
        rows_V: Tensor,
        tensor: Tensor,
        shared: _SharedRows,
    ) -> None:
        self.shape = torch.Size((size, *tensor.shape[1:]))
        self.dtype = shared.dtype
        self._is_token, self._own, self._places = is_token, own_V, rows_V
        self._tensor, self._shared = tensor, shared
        self._columns = math.prod(self.shape[1:])
        self._at_hand = threading.local()
        self._padding = self._mean_of_tokens()

    def numel(self) -> int:
        return math.prod(self.shape)

    def detach(self) -> AlignedRows:
        return self

    def reshape(self, *shape: int) -> AlignedRows:
        assert shape == (-1,), "its ranges are those of one line"
        return self

    def __getitem__(self, part: slice) -> Tensor:
        """The flat elements [start, stop), not to be written to."""
        start, stop = part.start, part.stop
        first, end, flat = getattr(self._at_hand, "block", (0, 0, None))
        if flat is None or not first <= start <= stop <= end:
            top, bottom = start // self._columns, -(-stop // self._columns)
            bottom = max(bottom, min(len(self), top + max(1, _BLOCK // self._columns)))
            flat = self._block(top, bottom).reshape(-1)
            first, end = top * self._columns, bottom * self._columns
            self._at_hand.block = first, end, flat
        piece: Tensor = flat[start - first : stop - first]
        return piece

    def __len__(self) -> int:
        return self.shape[0]

    def whole(self) -> Tensor:
        """All of it, as a tensor of its own."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for first in range(0, len(self), _ROWS_AT_ONCE):
            end = min(first + _ROWS_AT_ONCE, len(self))
            out[first:end] = self._block(first, end)
        return out

    def _block(self, first: int, end: int) -> Tensor:
        """The rows [first, end)."""
        ids = torch.arange(first, min(end, len(self._is_token)))
        if len(ids) == end - first and bool(self._own[ids].all()):
            return self._tensor[self._places[ids]].to(self.dtype)
        out = torch.empty((end - first, *self.shape[1:]), dtype=self.dtype)
        is_token = torch.zeros(end - first, dtype=torch.bool)
        is_token[: len(ids)] = self._is_token[ids]
        out[is_token] = self._rows(ids[self._is_token[ids]])
        if self._padding is not None:
            out[~is_token] = self._padding
        return out

    def _rows(self, ids: Tensor) -> Tensor:
        """The rows of tokens: the model's own, or those in common."""
        out = torch.empty((len(ids), *self.shape[1:]), dtype=self.dtype)
        own = self._own[ids]
        out[own] = self._tensor[self._places[ids[own]]].to(self.dtype)
        out[~own] = self._shared.of(ids[~own])
        return out

    def _mean_of_tokens(self) -> Tensor | None:
        """The mean of the tokens' rows, which fills all others; None where there are no others."""
        count = int(self._is_token.sum())
        if count == len(self):
            return None
        total = torch.zeros(self.shape[1:], dtype=torch.float64)
        for ids in torch.split(self._is_token.nonzero()[:, 0], _ROWS_AT_ONCE):
            total += self._rows(ids).sum(0, dtype=torch.promote_types(self.dtype, torch.float32))
        return (total / count).to(self.dtype)


def build_vocabulary(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Vocabulary | None:
    """The vocabulary that `recipe` asks for; None where it says nothing about a tokenizer.

    The ids are those of the tokenizer's source (the base model, else the first one, for "union"
    and "base"); a union goes on with the others' ordinary tokens, in the order of the models and
    by id, then with their added ones; then come the tokens that the recipe adds. Raises ConfigError
    where a tokenizer cannot be read or united with the others, or a token's source lacks it.
    """
    choice = recipe.tokenizer
    source = choice.source if choice else recipe.tokenizer_source
    if source is None:
        return None
    models = recipe.model_names()
    _refuse_layered_embeddings(checkpoints[models[0]])
    folders = {model: checkpoints[model].directory for model in models}
    sizes = {model: checkpoints[model].architecture.embedding_header.shape[0] for model in models}
    read_too = [] if source in ("union", "base") or source in models else [Path(source)]
    request = _Request(
        source=source,
        base=recipe.base_model,
        models=tuple((model, folders[model], sizes[model]) for model in models),
        tokens=tuple((choice.tokens if choice else {}).items()),
        multiple=(choice.pad_to_multiple_of if choice else None) or 1,
        stamps=tuple(stamps(folder) for folder in [*folders.values(), *read_too]),
    )
    return _vocabulary(request)


def _refuse_layered_embeddings(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if any(_LAYERED_KEY in part for part in (config, config.get("text_config") or {})):
        raise ConfigError(
            f"{checkpoint.directory / 'config.json'}: {_LAYERED_KEY}: this architecture has "
            "embeddings in each layer, which are not aligned by token; leave tokenizer_source out"
        )


@dataclass(frozen=True)
class _Request:
    """All that a vocabulary depends on: the recipe's words, (name, folder, rows) of each model,
    and what tells that a tokenizer's files have changed."""

    source: str
    base: str | None
    models: tuple[tuple[str, Path, int], ...]
    tokens: tuple[tuple[str, TokenChoice], ...]
    multiple: int
    stamps: tuple[tuple[tuple[str, int, int], ...], ...]


# A search asks for the same one in every trial; reading three tokenizers takes seconds.
@lru_cache(maxsize=2)
def _vocabulary(request: _Request) -> Vocabulary:
    notes: list[str] = []
    tokenizers = _read_all(request, notes)
    first = tokenizers[request.base or request.models[0][0]]
    if request.source == "union":
        output = united(first, [own for own in tokenizers.values() if own is not first])
    elif request.source == "base":
        output = first
    elif request.source in tokenizers:
        output = tokenizers[request.source]
    else:
        output = read_tokenizer(request.source, Path(request.source), None)
    output = with_tokens(output, [token for token, _ in request.tokens], tokenizers.values())
    texts = files_of(output) if output.edited else None
    if texts is not None:
        check_readable(output, texts)
    return _assemble(request, output, tokenizers, texts, notes)


def _read_all(request: _Request, notes: list[str]) -> dict[str, Tokenizer]:
    """The merged models' tokenizers; one without files has the first one's, as in mergekit."""
    names = [name for name, _, _ in request.models]
    first = request.base or names[0]
    folders = {name: (folder, rows) for name, folder, rows in request.models}
    tokenizers = {first: read_tokenizer(first, *folders[first])}
    for name in names:
        folder, rows = folders[name]
        if name == first:
            continue
        if has_tokenizer(folder):
            tokenizers[name] = read_tokenizer(name, folder, rows)
        elif rows == folders[first][1]:
            notes.append(f"{name} has no tokenizer; it is taken to be that of {first}")
            tokenizers[name] = replace(tokenizers[first], name=name)
        else:
            raise ConfigError(
                f"{name}: this model has no tokenizer, and {rows} rows where {first} has "
                f"{folders[first][1]}: copy the tokenizer that it was trained with into it"
            )
    return tokenizers


def _assemble(
    request: _Request,
    output: Tokenizer,
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[str, str] | None,
    notes: Sequence[str],
) -> Vocabulary:
    count = max(output.ids.values()) + 1
    tokens: list[str | None] = [None] * count
    for token, index in output.ids.items():
        tokens[index] = token
    rows = {
        model: torch.tensor(
            [_MISSING if token is None else own.ids.get(token, _MISSING) for token in tokens]
        )
        for model, own in tokenizers.items()
    }
    choices = _choices(request, output, tokenizers)
    size = -(-count // request.multiple) * request.multiple
    digest = hashlib.sha256(repr((tokens, size, texts, sorted(choices.items()))).encode())
    for model, _, _ in request.models:
        digest.update(rows[model].numpy().tobytes())
    return Vocabulary(
        tokens=tuple(tokens),
        size=size,
        rows=rows,
        source=output.folder,
        texts=texts,
        notes=tuple(notes),
        digest=digest.hexdigest(),
        _base=request.base,
        _choices=choices,
        _old_sizes={model: rows for model, _, rows in request.models},
        _roles={f"{role}_id": output.ids[token] for role, token in output.roles.items()},
    )


def _choices(
    request: _Request, output: Tokenizer, tokenizers: Mapping[str, Tokenizer]
) -> dict[int, _Choice]:
    """The recipe's exceptions by token id; without a source a token follows the usual rules."""
    chosen = {}
    for token, choice in request.tokens:
        where = f"tokenizer: tokens: {token}"
        if choice.source is None:
            if choice.force:
                raise ConfigError(f"{where}: force: true needs a source to take the row from")
            continue
        row = _chosen_row(where, token, choice, request, tokenizers)
        chosen[output.ids[token]] = _Choice(row, choice.force)
    return chosen


def _chosen_row(
    where: str,
    token: str,
    choice: TokenChoice,
    request: _Request,
    tokenizers: Mapping[str, Tokenizer],
) -> tuple[str, int] | None:
    """(model, row) of a token's source; None for zeros. Raises ConfigError where it has none."""
    source = choice.source
    if isinstance(source, str):
        model, wanted = source, token
    elif isinstance(source, ModelToken):
        model, wanted = source.model, source.token or ""
    else:
        return None
    sizes = {name: rows for name, _, rows in request.models}
    if model not in sizes:
        raise ConfigError(f"{where}: source: {model} is not merged{nearest(model, sizes)}")
    if isinstance(source, ModelToken) and source.token_id is not None:
        if source.token_id >= sizes[model]:
            raise ConfigError(
                f"{where}: token_id: {source.token_id} is beyond {model}'s {sizes[model]} rows"
            )
        return model, source.token_id
    if wanted not in tokenizers[model].ids:
        raise ConfigError(
            f"{where}: source: {model} has no token {wanted!r} either; use a model that has it, "
            "{kind: model_token, …} or {kind: zero}"
        )
    return model, tokenizers[model].ids[wanted]


def _renumbered(value: Any, new_ids: Mapping[int, int], fallback: int | None) -> Any:
    """Token ids (one, or lists of them) by the new numbers; negative ones mean "none" and stay."""
    if isinstance(value, list):
        numbers = [_renumbered(item, new_ids, None) for item in value]
        kept = [number for number in numbers if number is not None and number != []]
        return kept or ([fallback] if fallback is not None else [])
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value
    return new_ids.get(value, fallback)
