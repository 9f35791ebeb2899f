"""What every vLLM process of this environment runs at its start (`vllm.general_plugins`)."""

from __future__ import annotations

import contextlib


def register() -> None:
    """Makes the weight-transfer backend "evomerge" known to vLLM by its path: nothing is loaded.

    vLLM calls this more than once in a process; versions without the interface are left alone.
    """
    with contextlib.suppress(ImportError, ValueError):  # no such interface; registered already
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        WeightTransferEngineFactory.register_engine(
            "evomerge", "evomerge.engine.vllm_backend", "MergeBackend"
        )
