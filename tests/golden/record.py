"""Records what mergekit makes of our recipes: run it where mergekit 0.1.5 is installed on its own.

    python -m tests.golden.record PATH/TO/mergekit-yaml [CASE ...]

For each case of `cases.py`, or each one named, it writes the recipe (bare model names), mergekit's
tensors and config.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import recipes
from tests.golden.inputs import write_inputs

HERE = Path(__file__).parent


def main(mergekit_yaml: str, *names: str) -> None:
    """Replaces the recorded files of these cases, without names of all, beside this script."""
    with tempfile.TemporaryDirectory() as work:
        folders = write_inputs(Path(work) / "inputs")
        for name, recipe in recipes().items():
            if names and name not in names:
                continue
            config = Path(work) / f"{name}.yaml"
            config.write_text(recipe.with_models(folders).to_yaml())
            merged = Path(work) / name
            options = ["--no-write-model-card", "--quiet", "--random-seed", "0"]
            subprocess.run(
                [mergekit_yaml, str(config), str(merged), *options],
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            _keep(name, recipe.to_yaml(), merged)


def _keep(name: str, recipe: str, merged: Path) -> None:
    (HERE / f"{name}.yaml").write_text(recipe)
    shutil.copyfile(merged / "model.safetensors", HERE / f"{name}.safetensors")
    config = json.loads((merged / "config.json").read_text())
    kept = {key: config.get(key) for key in ("dtype", "num_hidden_layers", "tie_word_embeddings")}
    (HERE / f"{name}.json").write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
