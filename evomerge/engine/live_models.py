"""Whole models, one after another, in one live engine where they are of one kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.engine import Engine, EngineConfig, open_engine
from evomerge.errors import CandidateError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.model_files import GENERATION_FILE, TOKENIZER_FILES, read_json
from evomerge.recipe import Recipe, recipe_from_mapping

# Of the configurations what makes no other model: who wrote it, its name, how it is stored.
_NO_MATTER = (
    *("_name_or_path", "name_or_path", "transformers_version", "use_cache", "dtype"),
    *("torch_dtype", "local_files_only"),
)
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LiveSettings:
    """What the engines of `LiveModels` are started with; `dtype` None: each model's own."""

    name: str
    dtype: str | None = None
    threads: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """What models must have in common to be switched in one engine."""

    dtype: str
    signature: str


class LiveModels:
    """The models in `folders`, each in an engine when its turn comes.

    Those of one architecture, tokenizer and dtype share an engine: the first of them is loaded as
    it is, the others are switched to. `say` is told when an engine starts. Raises ConfigError
    where a folder holds no model.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        settings: LiveSettings,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folders = [folder.absolute() for folder in folders]
        self._settings = settings
        self._say = say
        self._kinds = [_kind(folder, settings.dtype) for folder in self._folders]

    def turns(self) -> list[list[int]]:
        """The places of the models in the order of their turns: a list for each engine."""
        groups: dict[_Kind, list[int]] = {}
        for place, kind in enumerate(self._kinds):
            groups.setdefault(kind, []).append(place)
        return list(groups.values())

    @contextmanager
    def opened(self) -> Iterator[Iterator[tuple[int, Engine | CandidateError]]]:
        """(place, the engine that is its model now) for each model, kind by kind.

        In place of the engine the CandidateError of a model that cannot be switched to (NaN in its
        weights). An engine is closed when the next one is needed, and all at the end of the block.
        Raises what engines raise when they start.
        """
        with ExitStack() as stack:
            yield self._each(stack)

    def _each(self, stack: ExitStack) -> Iterator[tuple[int, Engine | CandidateError]]:
        for places in self.turns():
            engine: Engine | None = None
            for place in places:
                recipe = one_model(self._folders[place], self._kinds[place].dtype)
                if engine is None or engine.supports(recipe) is not None:
                    stack.close()
                    engine = stack.enter_context(self._start(place, places))
                    yield place, engine
                    continue
                try:
                    engine.load(recipe)
                except CandidateError as error:
                    yield place, error
                else:
                    yield place, engine

    def _start(self, place: int, kin: Sequence[int]) -> Engine:
        folder = self._folders[place]
        self._say(f"starting {self._settings.name} on {folder.name}")
        config = EngineConfig(
            model=str(folder),
            sources=tuple(str(self._folders[other]) for other in kin),
            dtype=self._kinds[place].dtype,
            threads=self._settings.threads,
            options=self._settings.options,
        )
        return open_engine(self._settings.name, config)


def one_model(folder: Path, dtype: str) -> Recipe:
    """The recipe of one whole model as it is, in `dtype`."""
    mapping = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": dtype}
    return recipe_from_mapping(mapping, str(folder))


def _kind(folder: Path, dtype: str | None) -> _Kind:
    checkpoint = Checkpoint.open(folder)
    config = {key: value for key, value in checkpoint.config.items() if key not in _NO_MATTER}
    tensors = sorted((name, tuple(header.shape)) for name, header in checkpoint.tensors.items())
    text = json.dumps([config, tensors, _tokenizer(folder)], sort_keys=True, default=str)
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    usual = own if own in _DTYPES else "bfloat16"
    return _Kind(dtype or str(usual), hashlib.sha256(text.encode()).hexdigest())


def _tokenizer(folder: Path) -> str:
    """The tokenizer's files and the tokens that end an answer, without where they were saved."""
    parts: dict[str, object] = {}
    for file in (folder / name for name in (*TOKENIZER_FILES, GENERATION_FILE)):
        if not file.is_file():
            continue
        if file.name in {"tokenizer_config.json", GENERATION_FILE}:
            parts[file.name] = {
                key: value for key, value in read_json(file).items() if key not in _NO_MATTER
            }
        else:
            parts[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return json.dumps(parts, sort_keys=True)
