"""Models as a study names them -> local folders of safetensors.

A reference is a local folder, a `.gguf` file, a hub name `owner/name[@revision]`, or one of these
with `+adapter` (a PEFT LoRA, itself a folder or a hub name). What has to be made is made once and
kept in `<storage>/input_models/<name>_<hash>`, named by its content.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from evomerge.errors import ConfigError, shown
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.model_files import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    TOKENIZER_FILES,
    require_tokenizer,
)
from evomerge.merge.publishing import disk_failure, published

Result = TypeVar("Result")

HUB_SECONDS = 5.0
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?")

# How an embedding's vectors become one, as sentence-transformers keeps it: a router reads it.
_POOLING = "1_Pooling/config.json"
# What a model needs of a hub repository: no pickles, no code.
HUB_FILE = re.compile(
    "|".join([r"[^/]+\.(safetensors|json|jinja)", *map(re.escape, (*TOKENIZER_FILES, _POOLING))])
)

# What the hub answers where there is no such repository, or not for this user.
_REFUSALS = (401, 403, 404)

_ORIGIN = "evomerge_origin.json"

# Of GGUF files: the key that says how positions are scaled, and the table that does for Llama 3.
_SCALING = ".rope.scaling.type"
_ROPE_TABLE = "rope_freqs"
# Whose GGUF files transformers reads as they are: of others (Gemma, mixtures) it takes parts of the
# configuration for what is usual, or leaves tensors out. A Mistral's architecture is llama.
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


class HubUnreachableError(ConfigError):
    """The hub gave no answer, whether or not it has the model."""


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class InputModels:
    """Where references are looked up, and where what is made of them is kept.

    `folder` is where relative paths start (that of the study file); `storage` holds
    `input_models/`; `dtype` is that of models made from GGUF files; `say` is told, in one line
    each, what takes its time. A hub that did not answer within `hub_seconds` is not asked again.
    """

    storage: Path
    folder: Path = Path()
    dtype: str = "bfloat16"
    say: Callable[[str], None] = _silent
    hub_seconds: float = HUB_SECONDS
    _unreachable: list[HubUnreachableError] = field(default_factory=list, repr=False, compare=False)

    def resolve(self, reference: str) -> Path:
        """The absolute folder of safetensors that `reference` means; see the module's docstring.

        Raises ConfigError where there is none: the message says what the reference could be.
        """
        return self._resolve(reference, {})

    def resolve_all(
        self, references: Iterable[str]
    ) -> tuple[dict[str, Path], dict[str, ConfigError]]:
        """The folders of those references that have one, and what is wrong with the others.

        What several of them mean (a GGUF file by two names, a model under two adapters) is looked
        up, read and made once.
        """
        known: dict[str, Path] = {}
        folders: dict[str, Path] = {}
        mistakes: dict[str, ConfigError] = {}
        for reference in dict.fromkeys(references):
            try:
                folders[reference] = self._resolve(reference, known)
            except ConfigError as error:
                mistakes[reference] = error
        return folders, mistakes

    def _resolve(self, reference: str, known: dict[str, Path]) -> Path:
        """`resolve`, with what is known already, by what it is: a path, else a name."""
        is_local = self._is_local(reference)
        key = str(self._path(reference)) if is_local else reference
        if key not in known:
            if not is_local and "+" in reference:
                base, adapter = self._split(reference)
                model = self._resolve(base, known)
                known[key] = self._with_adapter(model, self._adapter(adapter))
            else:
                model = self._plain(reference)
                require_tokenizer(model)
                known[key] = model
        return known[key]

    def hub_ids(self, reference: str) -> tuple[str, ...]:
        """The hub repositories (`owner/name`) that a reference names: none, a model, an adapter."""
        is_plain = self._is_local(reference) or "+" not in reference
        parts = (reference,) if is_plain else self._split(reference)
        hub = [part for part in parts if not self._is_local(part) and HUB_NAME.fullmatch(part)]
        return tuple(part.partition("@")[0] for part in hub)

    def local_paths(self, reference: str) -> tuple[Path, ...]:
        """The folders and files of this machine that a reference names: model, adapter."""
        is_plain = self._is_local(reference) or "+" not in reference
        parts = (reference,) if is_plain else self._split(reference)
        return tuple(self._path(part) for part in parts if self._is_local(part))

    def _is_local(self, reference: str) -> bool:
        return self._path(reference).exists()

    def _split(self, reference: str) -> tuple[str, str]:
        """The two sides of MODEL+ADAPTER, at the last + that has a local model before it.

        Without one it is the first +: names on the hub have none.
        """
        places = [index for index, letter in enumerate(reference) if letter == "+"]
        local = [index for index in places if index and self._is_local(reference[:index])]
        place = max(local, default=places[0])
        model, adapter = reference[:place], reference[place + 1 :]
        if not model or not adapter or ("+" in adapter and not self._is_local(adapter)):
            raise ConfigError(
                f"{reference}: expected MODEL+ADAPTER, with one + and a name either side"
            )
        return model, adapter

    def _path(self, reference: str) -> Path:
        try:
            path = (self.folder / Path(reference).expanduser()).resolve()
            path.exists()
        # It is too long, has a null byte, or names the home of a user who is not there.
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{shown(reference)}: cannot be a model's name: {reason}") from error
        return path

    def _plain(self, reference: str) -> Path:
        path = self._path(reference)
        if path.is_dir():
            return path
        if path.suffix == ".gguf" and path.is_file():
            return self._dequantised(path)
        return self._snapshot(reference, what="model")

    def _adapter(self, reference: str) -> Path:
        path = self._path(reference)
        folder = path if path.is_dir() else self._snapshot(reference, what="adapter")
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ConfigError(f"{folder}: not a LoRA adapter: {ADAPTER_CONFIG} is missing")
        return folder

    def _kept(self, name: str, content: str) -> Path:
        """The folder for an input of this name and content (any text that decides it)."""
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
        return self.storage.resolve() / "input_models" / f"{safe}_{digest}"

    def _with_adapter(self, model: Path, adapter: Path) -> Path:
        content = Checkpoint.open(model).fingerprint() + _content_of(adapter)
        kept = self._kept(f"{_bare(model.name)}+{_bare(adapter.name)}", content)
        if not kept.is_dir():
            from evomerge.merge.lora import apply_adapter  # imports torch

            self.say(f"applying {adapter.name} to {model.name} (kept in {kept})")
            apply_adapter(model, adapter, kept)
        return kept

    def _dequantised(self, path: Path) -> Path:
        kept = self._kept(path.stem, _file_digest(path) + self.dtype)
        if not kept.is_dir():
            self.say(f"de-quantising {path.name} to {self.dtype} (kept in {kept})")
            with published(kept) as partial:
                _dequantise(path, partial, self.dtype)
        return kept

    def _snapshot(self, reference: str, what: str) -> Path:
        is_file = reference.endswith((".gguf", ".safetensors"))
        if is_file or not HUB_NAME.fullmatch(reference):
            raise ConfigError(
                f"{reference}: this {what} is neither a folder ({self._path(reference)} does not "
                "exist) nor a hub name (owner/name or owner/name@revision)"
            )
        name, _, revision = reference.partition("@")
        try:
            commit, files = self._ask_hub(name, revision or None)
            return self._download(reference, name, commit, files)
        except HubUnreachableError as error:
            self._unreachable.append(error)
            kept = self._known_snapshot(reference) or self._cached_snapshot(reference)
            if kept is None:
                raise
            self.say(f"{reference}: the hub does not answer; using {kept}")
            return kept

    def _ask_hub(self, name: str, revision: str | None) -> tuple[str, list[str]]:
        if self._unreachable:
            raise HubUnreachableError(
                f"{name}: not a folder here, and the hub did not answer before"
            )
        return _ask_hub(name, revision, self.hub_seconds)

    def _kept_snapshot(self, name: str, commit: str) -> Path:
        return self._kept(name.rpartition("/")[2], f"{name}@{commit}")

    def _known_snapshot(self, reference: str) -> Path | None:
        """The newest folder that an earlier download of `reference` left; None without one."""
        origins = (self.storage / "input_models").glob(f"*/{_ORIGIN}")
        known = [
            path
            for path in origins
            # What is kept are links into the hub's cache, which may have been emptied.
            if _origin_of(path) == reference
            and all(file.exists() for file in path.parent.iterdir())
        ]
        newest = max(known, key=lambda path: path.stat().st_mtime, default=None)
        return newest.parent.resolve() if newest else None

    def _cached_snapshot(self, reference: str) -> Path | None:
        """What the hub's own cache has of `reference`, put there by whatever program."""
        name, _, revision = reference.partition("@")
        cached = _find_cached(name, revision or None)
        if cached is None:
            return None
        files = sorted(file.name for file in cached.iterdir() if HUB_FILE.fullmatch(file.name))
        files += [_POOLING] * (cached / _POOLING).is_file()
        return self._linked(reference, name, cached, files)

    def _download(self, reference: str, name: str, commit: str, files: list[str]) -> Path:
        """The files at `commit`, in the hub's own cache, as a folder of links to them."""
        kept = self._kept_snapshot(name, commit)
        if _has_all(kept, files):
            return kept
        self.say(f"fetching {name} at {commit[:12]} ({len(files)} files)")
        return self._linked(reference, name, _fetch(name, commit, files), files)

    def _linked(self, reference: str, name: str, cached: Path, files: list[str]) -> Path:
        """The folder for a model in the hub's cache, whose folders are named by their commits."""
        commit = cached.name
        kept = self._kept_snapshot(name, commit)
        if _has_all(kept, files):
            return kept
        with published(kept, overwrite=True) as partial:
            for file in files:
                (partial / file).parent.mkdir(exist_ok=True)
                (partial / file).symlink_to((cached / file).resolve())
            origin = {"reference": reference, "commit": commit}
            (partial / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        return kept


def _has_all(folder: Path, files: Sequence[str]) -> bool:
    return folder.is_dir() and all((folder / file).exists() for file in files)


def _origin_of(file: Path) -> str | None:
    """The reference that a kept folder was made for; None where its file is spoiled."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dequantise(path: Path, out: Path, dtype: str) -> None:
    """Writes the GGUF file's model and tokenizer to `out`, by transformers' own reading of it."""
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{path}: reading GGUF files needs two more packages: pip install 'evomerge[gguf]'"
        )
    try:
        content = _read_gguf(path)
        _refuse_unread(path, content)
        model, tokenizer, missing = _read_with_transformers(path, dtype)
    except ConfigError:
        raise
    # Whatever the readers meet in a file that is broken or unknown to them.
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read as GGUF: {_first_line(error)}") from error
    _refuse_lost(path, content, sum(one.numel() for one in model.parameters()), missing)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise disk_failure(out, error) from error


def _read_with_transformers(path: Path, dtype: str) -> tuple[Any, Any, list[str]]:
    """A GGUF file's model and tokenizer, and the names of the weights that it did not have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), output_loading_info=True
    )
    quantised, said = read
    # transformers refuses to save a model that it read from GGUF: a plain one takes its weights.
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    # Raises where weights have other shapes than the config that was read with them.
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model, tokenizer, list(said["missing_keys"])


