"""`make demo`: the search of scripts/demo/demo.yaml, as a new study each time.

python scripts/demo.py [--seed 0] [--storage DIR] [--trials N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evomerge.cli import main
from evomerge.commands.options import storage_directory

STUDY_FILE = Path(__file__).resolve().parent / "demo" / "demo.yaml"


def run_as_new_study(study_file: Path) -> int:
    """`evomerge search` on the file, under a name that is not taken; its exit status."""
    parser = argparse.ArgumentParser(description=f"Runs {study_file} as a new study.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", type=Path)
    parser.add_argument("--trials", type=int)
    options = parser.parse_args()
    storage = storage_directory(options.storage)
    name = unused_name(storage, study_file.stem.replace("_", "-"))
    arguments = ["search", str(study_file), "--storage", str(storage), "--name", name]
    arguments += ["--seed", str(options.seed)]
    if options.trials is not None:
        arguments += ["--trials", str(options.trials)]
    return main(arguments)


def unused_name(storage: Path, stem: str) -> str:
    """`stem`-N with the first number from 1 that no study in `storage` has."""
    number = 1
    while (storage / "studies" / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


if __name__ == "__main__":
    sys.exit(run_as_new_study(STUDY_FILE))
