"""Which tensor of a checkpoint belongs to which layer, and whether its embeddings are tied.

All of it is read from config.json and the tensors' names and shapes: no list of architectures.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.errors import ConfigError
from evomerge.merge.headers import Described, TensorHeader
from evomerge.merge.model_config import (
    is_encoder_decoder,
    layer_count_path,
    layer_traits,
    text_section,
    value_at,
    with_layers,
)

# The usual name of the output embeddings, also for the head that a tied model gets.
HEAD = "lm_head.weight"
DEFAULT_MODULE = "default"

_NUMBERED_NAME = re.compile(r"(?P<stack>(?:.*?\.)??[^.\d][^.]*)\.(?P<index>\d+)\.(?P<rest>.+)")
_HEAD_NAME = re.compile(r"(.*\.)?(lm_head|embed_out|output|output_layer|head|proj_out)\.weight")
_EMBEDDING_NAME = re.compile(
    r"(.*\.)?(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|shared|embeddings)\.weight"
)
_INPUT_NAME = re.compile(
    r"(^|\.)(embed\w*(?<!_out)(?<!_norm)|wte|wpe|word_embeddings\w*|tok_embeddings|embeddings"
    r"|layernorm_embedding|project_in|shared|altup_projections|per_layer_\w+)\."
)
# Not parameters: tables and masks that old checkpoints carry and every engine computes itself.
_COMPUTED_NAME = re.compile(
    r"(.*\.)?(inv_freq|rope\.freqs|masked_bias|position_ids|num_batches_tracked)"
)
_MASK_NAME = re.compile(r"(.*\.)?(attn|attention|self_attn|self_attention)\.(bias|mask)")

# What part of a multi-modal model a tensor belongs to, by a word of its name, as mergekit has it;
# the first one counts (visual.merger is the projector, not the tower).
_MODULES = {
    "multi_modal_projector": "multi_modal_projector",
    "mm_projector": "multi_modal_projector",
    "merger": "multi_modal_projector",
    "deepstack_merger_list": "multi_modal_projector",
    "connector": "multi_modal_projector",
    "embed_vision": "multi_modal_projector",
    "embed_audio": "multi_modal_projector",
    "vision_tower": "vision_tower",
    "visual": "vision_tower",
    "vision_encoder": "vision_tower",
    "vision_model": "vision_model",
    "audio_tower": "audio_tower",
    "audio_encoder": "audio_tower",
}
_ENCODER_DECODER_MODULES = {"encoder": "encoder", "decoder": "decoder", "shared": "shared"}


@dataclass(frozen=True)
class Module:
    """A part of a model beside its language model's layers, which is merged whole.

    `depths[name]` in [0, 1] is a tensor's place in the module's own stack of layers, where
    gradients are read: 0 outside of it, 1 in the last layer.
    """

    tensors: Mapping[str, TensorHeader]
    depths: Mapping[str, float]


@dataclass(frozen=True)
class Architecture:
    """The tensors of one checkpoint by place; all names are as in the checkpoint.

    `stack` is what comes before a layer's number ("model.layers"); `layers[i]` maps the rest of a
    name ("self_attn.q_proj.weight") to its header; `before` and `after` are the tensors on the
    input's and on the output's side of the layers. `head` is the name of the output embeddings,
    which a tied model does not have. `main` is the name of the module that these belong to
    (`default` where it is the only one), `others` are the rest of a model of several modules: a
    vision tower, an encoder.
    """

    config: Mapping[str, Any]
    stack: str
    layers: tuple[Mapping[str, TensorHeader], ...]
    before: Mapping[str, TensorHeader]
    after: Mapping[str, TensorHeader]
    embedding: str
    head: str
    tied: bool
    main: str
    others: Mapping[str, Module]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def module_names(self) -> tuple[str, ...]:
        """All modules, the one with the language model's layers first."""
        return (self.main, *self.others)

    def said(self, key: str) -> object:
        """What the config says of the language model under `key`; None where nothing."""
        section = value_at(self.config, text_section(self.config))
        return _first_said(key, (self.config, section))

    def is_by_token(self, name: str) -> bool:
        """Whether its tensor of that name has one row per token."""
        bias = self.head.removesuffix("weight") + "bias"
        return name in (self.embedding, self.head, bias)

    @cached_property
    def embedding_header(self) -> TensorHeader:
        """The token embeddings, in whichever module they lie."""
        places = [self.before, *(module.tensors for module in self.others.values())]
        return next(place[self.embedding] for place in places if self.embedding in place)

    @cached_property
    def kinds(self) -> tuple[frozenset[tuple[str, tuple[int, ...]]], ...]:
        """What each layer is made of: the names and shapes of its tensors."""
        return tuple(
            frozenset((rest, header.shape) for rest, header in layer.items())
            for layer in self.layers
        )