@dataclass(frozen=True)
class _GGUFContent:
    """What a GGUF file says of its kind and positions, and how many numbers its weights are."""

    architecture: str
    scaling: str | None
    numbers: int


def _read_gguf(path: Path) -> _GGUFContent:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    scaling = next(
        (str(field.contents()) for name, field in reader.fields.items() if name.endswith(_SCALING)),
        None,
    )
    weights = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    if any(name.startswith(_ROPE_TABLE) for name in weights):
        scaling = scaling or _ROPE_TABLE
    numbers = sum(count for name, count in weights.items() if not name.startswith(_ROPE_TABLE))
    architecture = str(reader.fields["general.architecture"].contents())
    return _GGUFContent(architecture, None if scaling == "none" else scaling, numbers)


def _refuse_unread(path: Path, content: _GGUFContent) -> None:
    """Raises ConfigError where transformers would read another model than the file holds."""
    if content.architecture not in _GGUF_ARCHITECTURES:
        raise ConfigError(
            f"{path}: GGUF files of {', '.join(_GGUF_ARCHITECTURES)} are read right, this one is "
            f"of {content.architecture}; use the model's safetensors"
        )
    if content.scaling:
        raise ConfigError(
            f"{path}: its scaling of positions ({content.scaling}) would be lost: transformers "
            "does not read it from GGUF files; use the model's safetensors"
        )


