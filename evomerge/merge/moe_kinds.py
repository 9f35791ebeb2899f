"""Kinds of mixtures of experts: what each is made of, and how its class names and configures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ConfigError, nearest, shown
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.model_files import CONFIG_FILE
from evomerge.moe_config import MoEConfig

STACK = "model.layers"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MLP = {f"mlp.{projection}.weight" for projection in PROJECTIONS}
NORMS_AND_ATTENTION = frozenset(
    {
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
    }
)
BIASES = frozenset(f"self_attn.{letter}_proj.bias" for letter in "qkv")

# What transformers takes where an (old) config.json is silent; other classes have other defaults.
_COMMON_DEFAULTS: Mapping[str, object] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
# Keys of dense configs that mean nothing to a mixture, or something else.
DENSE_KEYS = (
    *("auto_map", "pretraining_tp", "mlp_bias", "attention_bias", "layer_types"),
    *("use_sliding_window", "max_window_layers", "sliding_window", "_name_or_path"),
)


@dataclass(frozen=True)
class Layout:
    """How one model class names and configures a mixture.

    `block` is what a layer calls it, `names` what the experts call the dense projections;
    `attention` are the other tensors of a layer that the class knows.
    """

    model_type: str
    model_class: str
    block: str
    names: Mapping[str, str]
    attention: frozenset[str]
    count_key: str


DENSE_NAMES = {projection: projection for projection in PROJECTIONS}
MIXTRAL = Layout(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    NORMS_AND_ATTENTION,
    "num_local_experts",
)
QWEN2_MOE = Layout(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "mlp",
    DENSE_NAMES,
    NORMS_AND_ATTENTION | BIASES,
    "num_experts",
)
QWEN3_MOE = Layout(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "mlp",
    DENSE_NAMES,
    NORMS_AND_ATTENTION
    | BIASES
    | {"self_attn.o_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    "num_experts",
)


@dataclass(frozen=True)
class Kind:
    """A kind of mixture as `architecture:` names it, and what it can be made of."""

    name: str
    inputs: tuple[str, ...]
    least_shared: int
    most_shared: int
    gates_shared: bool = False


# In the order in which they are tried. mergekit's names, of which any beginning will do.
KINDS = (
    Kind("mixtral", ("llama", "mistral"), 0, 0),
    Kind("deepseek moe", ("llama", "mistral"), 0, 1),
    Kind("qwen moe", ("llama", "mistral", "qwen2"), 1, 1, gates_shared=True),
    Kind("qwen3 moe", ("qwen3",), 0, 0),
)
_OTHER_NAMES = {"qwen2": "qwen", "qwen2 moe": "qwen moe", "qwen2moe": "qwen moe"}


def choose_kind(config: MoEConfig, checkpoints: Mapping[str, Checkpoint]) -> Kind:
    """The kind of mixture that `architecture` asks for, or else the first that fits.

    Raises ConfigError where none fits, with the reason of each that was tried.
    """
    wanted = _kinds_named(config.architecture)
    reasons = {kind.name: _obstacle(kind, config, checkpoints) for kind in wanted}
    for kind in wanted:
        if reasons[kind.name] is None:
            return kind
    described = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(f"no mixture of these models is possible: {described}")


def _kinds_named(architecture: str | None) -> tuple[Kind, ...]:
    if architecture is None:
        return KINDS
    plain = " ".join(architecture.lower().replace("_", " ").replace("-", " ").split())
    plain = _OTHER_NAMES.get(plain, plain)
    found = tuple(kind for kind in KINDS if plain and kind.name.startswith(plain))
    if not found:
        names = [kind.name for kind in KINDS]
        raise ConfigError(
            f"architecture: {shown(architecture)} is not known{nearest(plain, names)}"
        )
    return found


def _obstacle(kind: Kind, config: MoEConfig, checkpoints: Mapping[str, Checkpoint]) -> str | None:
    """Why `config` cannot become a mixture of this kind; None where it can."""
    base_type = model_type(checkpoints[config.base_model])
    if base_type not in kind.inputs:
        return f"is made of {' or '.join(kind.inputs)}, but {config.base_model} is {base_type}"
    for name in config.model_names():
        other = model_type(checkpoints[name])
        if other != base_type:
            return f"takes models of one type, but {name} is {other} and the base {base_type}"
    count = len(config.shared_experts)
    if not kind.least_shared <= count <= kind.most_shared:
        right = (
            f"exactly {kind.most_shared}" if kind.least_shared else f"at most {kind.most_shared}"
        )
        return f"has {right} shared expert{'s' * (kind.most_shared != 1)}, not {count}"
    for index, expert in enumerate(config.shared_experts):
        asks = bool(expert.positive_prompts or expert.negative_prompts)
        if kind.gates_shared and config.has_learned_gates and not expert.positive_prompts:
            return f"shared_experts.{index}: positive_prompts: at least one is needed for its gate"
        if not kind.gates_shared and asks:
            return f"shared_experts.{index}: has prompts, but this kind has no gate for it"
    return None


def model_type(checkpoint: Checkpoint) -> str:
    """What config.json calls the model's architecture."""
    return str(checkpoint.config.get("model_type"))


def layout_of(kind: Kind, config: MoEConfig) -> Layout:
    """The model class that a mixture of this kind is written as."""
    if kind.name == "deepseek moe":
        # Without a shared expert it is Mixtral's function. With one, no class of transformers has
        # Llama's attention, softmax gates and an ungated shared expert; Qwen2-MoE is exactly that
        # where the shared gate is 0 (sigmoid(0) = 1/2) and the shared down projection doubled.
        return QWEN2_MOE if config.shared_experts else MIXTRAL
    return {"mixtral": MIXTRAL, "qwen moe": QWEN2_MOE, "qwen3 moe": QWEN3_MOE}[kind.name]


def with_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a dense model with what its class takes where the file is silent.

    Raises ConfigError where it does not count the attention's heads.
    """
    config = dict(checkpoint.config)
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(
            f"{checkpoint.directory / CONFIG_FILE}: num_attention_heads: {shown(heads)} should be "
            "at least 1"
        )
    defaults = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type(checkpoint)]}
    if "rope_parameters" in config:
        defaults.pop("rope_theta")
    config |= {key: value for key, value in defaults.items() if key not in config}
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    return config
