"""A judge that this machine serves itself: vLLM's own server, on loopback, while it is needed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from evomerge.errors import ConfigError, RunError
from evomerge.evaluate.judge_config import JudgeServer

_SERVED_NAME = "judge"
_NO_SLEEP = "Sleep mode is not supported"  # in vLLM's words
_LONGEST_WAKING_SECONDS = 300.0
_LONGEST_START_SECONDS = 1800.0
_LONGEST_END_SECONDS = 30.0
_LINES_TOLD = 15

# The server ends when we do, even if we are killed: Linux tells it (PR_SET_PDEATHSIG, which the new
# program keeps). Asked for here and not between fork and exec, where threads make Python unsafe.
_LAUNCHER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that wanted a judge is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Served:
    """A judge as it can be reached; `ended` says why one that we serve can be no longer.

    It says None while it can be; and is None of a judge that others serve.
    """

    server: JudgeServer
    ended: Callable[[], str | None] | None = None


@contextlib.contextmanager
def served(server: JudgeServer, folder: Path, say: Callable[[str], None]) -> Iterator[Served]:
    """`server` as it can be reached: one with `local` is served for the block, others are as given.

    A relative path of the model starts at `folder`. Raises ConfigError where vLLM is not installed
    or does not serve the model, with the end of what it wrote.
    """
    if server.local is None:
        yield Served(server)
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"judge: local: {server.local}: vLLM serves it, which is not installed here: "
            "pip install 'evomerge[vllm]'"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}/v1"
    say(f"judge: vLLM serves {server.local} at {url}")
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *_command(server, folder, port)],
            stdout=written,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(server),
            start_new_session=True,  # Ctrl-C is for us: we end it
        )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", server, written)
            if server.sleep:
                Sleeper(url).sleep()
            update = {"model": _SERVED_NAME, "local": None, "base_url": url}
            yield Served(
                server.model_copy(update=update), lambda: _how_it_ended(process, server, written)
            )
        finally:
            _end(process)


@dataclass(frozen=True)
class Sleeper:
    """A server of vLLM that gives its GPU up while nobody needs it; `url` is its API's."""

    url: str

    def sleep(self) -> None:
        """Its weights go to the host's memory, its KV cache is given up. Raises RunError."""
        self._post("sleep", {"level": "1"})

    def wake(self) -> None:
        """It can be asked again. Raises RunError."""
        self._post("wake_up", {})

    def _post(self, route: str, query: Mapping[str, str]) -> None:
        address = f"{self.url.removesuffix('/v1')}/{route}"
        try:
            answer = httpx.post(
                address, params=query, timeout=_LONGEST_WAKING_SECONDS, trust_env=False
            )
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise RunError(f"judge: sleep: {address}: {error}") from error


def _command(server: JudgeServer, folder: Path, port: int) -> list[str]:
    """vLLM's server with the judge's options, which are fields of its own."""
    assert server.local is not None
    path = folder / Path(server.local).expanduser()
    arguments = {
        "model": str(path) if path.is_dir() else server.local,
        "served-model-name": _SERVED_NAME,
        "host": "127.0.0.1",
        "port": str(port),
    }
    command = ["-m", "vllm.entrypoints.openai.api_server"]
    command += ["--enable-sleep-mode"] if server.sleep else []
    for name, value in (arguments | dict(server.options)).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [flag] if value else []
        else:
            command += [flag, str(value)]
    return command


def _environment(server: JudgeServer) -> Mapping[str, str]:
    chosen = {} if server.gpu is None else {"CUDA_VISIBLE_DEVICES": str(server.gpu)}
    # vLLM has its routes for sleeping among those for development; it listens on loopback alone.
    routes = {"VLLM_SERVER_DEV_MODE": "1"} if server.sleep else {}
    return os.environ | chosen | routes


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, server: JudgeServer, written: IO[bytes]
) -> None:
    """Returns when the server answers. Raises ConfigError where it ends instead."""
    start = time.monotonic()
    while time.monotonic() - start < _LONGEST_START_SECONDS:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    said = _last_lines(written)
    if server.sleep and _NO_SLEEP in said:
        raise ConfigError(
            "judge: sleep: vLLM cannot give up memory on this machine; it can on NVIDIA and AMD "
            "GPUs. Leave sleep out, and let both models have their share of the memory"
        )
    raise ConfigError(
        f"judge: local: vLLM does not serve {server.local}; the end of what it wrote:\n{said}"
    )


def _how_it_ended(
    process: subprocess.Popen[bytes], server: JudgeServer, written: IO[bytes]
) -> str | None:
    status = process.poll()
    if status is None:
        return None
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return (
        f"judge: local: vLLM, which served {server.local}, ended {how}; the end of what it wrote:\n"
        f"{_last_lines(written, errors_first=True)}\n"
    )


def _last_lines(written: IO[bytes], *, errors_first: bool = False) -> str:
    """The end of what was written; with `errors_first` of vLLM's errors, where it wrote some.

    What it writes after them, when it ends, is of no interest.
    """
    written.seek(0)
    lines = written.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if "ERROR" in line] if errors_first else []
    return "\n".join((errors or lines)[-_LINES_TOLD:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it started: they are of one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LONGEST_END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
