"""The recipes whose merges mergekit 0.1.5 recorded, by name; models as in `inputs.py`."""

from __future__ import annotations

import numpy as np

from evomerge.recipe import Recipe, parse_recipe
from evomerge.space import SearchSpace, SpaceConfig

_WRITTEN = {
    "models_with_gradients": """
        merge_method: task_arithmetic
        base_model: base
        models:
        - model: first
          parameters: {weight: [0.1, 0.9, 0.3]}
        - model: second
          parameters:
            weight:
            - {filter: mlp, value: [0.2, 1.2]}
            - {filter: "layers.2.", value: -0.4}
        parameters: {weight: 0.35, lambda: 0.8, normalize: true}
        dtype: float32
        """,
    "slices_with_gaps_and_repeats": """
        merge_method: linear
        slices:
        - sources:
          - {model: first, layer_range: [0, 2], parameters: {weight: 0.25}}
          - {model: base, layer_range: [1, 3], parameters: {weight: 0.5}}
        - sources:
          - {model: second, layer_range: [1, 2]}
          - {model: base, layer_range: [3, 4], parameters: {weight: [0.9, 0.7]}}
          parameters: {weight: 0.4, normalize: false}
        - sources:
          - {model: first, layer_range: [0, 3], parameters: {weight: [1.0, 2.0]}}
          - {model: second, layer_range: [0, 3], parameters: {weight: 3}}
        dtype: float32
        """,
    "passthrough_with_scale": """
        merge_method: passthrough
        slices:
        - sources: [{model: base, layer_range: [0, 3]}]
        - sources:
          - model: first
            layer_range: [1, 4]
            parameters:
              scale:
              - {filter: o_proj, value: 0.5}
              - {filter: down_proj, value: 0.25}
              - {value: 1.0}
        dtype: float32
        """,
    "linear_models_tied": """
        merge_method: linear
        models:
        - {model: tied_base, parameters: {weight: 0.3}}
        - {model: tied_first, parameters: {weight: 0.9}}
        dtype: float32
        """,
    "tied_and_untied": """
        merge_method: linear
        models:
        - {model: base, parameters: {weight: 0.3}}
        - {model: tied_first, parameters: {weight: 0.9}}
        dtype: float32
        """,
    "qwen2_with_biases": """
        merge_method: task_arithmetic
        base_model: qwen_base
        models:
        - {model: qwen_first, parameters: {weight: 1.3}}
        dtype: float32
        out_dtype: bfloat16
        """,
}


def recipes() -> dict[str, Recipe]:
    """Every case by its name: recipes as people write them, and as our search spaces emit them."""
    written = {name: parse_recipe(text, name) for name, text in _WRITTEN.items()}
    return written | {
        "emitted_float32": _emitted("task_arithmetic", [], ["first", "second"], "float32"),
        "emitted_bfloat16": _emitted("task_arithmetic", [], ["first"], "bfloat16"),
        "emitted_filters": _emitted(
            "task_arithmetic", ["self_attn", "mlp"], ["first", "second"], "float32"
        ),
        "emitted_linear": _emitted("linear", [], ["first", "second"], "float32"),
    }


def _emitted(method: str, filters: list[str], models: list[str], dtype: str) -> Recipe:
    config = SpaceConfig.model_validate(
        {"merge_method": method, "layer_granularity": 2, "filters": filters}
    )
    space = SearchSpace.build(config, base_model="base", models=models, num_layers=4, dtype=dtype)
    return space.decode(np.linspace(0.1, 0.9, space.dimension) ** 2)
