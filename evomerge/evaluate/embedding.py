"""Texts as vectors, by any model that transformers loads: what a router may compare tasks by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.errors import ConfigError

_BATCH = 32
# Where sentence-transformers keeps how a model's vectors become one.
_POOLING_FILE = Path("1_Pooling", "config.json")

Pooling = Literal["mean", "cls", "last"]


class TransformersEmbedding:
    """Texts -> vectors of length 1: the last hidden states of `folder`'s model, pooled.

    Pooled as the model's sentence-transformers configuration says, else by their mean. `prefix`
    goes before every text (E5 models want "query: "). Raises ConfigError where transformers does
    not load the model.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        from transformers import AutoModel, AutoTokenizer

        self._prefix = prefix
        self._pooling = _pooling(folder)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers does not load {folder}: {error}") from error
        self._tokenizer = tokenizer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row for each text."""
        # Alike long ones together: padding costs what text costs.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            rows.update(zip(places, self._batch([texts[place] for place in places]), strict=True))
        return np.stack([rows[place] for place in range(len(texts))])

    @torch.inference_mode()
    def _batch(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # By hand: models without a padding token have no other way.
        limit = int(getattr(self._model.config, "max_position_embeddings", 512))
        ids = [self._ids(text)[:limit] for text in texts]
        longest = max(map(len, ids))
        padding = self._tokenizer.pad_token_id or 0
        batch = torch.tensor(
            [one + [padding] * (longest - len(one)) for one in ids], device=self._device
        )
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        mask = torch.arange(longest, device=self._device) < lengths[:, None]
        states = self._model(input_ids=batch, attention_mask=mask.long()).last_hidden_state.float()
        vectors = _pooled(states, mask, lengths, self._pooling)
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        found: NDArray[np.float32] = unit.cpu().numpy()
        return found

    def _ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(self._prefix + text)["input_ids"])
        return ids or [self._tokenizer.pad_token_id or 0]


def _pooled(
    states: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, pooling: Pooling
) -> torch.Tensor:
    """(texts, tokens, width) -> (texts, width)."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _pooling(folder: Path) -> Pooling:
    file = folder / _POOLING_FILE
    if not file.is_file():
        return "mean"
    said = json.loads(file.read_text(encoding="utf-8"))
    if said.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if said.get("pooling_mode_lasttoken") else "mean"