def read_architecture(checkpoint: Described) -> Architecture:
    """The architecture of a checkpoint, from its config and headers.

    Raises ConfigError where no layers can be found by their names, where layers that the config
    counts are missing, or where the weights are quantised.
    """
    parameters = {
        name: header for name, header in checkpoint.tensors.items() if not _is_computed(header)
    }
    _refuse_quantised(checkpoint, parameters)
    modules = _modules(checkpoint, parameters)
    embedding = _embedding(checkpoint, modules)
    main = _main_module(checkpoint, modules, embedding)
    stack, layers = _layers(checkpoint, modules[main], embedding)
    inside = {header.name for layer in layers for header in layer.values()}
    outside = {name: header for name, header in modules[main].items() if name not in inside}
    head = next((name for name in outside if _HEAD_NAME.fullmatch(name)), None)
    tied = _is_tied(checkpoint, head)
    if tied and head:
        outside.pop(head)  # where the config ties them, no engine reads a stored head
    before = {name: header for name, header in outside.items() if _INPUT_NAME.search(name)}
    return Architecture(
        config=checkpoint.config,
        stack=stack,
        layers=layers,
        before=before,
        after={name: header for name, header in outside.items() if name not in before},
        embedding=embedding,
        head=head or HEAD,
        tied=tied,
        main=main,
        others={name: _module(tensors) for name, tensors in modules.items() if name != main},
    )


def layer_count(checkpoint: Described) -> int:
    """The number of layers that the config says; ConfigError where it does not."""
    path = layer_count_path(checkpoint.config)
    if path is None:
        section = (*text_section(checkpoint.config), "num_hidden_layers")
        raise ConfigError(f"{_config_file(checkpoint)}: {'.'.join(section)} is missing")
    count = value_at(checkpoint.config, path)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"{_config_file(checkpoint)}: {'.'.join(path)}: {count!r} should be at least 1"
        )
    return count


def stacked_config(
    first: Architecture, origins: Sequence[tuple[Architecture, int]], *, tied: bool
) -> dict[str, Any]:
    """The config of `first`, as that of a model whose layers are `origins`.

    An origin is the architecture that a layer comes from, and the layer's number there. Raises
    ConfigError where layers are of different kinds and the config tells them by their place, so
    that none could be written for this order.
    """
    _refuse_bound_layers(first, origins)
    config = with_layers(
        first.config, [(origin.config, index) for origin, index in origins], first.num_layers
    )
    if len(set(first.kinds)) > 1:
        _refuse_displaced(first, origins)
    config["tie_word_embeddings"] = tied
    section = text_section(config)
    if section and "tie_word_embeddings" in value_at(config, section):
        config = _with_section(config, section, tie_word_embeddings=tied)
    return config


def _refuse_displaced(first: Architecture, origins: Sequence[tuple[Architecture, int]]) -> None:
    """Raises ConfigError where a layer stands where the config describes one of another kind."""
    traits = [
        layer_traits(first.config, index, first.num_layers) for index in range(first.num_layers)
    ]
    if len(set(zip(traits, first.kinds, strict=True))) == len(set(traits)):
        return  # what the config says of a layer decides its kind, and was stacked with it
    period = _period(first.kinds)
    for place, (origin, index) in enumerate(origins):
        if origin.kinds[index] != first.kinds[place % period]:
            raise ConfigError(
                f"slices: layer {index} cannot become layer {place}: the layers of this model are "
                f"of {len(set(first.kinds))} kinds, and its config.json tells them by their place"
            )


