"""What a config.json says of the layers, and what it must say once they were stacked anew."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError

Config = Mapping[str, Any]
LayerOrigin = tuple[Config, int]

# Where models of several parts keep what is said of their language model.
_TEXT_SECTIONS = ("thinker_config", "text_config", "language_config", "llm_config")
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
# Of an encoder-decoder the decoder is what writes; there num_layers counts the encoder's.
_DECODER_COUNT_KEYS = ("num_decoder_layers", "decoder_layers")
# Numbers of layers: every other list of integers with as many items as layers is one per layer.
_INDEX_LISTS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "ple_layer_ids",
)
# The first so many layers are of another kind.
_PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_NOT_PER_LAYER = ("architectures", "attention_types")
_NOT_PER_LAYER_ENDINGS = ("_token_id", "_token_ids", "_tokens", "_token_index", "_token_indices")


def layer_count_path(config: Config) -> tuple[str, ...] | None:
    """Where a config counts its layers, ("text_config", "num_hidden_layers"); None: nowhere."""
    for place in dict.fromkeys((text_section(config), ())):
        for key in _count_keys(config):
            if value_at(config, place).get(key) is not None:
                return (*place, key)
    return None


def text_section(config: Config) -> tuple[str, ...]:
    """The path to the part of a config that describes the language model; () where all does."""
    for key in _TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping):
            return (key, *text_section(config[key]))
    return ()


def value_at(config: Config, path: Sequence[str]) -> Any:
    """What stands at a path of keys."""
    value: Any = config
    for key in path:
        value = value[key]
    return value


def is_encoder_decoder(config: Config) -> bool:
    return config.get("is_encoder_decoder") is True


def with_layers(config: Config, origins: Sequence[LayerOrigin], num_layers: int) -> dict[str, Any]:
    """`config`, which has `num_layers` layers, as that of a model whose layers are `origins`.

    An origin is the config of the model that a layer comes from and its number there. The layer
    count is set, lists with one item per layer (layer_types …) are stacked as the layers are, and
    lists of layer numbers and counts of leading layers follow. Raises ConfigError where a count of
    leading layers cannot: a layer of that kind would stand behind another.
    """
    plan = list(origins)
    if len(plan) == num_layers and all(
        index == place and source is config for place, (source, index) in enumerate(plan)
    ):
        return dict(config)
    changed = dict(config)
    for place in _layer_places(config):
        section = value_at(config, place)
        sources = [(_part(source, place), index) for source, index in plan]
        _set(changed, place, _restacked(section, sources, num_layers))
    path = layer_count_path(config) or (*text_section(config), _COUNT_KEYS[0])
    for place in dict.fromkeys((path[:-1], *_layer_places(config))):
        counted = {key: len(plan) for key in _count_keys(config) if key in value_at(config, place)}
        _set(changed, place, counted or ({path[-1]: len(plan)} if place == path[:-1] else {}))
    return changed


def layer_traits(config: Config, index: int, num_layers: int) -> tuple[Hashable, ...]:
    """All that a config says, by name or number, of the one layer `index`."""
    section = value_at(config, text_section(config))
    traits: list[Hashable] = [repr(section[key][index]) for key in _per_layer(section, num_layers)]
    traits += [index in section[key] for key in _index_lists(section)]
    traits += [index < section[key] for key in _prefix_counts(section)]
    return tuple(traits)


def _layer_places(config: Config) -> Iterator[tuple[str, ...]]:
    """The parts of a config that describe the layers: some models say it all twice."""
    section = text_section(config)
    if section:
        yield section
    if not section or any(key in config for key in _COUNT_KEYS):
        yield ()


def _count_keys(config: Config) -> tuple[str, ...]:
    if is_encoder_decoder(config) and any(config.get(key) for key in _DECODER_COUNT_KEYS):
        return _DECODER_COUNT_KEYS
    return _COUNT_KEYS


def _restacked(section: Config, origins: Sequence[LayerOrigin], num_layers: int) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key in _per_layer(section, num_layers):
        changed[key] = [
            _item(source.get(key), index, fallback=section[key]) for source, index in origins
        ]
    for key in _index_lists(section):
        changed[key] = [
            number
            for number, (source, index) in enumerate(origins)
            if index in _like(section[key], source.get(key))
        ]
    for key in _prefix_counts(section):
        flags = [index < _like(section[key], source.get(key)) for source, index in origins]
        changed[key] = _leading(key, flags)
    if "attention_types" in section and "attention_layers" in changed:  # GPT-Neo's short form
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    return changed


def _part(config: Config, place: Sequence[str]) -> Config:
    for key in place:
        config = config.get(key) or {}
    return config


def _like(known: Any, value: object) -> Any:
    """`value`, or `known` where that is of another kind."""
    return value if isinstance(value, type(known)) else known


def _item(values: object, index: int, *, fallback: Sequence[Any]) -> Any:
    if isinstance(values, list) and index < len(values):
        return values[index]
    return fallback[index % len(fallback)]


def _leading(key: str, flags: Sequence[bool]) -> int:
    count = sum(flags)
    if not all(flags[:count]):
        raise ConfigError(
            f"slices: {key} in config.json counts layers of another kind that come first; in this "
            "order of layers one of them would stand behind the others"
        )
    return count


def _per_layer(section: Config, num_layers: int) -> Iterator[str]:
    for key, value in section.items():
        if (
            isinstance(value, list)
            and len(value) == num_layers
            and key not in (*_INDEX_LISTS, *_NOT_PER_LAYER)
            and not key.endswith(_NOT_PER_LAYER_ENDINGS)
        ):
            yield key


def _index_lists(section: Config) -> Iterator[str]:
    return (key for key in _INDEX_LISTS if isinstance(section.get(key), list))


def _prefix_counts(section: Config) -> Iterator[str]:
    return (key for key in _PREFIX_COUNTS if isinstance(section.get(key), int))


def _set(config: dict[str, Any], place: Sequence[str], changes: Config) -> None:
    """Overwrites keys of the part at `place`, on copies of the parts on the way."""
    if not place:
        config.update(changes)
        return
    inner = dict(config[place[0]])
    _set(inner, place[1:], changes)
    config[place[0]] = inner
