"""What every vLLM process of this environment runs at its start (`vllm.general_plugins`)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading

# Set in the environment of engines that a search starts for itself.
OWNED_VARIABLE = "EVOMERGE_OWNS_ENGINE"


def register() -> None:
    """Makes the weight-transfer backend "evomerge" known to vLLM by its path: nothing is loaded.

    vLLM calls this more than once in a process; versions without the interface are left alone.
    """
    with contextlib.suppress(ImportError, ValueError):  # no such interface; registered already
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        WeightTransferEngineFactory.register_engine(
            "evomerge", "evomerge.engine.vllm_backend", "MergeBackend"
        )
        if os.environ.get(OWNED_VARIABLE) == "1":
            end_with_the_parent()


def end_with_the_parent() -> None:
    """Has this process end when the one that started it does, however that ends.

    vLLM's own processes outlive a search that is killed, and hold the GPU's memory that its resume
    needs. In a process that nobody's `multiprocessing` started nothing is done.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