def _refuse_bound_layers(first: Architecture, origins: Sequence[tuple[Architecture, int]]) -> None:
    """Raises ConfigError where tensors outside of the layers depend on which layers there are."""
    if [index for _, index in origins] == list(range(first.num_layers)):
        return
    if value_at(first.config, text_section(first.config)).get("hidden_size_per_layer_input"):
        raise ConfigError(
            "slices: the embeddings of this model have columns for each layer "
            "(hidden_size_per_layer_input in config.json); its layers have to stay as they are"
        )
    predictors = [name for name in first.after if name.startswith(f"{first.stack}.")]
    if predictors and len(origins) != first.num_layers:
        raise ConfigError(
            f"slices: make {len(origins)} layers of {first.num_layers}, but {predictors[0]} and "
            "others, which predict further tokens, are numbered behind these; the number of "
            "layers has to stay"
        )


def _num_predictors(config: Mapping[str, Any]) -> int:
    """How many layers that predict further tokens (DeepSeek's, GLM's) follow the counted ones."""
    number = value_at(config, text_section(config)).get("num_nextn_predict_layers")
    return number if isinstance(number, int) else 0


def _period(kinds: Sequence[object]) -> int:
    """The smallest number of layers after which the kinds repeat; all of them where none does."""
    return next(
        period
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[place % period] for place, kind in enumerate(kinds))
    )


def _with_section(config: dict[str, Any], path: Sequence[str], **changes: object) -> dict[str, Any]:
    if not path:
        return config | changes
    return config | {path[0]: _with_section(config[path[0]], path[1:], **changes)}


def _config_file(checkpoint: Described) -> str:
    return str(checkpoint.directory / "config.json")


def _is_computed(header: TensorHeader) -> bool:
    if _MASK_NAME.fullmatch(header.name):
        return len(header.shape) == 4  # 1 · 1 · positions · positions
    return _COMPUTED_NAME.fullmatch(header.name) is not None


def _refuse_quantised(checkpoint: Described, tensors: Mapping[str, TensorHeader]) -> None:
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


def _modules(
    checkpoint: Described, tensors: Mapping[str, TensorHeader]
) -> dict[str, dict[str, TensorHeader]]:
    """The tensors by module; what belongs to no other one is the language model's."""
    words = _ENCODER_DECODER_MODULES if is_encoder_decoder(checkpoint.config) else _MODULES
    rest = "decoder" if words is _ENCODER_DECODER_MODULES else "text_decoder"
    modules: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in tensors.items():
        parts = name.split(".")
        module = next((module for word, module in words.items() if word in parts), rest)
        modules[module][name] = header
    if len(modules) == 1:
        return {DEFAULT_MODULE: next(iter(modules.values()))}
    return dict(modules)


def _embedding(checkpoint: Described, modules: Mapping[str, Mapping[str, TensorHeader]]) -> str:
    """The token embeddings: by name, or the one matrix with a row for each word."""
    candidates = {
        name: header
        for module in (DEFAULT_MODULE, "text_decoder", "shared", "decoder")
        for name, header in modules.get(module, {}).items()
        if len(header.shape) == 2 and not _NUMBERED_NAME.fullmatch(name)
    }
    names = [name for name in candidates if _EMBEDDING_NAME.fullmatch(name)]
    if not names:
        rows = value_at(checkpoint.config, text_section(checkpoint.config)).get("vocab_size")
        names = [
            name
            for name, header in candidates.items()
            if header.shape[0] == rows and not _HEAD_NAME.fullmatch(name)
        ]
    if len(names) > 1 and "shared" in modules:  # of T5 and BART, which some files repeat
        names = [name for name in names if name in modules["shared"]]
    if len(names) != 1:
        raise ConfigError(
            f"{checkpoint.directory}: one tensor of token embeddings is expected (such as "
            f"model.embed_tokens.weight); found {names or 'none'}"
        )
    return names[0]


