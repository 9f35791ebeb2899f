"""What a judge on another machine may be sent: a file that names one is not always one's own.

Who shares a study could have local files graded where he likes, and have keys sent there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from evomerge.errors import ConfigError
from evomerge.evaluate.judge_config import JudgeConfig, JudgeServer
from evomerge.evaluate.named_files import NamedFile

# Whose a key is that a variable of this name holds, by its usual name. None of these hosts runs
# what its users put there: such a one could keep the key.
_HOSTS: Mapping[str, tuple[str, ...]] = {
    "ANTHROPIC_API_KEY": ("api.anthropic.com",),
    "AZURE_OPENAI_API_KEY": (
        *("*.openai.azure.com", "*.cognitiveservices.azure.com", "*.services.ai.azure.com"),
    ),
    "CEREBRAS_API_KEY": ("api.cerebras.ai",),
    "COHERE_API_KEY": ("api.cohere.com", "api.cohere.ai"),
    "DASHSCOPE_API_KEY": ("dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com"),
    "DEEPSEEK_API_KEY": ("api.deepseek.com",),
    "FIREWORKS_API_KEY": ("api.fireworks.ai",),
    "GEMINI_API_KEY": ("generativelanguage.googleapis.com",),
    "GOOGLE_API_KEY": ("generativelanguage.googleapis.com",),
    "GROQ_API_KEY": ("api.groq.com",),
    "HF_TOKEN": ("router.huggingface.co",),
    "MISTRAL_API_KEY": ("api.mistral.ai",),
    "NVIDIA_API_KEY": ("integrate.api.nvidia.com",),
    "OPENAI_API_KEY": ("api.openai.com", "*.api.openai.com"),
    "OPENROUTER_API_KEY": ("openrouter.ai",),
    "TOGETHER_API_KEY": ("api.together.xyz", "api.together.ai"),
    "XAI_API_KEY": ("api.x.ai", "*.api.x.ai"),
}
_FOR_JUDGES = "JUDGE"


def check_trust(judge: JudgeConfig, files: Iterable[NamedFile]) -> None:
    """Raises ConfigError that names what goes to a judge on the user's --trust-code alone.

    That is, to another machine: a key in the clear, a key that is not that host's, and the texts of
    `files` that lie elsewhere than beside who names them.
    """
    far = [server for server in judge.servers if not server.on_this_machine]
    if not far:
        return
    hosts = ", ".join(dict.fromkeys(server.host for server in far))
    mistakes = [mistake for server in far for mistake in _about_key(server)]
    mistakes += [
        f"{one.key}: {_place(one.path)} lies outside of {one.folder.absolute()}, the folder of the "
        f"file that names it, and its text would go to the judge at {hosts}; move it into that "
        "folder, or allow it by --trust-code"
        for one in files
        if one.is_elsewhere
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _place(path: Path) -> str:
    """Where a file is: of a link also where it leads."""
    whole = Path(os.path.normpath(path.absolute()))
    real = path.resolve()
    return str(whole) if whole == real else f"{whole} (a link to {real})"


def _about_key(server: JudgeServer) -> Iterator[str]:
    """What is wrong with sending this server its key."""
    name = server.api_key_env
    if name is None:
        return
    parts = urlsplit(server.base_url)
    if parts.scheme != "https":
        yield (
            f"judge: base_url: {server.base_url} would get the key in {name} in the clear; right "
            "is https://, or allow it by --trust-code"
        )
    if name in _HOSTS:
        if not _is_one_of(parts.hostname or "", _HOSTS[name]):
            yield (
                f"judge: api_key_env: {name} holds a key for {' or '.join(_HOSTS[name])}, and this "
                f"judge is at {server.host}; name another variable, {_HOW_TO_NAME}"
            )
    elif _FOR_JUDGES not in name.upper().split("_"):
        yield (
            f"judge: api_key_env: {name} is not known to hold a key for {server.host}; name "
            f"another variable, {_HOW_TO_NAME}"
        )


_HOW_TO_NAME = "with JUDGE in its name (as JUDGE_API_KEY), or allow this one by --trust-code"


def _is_one_of(host: str, patterns: Iterable[str]) -> bool:
    return any(
        host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )
