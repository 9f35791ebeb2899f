"""Which files of a dataset repository make up one of its splits, as the hub itself finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import yaml

from evomerge.errors import ConfigError, nearest
from evomerge.evaluate.tables import KINDS
from evomerge.strict_yaml import load_yaml

# What the hub takes for the usual splits in the names of files and folders.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.\w+")
# What the hub itself writes; files of these names leave no word to others.
_SPLIT_SHARD = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def files_of_split(names: Sequence[str], card: str, config: str | None, split: str) -> list[str]:
    """The files of `names` (all of a repository) that are `split`, in order.

    By the `configs:` at the head of `card` (the repository's README.md), where `config` names one;
    else by their own names and folders. Raises ConfigError where there is no such split or config,
    or its files are of a kind that is not read.
    """
    chosen = _chosen(_configs(card), config)
    below = str(chosen.get("data_dir") or "").strip("/")
    inside = sorted(name for name in names if not below or name.startswith(f"{below}/"))
    if chosen.get("data_files"):
        splits = dict(_declared(chosen["data_files"], below, inside))
    else:
        splits = _by_name([name for name in inside if _is_table(name)])
    if split not in splits:
        raise ConfigError(
            f"there is no split {split!r}{nearest(split, splits)}"
            if splits
            else (f"no file of it is a table of a split ({', '.join(KINDS)})")
        )
    found = splits[split]
    if other := next((name for name in found if not _is_table(name)), None):
        raise ConfigError(f"its split {split!r} is in {other}; right are {', '.join(KINDS)}")
    _refuse_missing_shards(found)
    return found


def _configs(card: str) -> list[Mapping[str, Any]]:
    """The `configs:` of a README's head; none where it has none that can be read."""
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        content = load_yaml(head[1]) if head else None
    except yaml.YAMLError:
        return []
    found = content.get("configs") if isinstance(content, Mapping) else None
    return [one for one in found or () if isinstance(one, Mapping)]


def _chosen(configs: Sequence[Mapping[str, Any]], wanted: str | None) -> Mapping[str, Any]:
    """The configuration of this name; without a name the default one, {} where there are none."""
    by_name = {str(one.get("config_name", "default")): one for one in configs}
    if wanted is not None:
        if wanted not in by_name:
            known = nearest(wanted, by_name) if by_name else "; it has none"
            raise ConfigError(f"there is no config {wanted!r}{known}")
        return by_name[wanted]
    default = [one for one in configs if one.get("default")] or [
        one for name, one in by_name.items() if name == "default" or len(by_name) == 1
    ]
    if configs and not default:
        raise ConfigError(f"it has several configs; name one: config: {' or '.join(by_name)}")
    return default[0] if default else {}


def _declared(
    data_files: object, below: str, names: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Split -> files, as a configuration's `data_files` says."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    parts = [
        one if isinstance(one, Mapping) else {"split": "train", "path": one} for one in entries
    ]
    for split in dict.fromkeys(str(one.get("split", "train")) for one in parts):
        patterns = [
            f"{below}/{pattern}" if below else pattern
            for one in parts
            if str(one.get("split", "train")) == split
            for pattern in _texts(one.get("path"))
        ]
        found = [name for name in names if any(_matches(name, pattern) for pattern in patterns)]
        if found:
            yield split, found


def _texts(value: object) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _matches(name: str, pattern: str) -> bool:
    """Whether a shell's pattern fits: * stands for no /, **/ for any folders or none."""
    if "**" in pattern:
        return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("**/", ""))
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _by_name(tables: Sequence[str]) -> dict[str, list[str]]:
    """Split -> tables whose folder or name says so; where none does all of them are `train`."""
    splits: dict[str, list[str]] = {}
    for name in tables:
        if shard := _SPLIT_SHARD.fullmatch(name):
            splits.setdefault(shard[1], []).append(name)
    if splits:
        return splits  # such names say it all: dev is dev there, and test_a is not test
    for name in tables:
        for split in _splits_in(name):
            splits.setdefault(split, []).append(name)
    return splits or ({"train": list(tables)} if tables else {})


def _splits_in(name: str) -> list[str]:
    """The usual splits that a file is of by the words in its name."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return [split for split, some in _WORDS.items() if words.intersection(some)]


def _is_table(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in KINDS


def _refuse_missing_shards(found: Iterable[str]) -> None:
    """Raises ConfigError where a part is missing: of a cache that was filled by half."""
    shards: dict[tuple[str, str], int] = {}
    for name in found:
        if shard := _SHARD.fullmatch(name):
            shards[shard[1], shard[3]] = shards.get((shard[1], shard[3]), 0) + 1
    for (name, number), there in shards.items():
        if there != int(number):
            raise ConfigError(f"of {name} {there} of {int(number)} parts are there")
