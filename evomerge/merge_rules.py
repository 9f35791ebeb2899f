"""The table of merge methods: what each takes, with mergekit's names and defaults.

A new method is one row here and one function of the same name in `evomerge/merge/methods.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Parameter:
    """A number of a method: its default, and the closed range [low, high] that it must lie in.

    `own`: each input that is not the base has one of its own (weight, density …), else the tensor
    has one. `default` None: there is none, and the method leaves it out. `searched` are the bounds
    that a search takes where its file names none, on a logarithmic scale where `log`; None: not
    searched.
    """

    name: str
    kind: type[float] | type[int] | type[bool] = float
    default: float | bool | None = None
    required: bool = False
    own: bool = False
    low: float = -math.inf
    high: float = math.inf
    searched: tuple[float, float] | None = None
    log: bool = False


@dataclass(frozen=True)
class MethodRules:
    """What a merge method takes.

    `base` "required" or "optional": base_model is what the others are measured against; "none":
    it is an input as any other. `inputs` are the fewest and most inputs beside the base (None: any
    number). `random`: the method draws numbers, so the tensor's own seed is handed to it. `whole`:
    it needs whole tensors, not any part alone. `ignored` are parameters that mergekit declares
    for the method and that change no number of the result.
    """

    name: str
    title: str
    paper: str | None
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "none"] = "required"
    inputs: tuple[int, int | None] = (1, None)
    random: bool = False
    whole: bool = True
    ignored: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name; None if the method has none."""
        return next((one for one in self.parameters if one.name == name), None)


_WEIGHT = Parameter("weight", required=True, own=True, searched=(-0.5, 2.0))
_SHARE = Parameter("weight", required=True, own=True, searched=(0.0, 1.0))
_DENSITY = Parameter("density", default=1.0, own=True, low=0.0, high=1.0, searched=(0.1, 1.0))
# Searched where a file gives bounds only: the weights of a tensor can do the same themselves.
_LAMBDA = Parameter("lambda", default=1.0)
_EPSILON = Parameter(
    "epsilon", default=0.15, own=True, low=0.0, high=0.5, searched=(0.01, 0.3), log=True
)
_GAMMA = Parameter(
    "gamma", default=0.01, own=True, low=0.0, high=1.0, searched=(0.001, 0.2), log=True
)


def _flag(name: str, default: bool) -> Parameter:
    return Parameter(name, kind=bool, default=default)


def _task_vectors(
    name: str,
    title: str,
    paper: str,
    *more: Parameter,
    normalize: bool,
    rescale: bool,
    random: bool = False,
) -> MethodRules:
    """A method over sparsified differences to the base: they share these parameters."""
    shared = (_WEIGHT, _DENSITY, _LAMBDA, _flag("normalize", normalize), _flag("rescale", rescale))
    return MethodRules(name, title, paper, (*shared, *more), random=random, ignored=("int8_mask",))


_ROWS = (
    MethodRules(
        "linear",
        "Linear",
        "https://arxiv.org/abs/2203.05482",
        (_SHARE, _flag("normalize", True)),
        base="none",
        whole=False,
    ),
    MethodRules(
        "passthrough",
        "Passthrough",
        None,
        (Parameter("scale", own=True),),
        base="none",
        inputs=(1, 1),
        whole=False,
    ),
    MethodRules(
        "task_arithmetic",
        "Task Arithmetic",
        "https://arxiv.org/abs/2212.04089",
        (_WEIGHT, _LAMBDA, _flag("normalize", False)),
        whole=False,
        ignored=("int8_mask",),
    ),
    MethodRules(
        "slerp",
        "SLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        (Parameter("t", required=True, searched=(0.0, 1.0)),),
        inputs=(1, 1),
    ),
    MethodRules(
        "nuslerp",
        "NuSLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        (_SHARE, _flag("nuslerp_flatten", True), _flag("nuslerp_row_wise", False)),
        base="optional",
        inputs=(2, 2),
    ),
    MethodRules(
        "multislerp",
        "Multi-SLERP",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        (
            _SHARE,
            _flag("normalize_weights", True),
            Parameter("eps", default=1e-8, low=0.0),
        ),
        base="optional",
    ),
    MethodRules(
        "karcher",
        "Karcher Mean",
        "https://arxiv.org/abs/2603.04972",
        (
            Parameter("max_iter", kind=int, default=10, low=0),
            Parameter("tol", default=1e-5, low=0.0),
        ),
        base="none",
    ),
    _task_vectors(
        "ties", "TIES", "https://arxiv.org/abs/2306.01708", normalize=True, rescale=False
    ),
    _task_vectors(
        "dare_linear",
        "Linear DARE",
        "https://arxiv.org/abs/2311.03099",
        normalize=False,
        rescale=True,
        random=True,
    ),
    _task_vectors(
        "dare_ties",
        "DARE TIES",
        "https://arxiv.org/abs/2311.03099",
        normalize=False,
        rescale=True,
        random=True,
    ),
    _task_vectors(
        "della",
        "DELLA",
        "https://arxiv.org/abs/2406.11617",
        _EPSILON,
        normalize=True,
        rescale=True,
        random=True,
    ),
    _task_vectors(
        "della_linear",
        "Linear DELLA",
        "https://arxiv.org/abs/2406.11617",
        _EPSILON,
        normalize=False,
        rescale=True,
        random=True,
    ),
    _task_vectors(
        "breadcrumbs",
        "Model Breadcrumbs",
        "https://arxiv.org/abs/2312.06795",
        _GAMMA,
        normalize=False,
        rescale=False,
    ),
    _task_vectors(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        "https://arxiv.org/abs/2312.06795",
        _GAMMA,
        normalize=False,
        rescale=False,
    ),
    MethodRules(
        "model_stock",
        "Model Stock",
        "https://arxiv.org/abs/2403.19522",
        (_flag("filter_wise", False),),
        inputs=(2, None),
    ),
    MethodRules(
        "sce",
        "SCE",
        "https://arxiv.org/abs/2408.07990",
        (Parameter("select_topk", default=1.0, low=0.0, high=1.0, searched=(0.1, 1.0)),),
        ignored=("int8_mask",),
    ),
    MethodRules(
        "arcee_fusion",
        "Arcee Fusion",
        "https://arcee.ai",
        (),
        inputs=(1, 1),
    ),
    MethodRules(
        "nearswap",
        "NearSwap",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        (Parameter("t", required=True, low=0.0, searched=(1e-5, 1e-1), log=True),),
        inputs=(1, 1),
    ),
    MethodRules(
        "ram",
        "RAM",
        "https://arxiv.org/abs/2601.13572",
        (Parameter("epsilon", default=1e-5, low=0.0),),
    ),
    MethodRules(
        "ramplus_tl",
        "RAM+ (tensor-local)",
        "https://arxiv.org/abs/2601.13572",
        (
            Parameter("r", default=0.1, searched=(0.0, 1.0)),
            Parameter("alpha", default=0.2, searched=(0.0, 1.0)),
            Parameter("epsilon", default=1e-5, low=0.0),
        ),
    ),
)

METHODS: Mapping[str, MethodRules] = {rules.name: rules for rules in _ROWS}
# What mergekit reads for any of its methods: a name beyond these is a typing error.
PARAMETER_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(one.name for rules in _ROWS for one in rules.parameters),
            *(name for rules in _ROWS for name in rules.ignored),
        ]
    )
)
