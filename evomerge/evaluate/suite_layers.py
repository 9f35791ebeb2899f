"""A suite file put together: its texts, what the suite that it is like says, its rubric, its split.

Plain values in, plain values out; what they may be is `suite_config`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from evomerge.errors import ConfigError, nearest, shown
from evomerge.evaluate.named_files import NamedFile
from evomerge.evaluate.tables import read_text
from evomerge.resources import is_bare_name, locate
from evomerge.strict_yaml import read_yaml

# The scorer that a language model behind a network stands for.
JUDGE = "judge"
# The preset whose rubric a suite with a judge has that says nothing of one.
_USUAL_RUBRIC = "jsonl-judge"

# A suite of one's own adds to these of the suite that it is like, others it replaces.
_MERGED = ("rubric", "by_category", "fields", "splits")
# Of these `null` takes back what the other says; in the mappings also of a single key.
_TAKEN_BACK = (
    "by_category",
    "fields",
    "splits",
    "only",
    "gates",
    "turns",
    "turn_references",
    "choices",
    "stop",
)
# Values that may be the text of a file: {file: NAME}, relative to the file that says so.
_TEXTS = ("prompt", "chat_template")
JOINED = "join.file"

# What a suite says, and the folder of its file; after it, the same of the suite that it is like.
_Layers: TypeAlias = list[tuple[Mapping[str, Any], Path]]


def put_together(
    content: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], tuple[NamedFile, ...]]:
    """All that a suite's own `content` and what it is like say, and the files that they name.

    Paths start at `folder`. A second table's (`JOINED`) are as they are written: it lies beside the
    first one. Raises ConfigError where a file is not there, a suite is like itself, or there is no
    such split.
    """
    layers: _Layers = []
    whole = _with_split(_with_rubric(_complete(dict(content), folder, layers)))
    return whole, _named_files(layers)


def as_table(value: object) -> object:
    """A router as a mapping: its table alone may stand for it."""
    return {"table": value} if isinstance(value, str) else value


def suite_content(path: Path) -> dict[str, Any]:
    """What the suite file `path` says by itself. Raises ConfigError where it is no mapping."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a suite is a mapping, as {{scorer: exact, data: tasks.jsonl}}")
    return content


def _complete(
    content: dict[str, Any], folder: Path, layers: _Layers, seen: Sequence[Path] = ()
) -> dict[str, Any]:
    """`content` with the texts of its files, and what it is like below it; notes the `layers`.

    Raises ConfigError where a file is not there, or a suite is like itself.
    """
    layers.append((content, folder))
    filled = _with_texts(content, folder)
    like = filled.pop("like", None)
    if like is None:
        return _without_nulls(filled)
    if not isinstance(like, str):
        raise ConfigError(f"like: {like!r} is neither a preset's name nor a suite file")
    path = locate(like, "evaluators", folder=folder)
    if path in seen:
        raise ConfigError(f"like: {path} is like itself")
    below = _complete(suite_content(path), path.parent, layers, (*seen, path))
    below = _with_code_beside(_with_data_beside(below, path.parent), path.parent, folder)
    for key in _MERGED:
        if isinstance(below.get(key), Mapping) and isinstance(filled.get(key), Mapping):
            filled[key] = {**below[key], **filled[key]}
    return _without_nulls({**below, **filled})


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    """`content` without what a `null` took back of the suite that it is like."""
    kept = {
        key: content[key] for key in content if content[key] is not None or key not in _TAKEN_BACK
    }
    for key in _TAKEN_BACK:
        if isinstance(value := kept.get(key), Mapping):
            kept[key] = {name: value[name] for name in value if value[name] is not None}
    return kept


