"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# Tiny tensors gain nothing from a second thread, and threads on busy cores wait for each other.
torch.set_num_threads(1)

# A shell's background job starts with Ctrl-C ignored, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` is; 0 is this one alone.

    A vLLM on a GPU asks for nearly all of its memory, so tests there run one after another. Each
    process may hold several of an engine's, with 1 GB or more for each: no more than four of them.
    """
    if torch.cuda.is_available():
        return 0
    return min(4, os.cpu_count() or 1)
