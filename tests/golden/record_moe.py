"""Records the mixtures that mergekit-moe 0.1.5 makes, where it is installed on its own.

    python -m tests.golden.record_moe PATH/TO/mergekit-moe

For each case of `moe_cases.py` it keeps the tensors and the config that the test compares.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent

from evomerge.moe_config import parse_moe_config
from tests.golden.moe_cases import CASES, write_moe_inputs

HERE = Path(__file__).parent
KEPT = (
    *("architectures", "model_type", "dtype", "num_experts_per_tok", "tie_word_embeddings"),
    *("num_local_experts", "num_experts", "norm_topk_prob", "intermediate_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
)


def main(mergekit_moe: str) -> None:
    """Replaces every recorded file of a mixture beside this script."""
    with tempfile.TemporaryDirectory() as work:
        folders = write_moe_inputs(Path(work) / "inputs")
        for name, text in CASES.items():
            config = parse_moe_config(dedent(text), name).with_models(folders)
            file = Path(work) / f"{name}.yaml"
            file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
            out = Path(work) / name
            subprocess.run(
                [
                    mergekit_moe,
                    str(file),
                    str(out),
                    "--device",
                    "cpu",
                    "--random-seed",
                    "0",
                    "--quiet",
                ],
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            shutil.copyfile(out / "model.safetensors", HERE / f"{name}.safetensors")
            found = json.loads((out / "config.json").read_text())
            kept = {key: found[key] for key in KEPT if key in found}
            (HERE / f"{name}.json").write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
