"""YAML files as plain values: safe types only, and every key once."""

from __future__ import annotations

from typing import Any

import yaml

# `<<` takes over the keys of another mapping, and may be repeated.
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """The plain values in YAML `text`.

    Raises yaml.YAMLError where it is no YAML, and where a mapping has a key twice: plain YAML
    readers keep the last one without a word.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
        return super().construct_mapping(node, deep=deep)


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raises YAMLError with the lines of the first key that `node` has twice."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if key.value in lines:
            raise yaml.YAMLError(
                f"the key {key.value!r} is there twice, in lines {lines[key.value]} and {line}; "
                "write it once"
            )
        lines[key.value] = line
