"""The vocabulary of a merge: which tokens the output has, and each model's rows for them.

Every model's embeddings are put into the order of the output's tokens before they are merged; a
token that a model lacks gets a row from those that have it, the same in all models, so that it
survives the merge.
"""

# Shape letters: V = tokens of the output, R = rows of the output (V and padding), M = the models
# that go into one tensor.

from __future__ import annotations

import hashlib
import re
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
_ROWS_AT_ONCE = 4096  # bounds the float32 numbers that means take beside the embeddings


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

    def align(
        self, models: Sequence[str], tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
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
        shared_V = self._replaced(rows_MV)
        shared_rows = self._shared(shared_V.nonzero()[:, 0], rows_MV, models, tensors, dtype)
        return [
            self._aligned(rows_V, shared_V, shared_rows, tensor, dtype)
            for rows_V, tensor in zip(rows_MV, tensors, strict=True)
        ]

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

    def _replaced(self, rows_MV: Tensor) -> Tensor:
        """Which tokens (V) have a row of all models' in common, at least where one lacks it."""
        shared_V = (rows_MV == _MISSING).any(0) & self._is_token
        forced = [index for index, choice in self._choices.items() if choice.force]
        shared_V[forced] = True
        return shared_V

    def _shared(
        self,
        ids: Tensor,
        rows_MV: Tensor,
        models: Sequence[str],
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """The common rows (len(ids), …) of the tokens `ids`."""
        out = torch.zeros((len(ids), *tensors[0].shape[1:]), dtype=dtype)
        owner, row, is_mean = self._origins(ids, rows_MV, models)
        for index, tensor in enumerate(tensors):
            mine = owner == index
            out[mine] = tensor[row[mine]].to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for places in _parts(is_mean):
            total = torch.zeros((len(places), *out.shape[1:]), dtype=wide)
            for rows_V, tensor in zip(rows_MV, tensors, strict=True):
                has = rows_V[ids[places]] != _MISSING
                total[has] += tensor[rows_V[ids[places]][has]].to(wide)
            counts = (rows_MV[:, ids[places]] != _MISSING).sum(0)
            out[places] = (total / counts.reshape(-1, *[1] * (out.dim() - 1))).to(dtype)
        return out

    def _origins(
        self, ids: Tensor, rows_MV: Tensor, models: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per token of `ids`: a model's index (-1: none) and its row, or that it is a mean."""
        has_MV = rows_MV[:, ids] != _MISSING
        counts = has_MV.sum(0)
        owner = torch.where(counts == 1, has_MV.int().argmax(0), _MISSING)
        if self._base in models:
            index = models.index(self._base)
            owner[(counts > 1) & has_MV[index]] = index
        is_mean = (counts > 1) & (owner == _MISSING)
        row = torch.where(owner >= 0, rows_MV[owner.clamp(min=0), ids], _MISSING)
        for token, choice in self._choices.items():
            place = ids == token
            model, chosen = choice.row or (None, _MISSING)
            is_mean[place] = False
            owner[place] = models.index(model) if model is not None else _MISSING
            row[place] = chosen
        return owner, row, is_mean

    def _aligned(
        self,
        rows_V: Tensor,
        shared_V: Tensor,
        shared_rows: Tensor,
        tensor: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        forced_V = torch.zeros_like(shared_V)
        forced_V[[index for index, choice in self._choices.items() if choice.force]] = True
        own_V = (rows_V != _MISSING) & ~forced_V
        if own_V.all() and torch.equal(rows_V, torch.arange(self.size)):
            return tensor[: self.size]
        out = torch.empty((self.size, *tensor.shape[1:]), dtype=dtype)
        for ids in _parts(own_V):
            out[ids] = tensor[rows_V[ids]].to(dtype)
        out[(shared_V & ~own_V).nonzero()[:, 0]] = shared_rows[~own_V[shared_V]]
        self._fill_padding(out)
        return out

    def _fill_padding(self, out: Tensor) -> None:
        """Writes the mean of the tokens' rows into all other rows."""
        count = int(self._is_token.sum())
        if count == self.size:
            return
        total = torch.zeros(out.shape[1:], dtype=torch.float64)
        for ids in _parts(self._is_token):
            total += out[ids].sum(0, dtype=torch.promote_types(out.dtype, torch.float32))
        is_padding = torch.ones(self.size, dtype=torch.bool)
        is_padding[: len(self.tokens)] = ~self._is_token
        out[is_padding] = (total / count).to(out.dtype)

    def configured(self, content: Mapping[str, Any], donor: str) -> dict[str, Any]:
        """`donor`'s config (or generation config) with this vocabulary's size and token ids.

        An id whose token is gone becomes that of the output's own token of the same role, and is
        None where it has none. (mergekit leaves the ids as they are.)
        """
        old = self.rows[donor]
        new_ids = {int(row): index for index, row in enumerate(old) if row != _MISSING}
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


def _parts(mask: Tensor) -> Sequence[Tensor]:
    """The places where `mask` is true, some thousands at once."""
    return torch.split(mask.nonzero()[:, 0], _ROWS_AT_ONCE)


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
