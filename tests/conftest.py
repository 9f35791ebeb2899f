"""What all tests share."""

from __future__ import annotations

import signal

import torch

# Tiny tensors gain nothing from a second thread, and threads on busy cores wait for each other.
torch.set_num_threads(1)

# A shell's background job starts with Ctrl-C ignored, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
