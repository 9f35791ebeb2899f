"""A recipe for every merge method, over a base and its tuned siblings, with numbers that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.merge_rules import METHODS
from evomerge.recipe import Recipe, recipe_from_mapping

# Not the defaults, so that every number has its part; gradients and filters, to tell tensors apart.
_NUMBERS: Mapping[str, object] = {
    "weight": [{"filter": "self_attn", "value": [0.7, 0.3]}, {"value": 0.6}],
    "density": [{"filter": "mlp", "value": 0.4}, {"value": [0.5, 0.8]}],
    "lambda": 0.9,
    "epsilon": 0.05,
    "gamma": 0.02,
    "t": [0.2, 0.7],
    "scale": [{"filter": "down_proj", "value": 0.9}, {"value": 1.0}],
    "select_topk": 0.5,
    "r": 0.3,
    "alpha": 0.4,
}
# Beyond one recipe per method: flags that lead into other arithmetic.
_FLAGS: Mapping[str, Mapping[str, object]] = {
    "nuslerp rows": {"merge_method": "nuslerp", "nuslerp_flatten": False},
    "nuslerp columns": {
        "merge_method": "nuslerp",
        "nuslerp_flatten": False,
        "nuslerp_row_wise": True,
    },
    "model_stock filters": {"merge_method": "model_stock", "filter_wise": True},
    "dare_linear plain": {"merge_method": "dare_linear", "rescale": False},
    "ties sums": {"merge_method": "ties", "normalize": False, "rescale": True},
}
NAMES = (*METHODS, *_FLAGS)


def recipe_for(name: str, base: str, tuned: Sequence[str], dtype: str = "bfloat16") -> Recipe:
    """The recipe of that name in NAMES; `tuned` are at least two models."""
    flags = dict(_FLAGS.get(name, {}))
    method = str(flags.pop("merge_method", name))
    rules = METHODS[method]
    most = rules.inputs[1] or len(tuned)
    models = [*tuned[:most]]
    mapping: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": model} for model in models],
        "parameters": {
            one.name: _NUMBERS[one.name] for one in rules.parameters if one.name in _NUMBERS
        }
        | flags,
        "dtype": dtype,
    }
    if method == "nearswap":
        mapping["parameters"] = {"t": 0.01}
    if method in ("ram", "ramplus_tl"):  # their epsilon is a threshold, not a share
        mapping["parameters"] = {**dict(mapping["parameters"]), "epsilon": 0.01}  # type: ignore[call-overload]
    if rules.base == "required" or method == "nuslerp":
        mapping["base_model"] = base
    return recipe_from_mapping(mapping, name)
