"""An event loop in a thread of its own, for coroutines whose results come as futures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines while the block lasts; what is left at its end is cancelled.

    The thread begins with the first of them, not before: engines fork, which threads make unsafe.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._lock = threading.Lock()

    @property
    def has_begun(self) -> bool:
        """Whether anything was ever run."""
        return self._thread.ident is not None

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """The coroutine's result, later."""
        self._begin()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Has the loop call `function`, soon; what it returns goes nowhere."""
        self._begin()
        self._loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """Cancels what runs, waits for it to end, and ends the thread."""
        if self._loop.is_closed():
            return
        if not self.has_begun:
            self._loop.close()
            return
        self.submit(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _begin(self) -> None:
        with self._lock:
            if not self.has_begun:
                self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
