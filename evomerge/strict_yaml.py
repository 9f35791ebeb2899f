"""YAML files as plain values: safe types only, every key once, and no larger than they look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import ConfigError

# `<<` takes over the keys of another mapping, and may be repeated.
_MERGE = "tag:yaml.org,2002:merge"
# A file of some lines can stand for more values than there is memory for, each alias being a copy.
_MOST_VALUES = 100_000
_DEEPEST = 64
_LONGEST_SHOWN = 60


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file, as of `load_yaml`; ConfigError where it cannot be read."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error


def load_yaml(text: str) -> Any:
    """The plain values in YAML `text`.

    Raises yaml.YAMLError where it is no YAML, where a value is not what its tag says, where it is
    nested more than 64 deep or its aliases stand for far more values than it has characters, and
    where a mapping has a key twice: plain YAML readers keep the last one without a word.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {}, 0, max(_MOST_VALUES, len(text)))
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"is nested more than {_DEEPEST} deep") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > _DEEPEST:  # before the scanner, whose time grows with its square
            raise yaml.YAMLError(_too_deep(self.get_mark()))
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, str):
                value.encode()  # half of a character can be escaped, but not printed or saved
        # What the constructors of plain YAML meet in `!!bool maybe`, 2001-99-99 or 5000 digits.
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{_shown(node.value)} is no valid {kind}", node.start_mark
            ) from error
        return value


def _too_deep(place: yaml.Mark) -> str:
    return f"is nested more than {_DEEPEST} deep, in line {place.line + 1}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _expanded_size(node: yaml.Node, sizes: dict[int, int], depth: int, most: int) -> int:
    """How many values `node` stands for, aliases written out; YAMLError if more than `most`."""
    if depth > _DEEPEST:
        raise yaml.YAMLError(_too_deep(node.start_mark))
    if id(node) not in sizes:
        children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        size = 1 + sum(_expanded_size(child, sizes, depth + 1, most) for child in children)
        if size > most:
            raise yaml.YAMLError(
                f"its aliases (*name) stand for more than {most} values, in line "
                f"{node.start_mark.line + 1}"
            )
        sizes[id(node)] = size
    return sizes[id(node)]


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raises YAMLError with the lines of the first key that `node` has twice."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if key.value in lines:
            raise yaml.YAMLError(
                f"the key {_shown(key.value)} is there twice, in lines {lines[key.value]} and "
                f"{line}; write it once"
            )
        lines[key.value] = line