def _with_rubric(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with a rubric for its judge: without one of its own that of jsonl-judge."""
    scorer = content.get("scorer")
    names = scorer if isinstance(scorer, Mapping) else (scorer,)
    if content.get("rubric") is not None or JUDGE not in names:
        return content
    path = locate(_USUAL_RUBRIC, "evaluators")
    return {**content, "rubric": _with_texts(suite_content(path), path.parent)["rubric"]}


def _with_split(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the rows, or the files of the hub, that its `split` is, for `split` itself.

    Raises ConfigError where there is no such split.
    """
    splits, split = content.pop("splits", {}), content.pop("split", None)
    if not isinstance(splits, Mapping) or not all(
        isinstance(one, Mapping) for one in splits.values()
    ):
        raise ConfigError(
            "splits: right is a mapping of names to rows, as of `only`: {dev: {year: [2023, 2024]}}"
        )
    if split is None:
        return content
    if not isinstance(split, str | int):
        raise ConfigError(f"split: right is the name of one split (given: {shown(split)})")
    # YAML has numbers for names, as 2024; the command line has texts.
    split, rows = str(split), {str(name): some for name, some in splits.items()}
    if split in rows:
        only = content.get("only", {})
        return {**content, "only": {**only, **rows[split]} if isinstance(only, Mapping) else only}
    data = content.get("data")
    if isinstance(data, Mapping) and data.get("hub") and not data.get("file"):
        return {**content, "data": {**data, "split": split}}
    known = (
        nearest(split, rows)
        if rows
        else (
            "; the suite has no `splits:` (as splits: {dev: {COLUMN: VALUE}}), and `data:` is no "
            "dataset of the hub without a file"
        )
    )
    raise ConfigError(f"split: there is no split {split!r}{known}")


def _with_data_beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A suite file's own tables and folders stay the ones beside it."""
    beside = dict(content)
    if isinstance(content.get("data"), str):
        beside["data"] = _beside(content["data"], folder)
    router = as_table(content.get("router"))
    if isinstance(router, Mapping):
        places = {"table": _beside(router["table"], folder)} if "table" in router else {}
        embedding = router.get("embedding")
        # What is no folder beside the file is a model of the hub.
        if isinstance(embedding, str) and (folder / Path(embedding).expanduser()).is_dir():
            places["embedding"] = _beside(embedding, folder)
        beside["router"] = {**router, **places}
    return beside


def _with_code_beside(content: dict[str, Any], folder: Path, seen_from: Path) -> dict[str, Any]:
    """A suite file's own scorers, and its harness's task files, stay the ones beside it.

    Their names are as seen from the suite that is like it: these are part of a digest, in which
    the place of all the files has no part.
    """

    def placed(name: str) -> str:
        place = Path(name).expanduser()
        return str(place if place.is_absolute() else os.path.relpath(folder / place, seen_from))

    def renamed(name: object) -> object:
        place, _, function = str(name).rpartition(":")
        return f"{placed(place)}:{function}" if place.endswith(".py") else name

    beside = dict(content)
    scorer, harness = content.get("scorer"), content.get("harness")
    if isinstance(scorer, Mapping):
        beside["scorer"] = {renamed(name): scorer[name] for name in scorer}
    elif isinstance(scorer, str):
        beside["scorer"] = renamed(scorer)
    if isinstance(harness, Mapping) and isinstance(harness.get("include_path"), str):
        beside["harness"] = {**harness, "include_path": placed(harness["include_path"])}
    return beside


def _beside(name: object, folder: Path) -> object:
    # Absolute: whoever reads it puts another folder in front of what is not.
    return str((folder / Path(name).expanduser()).absolute()) if isinstance(name, str) else name


def _with_texts(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    filled = {
        key: _text(value, key, folder) if key in _TEXTS else value for key, value in content.items()
    }
    rubric = filled.get("rubric")
    if isinstance(rubric, Mapping) and "prompt" in rubric:
        text = _text(rubric["prompt"], "rubric.prompt", folder)
        filled["rubric"] = {**rubric, "prompt": text}
    return filled


def _text(value: object, key: str, folder: Path) -> object:
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"file"} or not isinstance(value["file"], str):
        raise ConfigError(f"{key}: right is a text or {{file: NAME}}")
    path = folder / Path(value["file"]).expanduser()
    try:
        return read_text(path)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror or error}") from error


def _named_files(layers: _Layers) -> tuple[NamedFile, ...]:
    """The files that make up a suite: of each key those of the first layer that has it.

    Of `like` those of all layers.
    """
    found: list[NamedFile] = []
    decided: set[str] = set()
    for content, folder in layers:
        said = _may_name_files(content)
        for key in [key for key in said if key not in decided]:
            names = [Path(name).expanduser() for name in _names_in(said[key])]
            found += [
                NamedFile(key, name if key == JOINED else folder / name, folder) for name in names
            ]
        decided |= said.keys() - {"like"}
    return tuple(found)


def _may_name_files(content: Mapping[str, Any]) -> dict[str, object]:
    """Key -> what may be a file's name or several, of each key of a suite that may name some."""
    said = {key: content[key] for key in ("data", "like") if key in content}
    for key in _TEXTS:
        if key in content:
            said[key] = _part(content[key], "file")
    rubric = content.get("rubric")
    if "rubric" in content and ("prompt" in rubric if isinstance(rubric, Mapping) else True):
        said["rubric.prompt"] = _part(_part(rubric, "prompt"), "file")
    if "router" in content:
        said["router.table"] = _part(as_table(content["router"]), "table")
    if "join" in content:
        said[JOINED] = _part(content["join"], "file")
    if isinstance(like := said.get("like"), str) and is_bare_name(like):
        del said["like"]
    return said


def _part(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def _names_in(value: object) -> list[str]:
    names = value if isinstance(value, list | tuple) else [value]
    return [name for name in names if isinstance(name, str)]
