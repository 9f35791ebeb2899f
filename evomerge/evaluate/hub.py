"""Files of dataset repositories on the Hugging Face hub."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from evomerge.errors import ConfigError

# Long enough for a slow connection to begin, short enough to say soon that there is none.
_SECONDS = 8.0


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
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        at = f" at {revision}" if revision else ""
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{file} of https://huggingface.co/datasets/{repository}{at} cannot be fetched"
            f"{offline}: {reason}"
        ) from error


def _ask(repository: str, revision: str | None) -> None:
    """Returns where the hub answers that there is such a repository; raises what went wrong."""
    from huggingface_hub import HfApi

    errors: list[Exception] = [TimeoutError(f"no answer within {_SECONDS:g} s")]

    def ask() -> None:
        try:
            HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS)
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    # A name look-up may hang for longer than any of the library's own limits.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if errors:
        raise errors[0]