def _main_module(
    checkpoint: Described, modules: Mapping[str, Mapping[str, TensorHeader]], embedding: str
) -> str:
    if is_encoder_decoder(checkpoint.config) and "decoder" in modules:
        return "decoder"
    return next(name for name, tensors in modules.items() if embedding in tensors)


def _layers(
    checkpoint: Described, tensors: Mapping[str, TensorHeader], embedding: str
) -> tuple[str, tuple[Mapping[str, TensorHeader], ...]]:
    """The name and the layers of the stack that the config counts."""
    stacks = _stacks(tensors)
    if not stacks:
        raise ConfigError(
            f"{checkpoint.directory}: a model with a stack of layers can be merged (such as "
            f"model.layers.0 …); here there is none"
        )
    section = text_section(checkpoint.config)
    if section and layer_count_path(checkpoint.config) is None:
        count = 0  # some nested configs leave it to the default: the files know
    else:
        count = layer_count(checkpoint)
    stack = max(stacks, key=lambda name: _likeness(name, stacks[name], embedding, count))
    by_index = stacks[stack]
    count = count or max(by_index) + 1
    for index in sorted(by_index):
        if index >= count + _num_predictors(checkpoint.config):
            raise ConfigError(
                f"{checkpoint.directory}: has a tensor "
                f"{next(iter(by_index[index].values())).name}, but config.json counts {count} "
                "layers"
            )
    for index in range(count):
        if index not in by_index:
            raise ConfigError(
                f"{checkpoint.directory}: config.json counts {count} layers, but the "
                f"tensors of layer {index} are missing"
            )
    return stack, tuple(by_index[index] for index in range(count))


def _likeness(
    stack: str, layers: Mapping[int, object], embedding: str, count: int
) -> tuple[bool, int, int]:
    """How much `stack` looks like the layers behind `embedding`: more is better.

    Layers come as many as the config counts, beside the embeddings, and with the most tensors.
    """
    words, other = stack.split("."), embedding.split(".")
    shared = next(
        (i for i, (a, b) in enumerate(zip(words, other, strict=False)) if a != b),
        min(len(words), len(other)),
    )
    return (max(layers) + 1 == count, shared, len(layers))


def _stacks(tensors: Mapping[str, TensorHeader]) -> dict[str, dict[int, dict[str, TensorHeader]]]:
    """Numbered tensors by what comes before their first number, by it, and by what follows."""
    stacks: dict[str, dict[int, dict[str, TensorHeader]]] = {}
    for name, header in tensors.items():
        if match := _NUMBERED_NAME.fullmatch(name):
            layers = stacks.setdefault(match["stack"], {})
            layers.setdefault(int(match["index"]), {})[match["rest"]] = header
    return stacks


def _module(tensors: Mapping[str, TensorHeader]) -> Module:
    """A module with its own stack: the numbered tensors of which there are most."""
    stacks = _stacks(tensors)
    depths = dict.fromkeys(tensors, 0.0)
    if stacks:
        layers = max(stacks.values(), key=lambda layers: sum(map(len, layers.values())))
        last = max(layers)
        for index, layer in layers.items():
            for header in layer.values():
                depths[header.name] = index / last if last else 1.0
    return Module(tensors, depths)


def _is_tied(checkpoint: Described, head: str | None) -> bool:
    """Whether input embeddings serve as the output's; where the config is silent, by the files.

    The silent default is true for some architectures and false for others; a checkpoint without a
    head can only be tied.
    """
    section = value_at(checkpoint.config, text_section(checkpoint.config))
    tied = _first_said("tie_word_embeddings", (checkpoint.config, section))
    if tied is None:
        return head is None
    if not tied and head is None:
        raise ConfigError(
            f"{checkpoint.directory}: {HEAD} is missing, and config.json says that the embeddings "
            "are not tied (tie_word_embeddings: false)"
        )
    return bool(tied)


def _first_said(key: str, sections: Iterable[Mapping[str, Any]]) -> Any:
    return next((section[key] for section in sections if section.get(key) is not None), None)