def _refuse_lost(path: Path, content: _GGUFContent, read: int, missing: Iterable[str]) -> None:
    """Raises ConfigError where tensors of the file (biases …) did not get into the model."""
    lost = ", ".join(sorted(missing)[:3])
    if content.numbers != read:
        lost = f"{content.numbers} numbers in the file, {read} in the model"
    if lost:
        raise ConfigError(
            f"{path}: transformers does not read all of this GGUF file ({lost}); use the model's "
            "safetensors"
        )


def _ask_hub(name: str, revision: str | None, seconds: float) -> tuple[str, list[str]]:
    """The commit that `revision` is, and the files of it that a model needs."""
    from huggingface_hub import HfApi

    def ask() -> tuple[str, list[str]]:
        info = HfApi().model_info(name, revision=revision, timeout=seconds)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        return str(info.sha), [file for file in files if HUB_FILE.fullmatch(file)]

    commit, files = _hub_call(name, lambda: _within(seconds, ask))
    if not any(file.endswith(".safetensors") for file in files):
        raise ConfigError(f"{name}: this hub repository has no safetensors; nothing else is read")
    return commit, files


def _fetch(name: str, commit: str, files: list[str]) -> Path:
    """The hub cache's folder with `files` of `name` at `commit`; what it lacks is fetched."""
    from huggingface_hub import snapshot_download

    return Path(
        _hub_call(name, lambda: snapshot_download(name, revision=commit, allow_patterns=files))
    )


