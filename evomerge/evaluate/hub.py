"""Files of dataset repositories on the Hugging Face hub."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.evaluate.hub_splits import files_of_split

# Long enough for a slow connection to begin, short enough to say soon that there is none.
_SECONDS = 8.0
# Where a dataset says what its splits are.
_CARD = "README.md"


def dataset_split(
    repository: str, revision: str | None, config: str | None, split: str
) -> list[Path]:
    """The local copies of the files that are a dataset's `split`, as `dataset_file` has them.

    Raises ConfigError where there is no such split or config, or nobody knows.
    """
    names, card = _contents(repository, revision)
    try:
        files = files_of_split(names, card, config, split)
    except ConfigError as error:
        raise ConfigError(f"{_address(repository, revision)}: {error}") from error
    return [dataset_file(repository, revision, file) for file in files]


def _contents(repository: str, revision: str | None) -> tuple[list[str], str]:
    """The names of a repository's files, and its README; where the hub does not answer, of what
    its cache has.
    """
    try:
        names = _ask(repository, revision)
    except Exception as error:  # see dataset_file
        found = _cached(repository, revision)
        if found is None:
            raise _not_fetched("its files", repository, revision, error) from error
        names = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
    if _CARD not in names:
        return names, ""
    return names, dataset_file(repository, revision, _CARD).read_text("utf-8", errors="replace")


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the hub's cache; None without one."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=repository, repo_type="dataset"
    )
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision or ""
    found = folder / "snapshots" / commit
    return found if commit and found.is_dir() else None


def dataset_file(repository: str, revision: str | None, file: str) -> Path:
    """The local copy of a dataset repository's file, in the hub's own cache; fetched if needed.

    Where the hub does not answer, what the cache has of that revision is taken. Raises ConfigError
    where it has none, or where there is no such file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        # Once and soon: a download asks again and again, for most of a minute.
        _ask(repository, revision)
        # By the revision's name, not its commit: the cache then knows it by its name, too.
        return Path(hf_hub_download(repository, file, revision=revision, repo_type="dataset"))
    # By now whatever the network brings; its errors are those of the hub's HTTP library, which
    # changes.
    except Exception as error:
        cached = try_to_load_from_cache(repository, file, revision=revision, repo_type="dataset")
        if isinstance(cached, str):
            return Path(cached)
        raise _not_fetched(file, repository, revision, error) from error


def name_in_dataset(copy: Path, path: Path) -> str | None:
    """What the dataset that the local `copy` of a file is of calls `path`; None if it is no part.

    By its name: in the hub's cache all files are links.
    """
    snapshots = (folder for folder in copy.parents if folder.parent.name == "snapshots")
    root = next(folder for folder in snapshots if folder.parts[-3].startswith("datasets--"))
    name = os.path.relpath(path, root)
    return None if name.startswith("..") else Path(name).as_posix()


def _not_fetched(what: str, repository: str, revision: str | None, error: Exception) -> ConfigError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return ConfigError(
        f"{what} of {_address(repository, revision)} cannot be fetched{offline}: {reason}"
    )


def _address(repository: str, revision: str | None) -> str:
    at = f" at {revision}" if revision else ""
    return f"https://huggingface.co/datasets/{repository}{at}"


def _ask(repository: str, revision: str | None) -> list[str]:
    """The files of a repository, once the hub answers that there is one; raises what went wrong."""
    from huggingface_hub import HfApi

    errors: list[Exception] = [TimeoutError(f"no answer within {_SECONDS:g} s")]
    names: list[str] = []

    def ask() -> None:
        try:
            info = HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS)
            names.extend(sibling.rfilename for sibling in info.siblings or ())
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    # A name look-up may hang for longer than any of the library's own limits.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if errors:
        raise errors[0]
    return [name for name in names if ".." not in name.split("/")]
