"""What all tests share."""

from __future__ import annotations

import torch

# Tiny tensors gain nothing from a second thread, and threads on busy cores wait for each other.
torch.set_num_threads(1)