def _find_cached(name: str, revision: str | None) -> Path | None:
    """The hub cache's folder with a model or an adapter, found without asking anybody."""
    from huggingface_hub import try_to_load_from_cache

    # snapshot_download(local_files_only=True) refuses a cache without the files that nobody reads.
    for config in (CONFIG_FILE, ADAPTER_CONFIG):
        found = try_to_load_from_cache(name, config, revision=revision)
        if isinstance(found, str) and any(Path(found).parent.glob("*.safetensors")):
            return Path(found).parent
    return None


def _hub_call(name: str, call: Callable[[], Result]) -> Result:
    """What `call` returns; any failure of it as a ConfigError that names the repository."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return call()
    # The others are those of servers in trouble, of proxies, and of the client's transport
    # (requests, httpx), which changes.
    except Exception as error:
        is_answer = isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSALS
        if is_answer or isinstance(error, HFValidationError):
            raise ConfigError(
                f"{name}: not a folder here, and the Hugging Face hub has no such model for you "
                f"({_first_line(error)}); a private or gated one needs HF_TOKEN"
            ) from error
        raise HubUnreachableError(
            f"{name}: not a folder here, and the Hugging Face hub does not answer "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """What `call` returns; TimeoutError after `seconds`, even where it hangs in a name look-up."""
    results: list[Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def _content_of(folder: Path) -> str:
    """One text for the names and contents of the files in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return "".join(f"{path.name} {_file_digest(path)}\n" for path in files)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bare(name: str) -> str:
    """A kept folder's name without its hash: names stay short where inputs are made of inputs."""
    return re.sub(r"_[0-9a-f]{12}$", "", name)
