"""Records the merge configurations that mergekit-evolve makes of genomes: run it where mergekit is.

    PATH/TO/MERGEKIT/bin/python tests/golden/record_evolve.py

It writes `evolve.json` beside itself: for each case the `genome:` part of a file, some genomes, and
the configuration that mergekit 0.1.5 emits for each of them, models by their bare names.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAYERS = 4
MODELS = ("first", "second", "third")
# Each case: the genome part, and the number of genes of its genomes.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "ties": (
        {"merge_method": "ties", "models": [*MODELS], "base_model": "base", "layer_granularity": 2},
        12,
    ),
    "dare_ties_filters": (
        {
            "merge_method": "dare_ties",
            "models": ["first", "second"],
            "base_model": "base",
            "layer_granularity": 2,
            "filters": ["self_attn", "mlp"],
            "normalize": False,
            "tokenizer_source": "base",
        },
        24,
    ),
    "task_arithmetic_base_among_models": (
        {
            "merge_method": "task_arithmetic",
            "models": ["first", "base"],
            "base_model": "base",
            "allow_negative_weights": True,
        },
        2,
    ),
    "ties_smooth_filters": (
        {
            "merge_method": "ties",
            "models": ["first", "second"],
            "base_model": "base",
            "layer_granularity": 1,
            "filters": ["mlp"],
            "smooth": True,
        },
        32,
    ),
    "task_arithmetic_smooth_one_group": (
        {
            "merge_method": "task_arithmetic",
            "models": ["first", "second"],
            "base_model": "base",
            "smooth": True,
        },
        2,
    ),
    "linear": ({"merge_method": "linear", "models": [*MODELS], "layer_granularity": 4}, 3),
    "linear_smooth": (
        {
            "merge_method": "linear",
            "models": ["first", "second"],
            "base_model": "first",
            "layer_granularity": 2,
            "smooth": True,
        },
        4,
    ),
    "slerp": (
        {"merge_method": "slerp", "models": [*MODELS], "layer_granularity": 1},
        12,
    ),
    "slerp_tokenizer": (
        {
            "merge_method": "slerp",
            "models": [*MODELS],
            "base_model": "third",
            "tokenizer_source": "union",
        },
        3,
    ),
}


def main() -> None:
    """Replaces the recorded file."""
    drawn = random.Random(0)
    recorded = {
        name: {
            "genome": definition,
            "layers": LAYERS,
            "emitted": [
                {"genes": genes, "config": _emitted(definition, genes)}
                for genes in ([drawn.gauss(0.3, 0.6) for _ in range(count)] for _ in range(3))
            ],
        }
        for name, (definition, count) in CASES.items()
    }
    (HERE / "evolve.json").write_text(json.dumps(recorded, indent=1) + "\n")


def _emitted(definition: dict[str, Any], genes: list[float]) -> Any:
    import numpy as np
    import yaml
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    with tempfile.TemporaryDirectory() as work:
        folders = {name: f"{work}/{name}" for name in (*MODELS, "base")}
        for folder in folders.values():
            Path(folder).mkdir()
            config = {"model_type": "llama", "num_hidden_layers": LAYERS}
            (Path(folder) / "config.json").write_text(json.dumps(config))
        placed = json.loads(json.dumps(definition))
        placed["models"] = [folders[name] for name in placed["models"]]
        if "base_model" in placed:
            placed["base_model"] = folders[placed["base_model"]]
        genome = ModelGenome(ModelGenomeDefinition.model_validate(placed))
        text = genome.genotype_merge_config(np.array(genes)).to_yaml()
    return yaml.safe_load(text.replace(f"{work}/", ""))


if __name__ == "__main__":
    main()
