"""All that this project uses of vLLM beyond its public interface, and the versions it is made for.

That is how the packed weights of CPU layers and of experts are unpacked, where the key-value cache
lies, how an engine is ended, how to tell that one is gone, and what vLLM raises then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import torch
from packaging.version import Version

from evomerge.errors import EngineDiedError, EvomergeError

# The first version that was tested and the first that was not. 0.25.1 has the weight-transfer
# interface too, but does not say which weights wrote an answer.
TESTED = ("0.32.0", "0.33")

_SECONDS_BETWEEN_LOOKS = 1.0
_Result = TypeVar("_Result")


def check_vllm_version(version: str) -> None:
    """Raises EvomergeError unless `version` is one that this file was tested with."""
    if not Version(TESTED[0]) <= Version(Version(version).base_version) < Version(TESTED[1]):
        raise EvomergeError(
            f"evomerge was tested with vLLM from {TESTED[0]} up to before {TESTED[1]}, this is "
            f"{version}: install one of those (pip install 'vllm>={TESTED[0]},<{TESTED[1]}')"
        )


def unpack_cpu_layers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Gives every CPU layer its plain weight back, uninitialised, and a plain matrix product.

    Returns the weights that are to be filled.

    vLLM's CPU layers hand their weight to a packed copy after loading and keep an empty parameter:
    a write into it would be without effect. Unpacked, generation runs at about 0.8 of the speed,
    and a switch costs its memory traffic only instead of 20 copies' time for packing again.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    unpacked: list[torch.Tensor] = []
    layer: Any  # vLLM's layers have a weight, a bias and the matrix product that is to use them
    for layer in model.modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        if layer.weight.numel() == 0:
            recorded = get_layerwise_info(layer).restore_metadata[0]["weight"]
            weight = materialize_meta_tensor(restore_layer_refs(recorded, layer))
            layer.register_parameter("weight", weight)
            unpacked.append(layer.weight)
        if getattr(layer, "bias", None) is not None:  # packing widens it to float32
            layer.bias.data = layer.bias.data.to(layer.weight.dtype)
        layer.cpu_linear = torch.nn.functional.linear
    return unpacked


@dataclass
class PackedExperts:
    """The experts of one layer, whose CPU kernel reads a packed copy of their weights.

    `plain` are the weights in the layout of the checkpoint, which are filled; `pack` brings them to
    where the kernel reads, in place.
    """

    layer: Any
    plain: dict[str, torch.nn.Parameter]
    packed: dict[str, torch.nn.Parameter]

    def pack(self) -> None:
        """Makes the kernel compute with what `plain` holds now."""
        from vllm._custom_ops import cpu_prepack_moe_weight

        experts = self.layer.quant_method.moe_kernel.fused_experts
        for name, plain in self.plain.items():
            shape = self.packed[name].shape
            padded = plain.data if plain.shape == shape else _padded(plain.data, shape)
            self.packed[name].data.copy_(cpu_prepack_moe_weight(padded, experts.isa))
            self.layer.register_parameter(name, self.packed[name])


def unpack_cpu_experts(model: torch.nn.Module) -> list[PackedExperts]:
    """Gives every layer of experts that a CPU kernel packed its plain weights back, uninitialised.

    They stand in the layers until `PackedExperts.pack` puts the packed ones there again. A pack
    costs a pass over the experts' weights, and the plain ones stay in memory beside it.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    found: list[PackedExperts] = []
    layer: Any
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if not hasattr(layer, "w13_weight") or not hasattr(experts, "isa"):
            continue
        if getattr(experts, "_use_zentorch", False):  # that kernel reads the plain weights
            continue
        packed = {name: getattr(layer, name) for name in ("w13_weight", "w2_weight")}
        plain = {}
        for name in packed:
            recorded = get_layerwise_info(layer).restore_metadata[0][name]
            plain[name] = materialize_meta_tensor(restore_layer_refs(recorded, layer))
            layer.register_parameter(name, plain[name])
        found.append(PackedExperts(layer, plain, packed))
    return found


def _padded(plain: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Experts' weights with the inner dimension that their kernel wants, filled up with zeros.

    w13 has shape [experts, 2·inner, hidden], gate rows first; w2 [experts, hidden, inner].
    """
    padded = plain.new_zeros(shape)
    if plain.shape[1] == shape[1]:
        padded[:, :, : plain.shape[2]] = plain
        return padded
    inner, wanted = plain.shape[1] // 2, shape[1] // 2
    padded[:, :inner] = plain[:, :inner]
    padded[:, wanted : wanted + inner] = plain[:, inner:]
    return padded


def clear_key_value_cache(vllm_config: Any) -> None:
    """Zeros the worker's key-value cache.

    Attention multiplies what a block has beyond a sequence's end by 0, and 0 · NaN is NaN: what a
    broken candidate wrote there would spoil the answers of every later one.
    """
    for layer in vllm_config.compilation_config.static_forward_context.values():
        caches = getattr(layer, "kv_cache", ())
        for cache in [caches] if isinstance(caches, torch.Tensor) else caches:
            cache.zero_()


def logits_had_nan(output: Any) -> bool:
    """Whether a NaN was among the logits of a `RequestOutput`.

    Known where VLLM_COMPUTE_NANS_IN_LOGITS is set and statistics are on.
    """
    return bool(output.metrics.is_corrupted)


def engine_failures() -> tuple[type[Exception], ...]:
    """What vLLM raises from a call to an engine that failed or is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return (EngineDeadError, EngineGenerateError, RuntimeError, MemoryError)


def while_alive(llm: Any, work: Callable[[], _Result]) -> _Result:
    """The result of `work`, which calls the engine; EngineDiedError once its process is gone.

    A call that is under way when the engine's process is killed never returns. So it waits in a
    thread of its own, while this one looks after the engine. An engine in this process needs none.
    """
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    if resources is None:
        return work()
    future: Future[_Result] = Future()
    Thread(target=_settle, args=(future, work), daemon=True).start()
    while not wait_for([future], timeout=_SECONDS_BETWEEN_LOOKS).done:
        if resources.engine_dead:
            raise EngineDiedError("the process of vLLM's engine is gone")
    return future.result()


def _settle(future: Future[_Result], work: Callable[[], _Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # it is the waiting thread's
        future.set_exception(error)


def end_engine(llm: Any) -> None:
    """Ends the engine of a `vllm.LLM` now, instead of when the object is collected."""
    with contextlib.suppress(Exception):  # it may be dead already
        llm.llm_engine.engine_core.shutdown()
