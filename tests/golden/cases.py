"""The recipes whose merges mergekit 0.1.5 recorded, by name; models as in `inputs.py`."""

from __future__ import annotations

import json
from typing import Any

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


_FINE = ["fine_first", "fine_second", "fine_third"]
_WEIGHTS = [0.613, 0.487, 0.391]

# Every further method, over one layer: number of models, base?, own numbers per model, shared ones.
# Where mergekit leaves out elements at random its numbers are its own: these have density 1, and
# two more (`RANDOM`) show how many elements it keeps, and how it stretches them.
_METHODS: dict[str, tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = {
    "slerp": ("slerp", 1, True, {}, {"t": [{"filter": "mlp", "value": 0.7}, {"value": 0.35}]}),
    "nuslerp": ("nuslerp", 2, False, {"weight": _WEIGHTS}, {}),
    "nuslerp_of_rows": (
        *("nuslerp", 2, True, {"weight": _WEIGHTS}),
        {"nuslerp_flatten": False},
    ),
    "nuslerp_of_columns": (
        *("nuslerp", 2, False, {"weight": _WEIGHTS}),
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ("multislerp", 3, False, {"weight": _WEIGHTS}, {}),
    "multislerp_of_differences": ("multislerp", 3, True, {"weight": _WEIGHTS}, {}),
    "karcher": ("karcher", 3, False, {}, {}),
    "karcher_two_steps": ("karcher", 3, False, {}, {"max_iter": 2, "tol": 1e-4}),
    "model_stock": ("model_stock", 3, True, {}, {}),
    "model_stock_of_rows": ("model_stock", 2, True, {}, {"filter_wise": True}),
    "ties": ("ties", 3, True, {"weight": _WEIGHTS}, {"density": 0.4}),
    "ties_rescaled": (
        *("ties", 3, True, {"weight": _WEIGHTS, "density": [0.2, 0.5, 1.0]}),
        {"rescale": True, "normalize": False, "lambda": 0.8},
    ),
    "dare_linear": ("dare_linear", 3, True, {"weight": _WEIGHTS}, {"lambda": 1.2}),
    "dare_ties": ("dare_ties", 3, True, {"weight": _WEIGHTS}, {"normalize": True}),
    "della": ("della", 3, True, {"weight": _WEIGHTS}, {}),
    "della_linear": ("della_linear", 2, True, {"weight": _WEIGHTS}, {"normalize": True}),
    "breadcrumbs": (
        *("breadcrumbs", 3, True, {"weight": _WEIGHTS, "gamma": [0.01, 0.1, 0.05]}),
        {"density": 0.6},
    ),
    "breadcrumbs_ties": (
        *("breadcrumbs_ties", 3, True, {"weight": _WEIGHTS, "density": [0.95, 0.4, 0.3]}),
        {"gamma": 0.1, "rescale": True, "normalize": True},
    ),
    "sce": ("sce", 3, True, {}, {}),
    "sce_of_a_part": ("sce", 3, True, {}, {"select_topk": 0.35}),
    "arcee_fusion": ("arcee_fusion", 1, True, {}, {}),
    "nearswap": ("nearswap", 1, True, {}, {"t": 0.02}),
    "ram": ("ram", 3, True, {}, {"epsilon": 0.02}),
    "ramplus_tl": ("ramplus_tl", 3, True, {}, {"r": 0.4, "alpha": 0.9, "epsilon": 0.02}),
    "dare_linear_dropped": ("dare_linear", 1, True, {"weight": [1.0]}, {"density": 0.4}),
    "della_linear_dropped": (
        *("della_linear", 1, True, {"weight": [1.0]}),
        {"density": 0.6, "epsilon": 0.3},
    ),
}
RANDOM = ("dare_linear_dropped", "della_linear_dropped")


def recipes() -> dict[str, Recipe]:
    """Every case by its name: recipes as people write them, and as our search spaces emit them."""
    written = {name: parse_recipe(text, name) for name, text in _WRITTEN.items()}
    of_methods = {name: _of_method(name) for name in _METHODS}
    return (
        written
        | of_methods
        | {
            "emitted_float32": _emitted("task_arithmetic", [], ["first", "second"], "float32"),
            "emitted_bfloat16": _emitted("task_arithmetic", [], ["first"], "bfloat16"),
            "emitted_filters": _emitted(
                "task_arithmetic", ["self_attn", "mlp"], ["first", "second"], "float32"
            ),
            "emitted_linear": _emitted("linear", [], ["first", "second"], "float32"),
        }
    )


def _of_method(name: str) -> Recipe:
    method, count, has_base, own, shared = _METHODS[name]
    tuned = [
        {"model": model, "parameters": {key: values[index] for key, values in own.items()}}
        for index, model in enumerate(_FINE[:count])
    ]
    sources = [*([{"model": "fine_base"}] if has_base else []), *tuned]
    mapping = {
        "merge_method": method,
        **({"base_model": "fine_base"} if has_base else {}),
        "slices": [{"sources": [source | {"layer_range": [2, 3]} for source in sources]}],
        **({"parameters": shared} if shared else {}),
        "dtype": "float32",
    }
    return parse_recipe(json.dumps(mapping), name)


def _emitted(method: str, filters: list[str], models: list[str], dtype: str) -> Recipe:
    config = SpaceConfig.model_validate(
        {"merge_method": method, "layer_granularity": 2, "filters": filters}
    )
    space = SearchSpace.build(config, base_model="base", models=models, num_layers=4, dtype=dtype)
    return space.decode(np.linspace(0.1, 0.9, space.dimension) ** 2)
