"""What a search remembers of its source tensors from one candidate to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from evomerge.merge.blends import Recall

_Result = TypeVar("_Result")

# What keeping a number takes beside it, measured: its key and the names of three source tensors.
# Random methods leave some thousands of them behind with every candidate.
_KEY_BYTES = 1100


@dataclass
class Statistics:
    """What merge methods computed of source tensors and may ask for again, candidate by candidate.

    Kept by the tensors and the method's own key, the oldest given up beyond `limit` bytes. Several
    threads may ask at once.
    """

    limit: int = 1 << 30
    _kept: OrderedDict[Hashable, tuple[Any, int]] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, inputs: Hashable) -> Recall:
        """The memory of a method that computes with `inputs` (`merge.methods.Recall`)."""

        def recall(key: Hashable, compute: Callable[[], _Result]) -> _Result:
            place = (inputs, key)
            with self._lock:
                if place in self._kept:
                    self._kept.move_to_end(place)
                    known: _Result = self._kept[place][0]
                    return known
            result = compute()  # outside of the lock: twice at the worst, and the same
            with self._lock:
                self._keep(place, result)
            return result

        return recall

    def _keep(self, place: Hashable, result: Any) -> None:
        if place in self._kept:
            return
        size = _KEY_BYTES + _bytes_of(result)
        self._kept[place] = result, size
        self._bytes += size
        while self._bytes > self.limit and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed


def _bytes_of(result: Any) -> int:
    """About how much memory a statistic takes: a tensor, numbers, or a collection of them."""
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    if isinstance(result, list | tuple):
        return 64 + sum(map(_bytes_of, result))
    if is_dataclass(result):
        return 64 + sum(_bytes_of(getattr(result, one.name)) for one in fields(result))
    return int(getattr(result, "nbytes", 64))
