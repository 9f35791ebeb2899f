"""Files of dataset repositories on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.errors import ConfigError

# Long enough for a slow connection to begin, short enough to say soon that there is none.
_SECONDS = 10.0


def dataset_file(repository: str, revision: str | None, file: str) -> Path:
    """The local copy of a dataset repository's file, in the hub's own cache; fetched if needed.

    Raises ConfigError where the hub does not answer and the cache has no copy, or where there is no
    such file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file, revision=revision, repo_type="dataset")
    # What a revision's name means may change: only a commit's own copy is taken without asking.
    if isinstance(cached, str) and _is_commit(revision):
        return Path(cached)
    try:
        return Path(
            hf_hub_download(
                repository,
                file,
                revision=revision,
                repo_type="dataset",
                etag_timeout=_SECONDS,
            )
        )
    # By now whatever the network brings; its errors are those of the hub's HTTP library, which
    # changes. Without an answer the hub's library takes its copy by itself, where it has one.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        at = f" at {revision}" if revision else ""
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{file} of https://huggingface.co/datasets/{repository}{at} cannot be fetched"
            f"{offline}: {reason}"
        ) from error


def _is_commit(revision: str | None) -> bool:
    return (
        revision is not None and len(revision) == 40 and not set(revision) - set("0123456789abcdef")
    )
