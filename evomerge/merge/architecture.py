"""Which tensor of a checkpoint belongs to which layer, and whether its embeddings are tied."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint, TensorHeader

HEAD = "lm_head.weight"
_OTHER_HEADS = ("embed_out.weight", "output.weight")
_LAYER_NAME = re.compile(r"(?P<stack>(?:.*?\.)??(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)")
_INPUT_NAME = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings)\.")
_EMBEDDING_NAME = re.compile(
    r"(^|.*\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight"
)
# Not parameters: old Llama checkpoints carry these tables, which every engine computes itself.
_COMPUTED_NAME = re.compile(r".*\.rotary_emb\.inv_freq")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Architecture:
    """The tensors of one checkpoint by place; all names are as in the checkpoint.

    `stack` is what comes before a layer's number ("model.layers"); `layers[i]` maps the rest of a
    name ("self_attn.q_proj.weight") to its header; `before` and `after` are the tensors on the
    input's and on the output's side of the layers. A tied model has no `lm_head.weight`.
    """

    stack: str
    layers: tuple[Mapping[str, TensorHeader], ...]
    before: Mapping[str, TensorHeader]
    after: Mapping[str, TensorHeader]
    embedding: str
    tied: bool
    layer_count_key: str

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint, from its config and headers.

    Raises ConfigError where its names are not those of one regular stack of layers, where layers
    that the config counts are missing, or where the weights are quantised.
    """
    parameters = {
        name: header
        for name, header in checkpoint.tensors.items()
        if not _COMPUTED_NAME.fullmatch(name)
    }
    _refuse_quantised(checkpoint, parameters)
    stack, layers = _layers(checkpoint, parameters)
    outside = {name: header for name, header in parameters.items() if not _in(stack, name)}
    tied = _is_tied(checkpoint)
    if tied:
        outside.pop(HEAD, None)  # where the config ties them, no engine reads a stored head
    before = {name: header for name, header in outside.items() if _INPUT_NAME.search(name)}
    return Architecture(
        stack=stack,
        layers=layers,
        before=before,
        after={name: header for name, header in outside.items() if name not in before},
        embedding=_embedding(checkpoint, before),
        tied=tied,
        layer_count_key=_layer_count_key(checkpoint),
    )


def layer_count(checkpoint: Checkpoint) -> int:
    """The number of layers that the config says; ConfigError where it does not."""
    key = _layer_count_key(checkpoint)
    count = checkpoint.config[key]
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{_config_file(checkpoint)}: {key}: {count!r} should be at least 1")
    return count


def _layer_count_key(checkpoint: Checkpoint) -> str:
    for key in _LAYER_COUNT_KEYS:
        if key in checkpoint.config:
            return key
    raise ConfigError(f"{_config_file(checkpoint)}: num_hidden_layers is missing")


def _config_file(checkpoint: Checkpoint) -> str:
    return str(checkpoint.directory / "config.json")


def _refuse_quantised(checkpoint: Checkpoint, tensors: Mapping[str, TensorHeader]) -> None:
    for header in tensors.values():
        if not header.dtype.is_floating_point or header.dtype.itemsize == 1:
            raise ConfigError(
                f"{header.file}: {header.name} is {header.dtype}: quantised weights cannot be "
                "merged; use the model in bfloat16, float16 or float32"
            )
    if "quantization_config" in checkpoint.config:
        raise ConfigError(
            f"{_config_file(checkpoint)}: quantization_config: quantised weights cannot be merged"
        )


def _layers(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorHeader]
) -> tuple[str, tuple[Mapping[str, TensorHeader], ...]]:
    matches = [match for name in tensors if (match := _LAYER_NAME.fullmatch(name))]
    stacks = Counter(match["stack"] for match in matches)
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise ConfigError(
            f"{checkpoint.directory}: a model with one stack of layers can be merged (such as "
            f"model.layers.0 …); here there are: {found}"
        )
    layers: list[dict[str, TensorHeader]] = [{} for _ in range(layer_count(checkpoint))]
    for match in matches:
        index = int(match["index"])
        if index >= len(layers):
            raise ConfigError(
                f"{checkpoint.directory}: has a tensor {match.string}, but config.json counts "
                f"{len(layers)} layers"
            )
        layers[index][match["rest"]] = tensors[match.string]
    for index, layer in enumerate(layers):
        if not layer:
            raise ConfigError(
                f"{checkpoint.directory}: config.json counts {len(layers)} layers, but the "
                f"tensors of layer {index} are missing"
            )
    return next(iter(stacks)), tuple(layers)


def _in(stack: str, name: str) -> bool:
    match = _LAYER_NAME.fullmatch(name)
    return match is not None and match["stack"] == stack


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether input embeddings serve as the output's; where the config is silent, by the files.

    The silent default is true for some architectures and false for others; a checkpoint without a
    head can only be tied.
    """
    tied = checkpoint.config.get("tie_word_embeddings")
    if tied is None:
        return HEAD not in checkpoint.tensors
    if not tied and not any(name in checkpoint.tensors for name in (HEAD, *_OTHER_HEADS)):
        raise ConfigError(
            f"{checkpoint.directory}: {HEAD} is missing, and config.json says that the embeddings "
            "are not tied (tie_word_embeddings: false)"
        )
    return bool(tied)


def _embedding(checkpoint: Checkpoint, before: Mapping[str, TensorHeader]) -> str:
    names = [name for name in before if _EMBEDDING_NAME.fullmatch(name)]
    if len(names) != 1:
        raise ConfigError(
            f"{checkpoint.directory}: one tensor of token embeddings is expected (such as "
            f"model.embed_tokens.weight); found {names or 'none'}"
        )
    return names[0]
