"""The vLLM weight-transfer backend whose message is a recipe; it lives in vLLM's workers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from evomerge.engine.residency import Residency, View, memory_budget
from evomerge.engine.vllm_private import (
    check_vllm_version,
    clear_key_value_cache,
    unpack_cpu_experts,
    unpack_cpu_layers,
)
from evomerge.errors import CandidateError, EvomergeError
from evomerge.merge.blends import Blend
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.kernels import compile_pays, fill_pieces, merge_into, prepare
from evomerge.merge.methods import has_overflow
from evomerge.merge.plan import MergePlan, PlanEntry, make_plan
from evomerge.merge.recall import Statistics
from evomerge.recipe import recipe_from_mapping

MODELS_VARIABLE = "EVOMERGE_MODELS"
_log = logging.getLogger(__name__)


@dataclass
class MergeInitInfo(WeightTransferInitInfo):
    """The sources that the driver means to name; each must have been declared at the start."""

    models: list[str] = field(default_factory=list)


@dataclass
class MergeUpdateInfo(WeightTransferUpdateInfo):
    """A recipe in the form of `Recipe.to_mapping`, and the digest of the plan it must give.

    `clear` has the key-value cache emptied first.
    """

    recipe: dict[str, Any]
    digest: str
    clear: bool = False


@dataclass(frozen=True)
class Destination:
    """Where a part of a checkpoint tensor goes: a view into a live parameter of the same shape."""

    name: str
    part: View
    into: Tensor


class MergeBackend(WeightTransferEngine[MergeInitInfo, MergeUpdateInfo]):
    """Turns the live model into the merge that a recipe describes, in one pass over its parameters.

    Sources are declared where the engine is started, in its `additional_config` under
    {"evomerge": {"models": [...]}} or in the environment variable EVOMERGE_MODELS (separated like
    PATH), never by a message. Made when the model has been loaded, before vLLM compiles it.

    What goes wrong with a message is kept, and told to whoever asks (`__call__`). To raise it would
    break the engine: vLLM's driver takes the first rank's error and leaves the other ranks' replies
    in their queues, where the next call finds them in place of its own.
    """

    init_info_cls = MergeInitInfo
    update_info_cls = MergeUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        check_vllm_version(vllm.__version__)
        if vllm_config.quant_config is not None:
            raise EvomergeError("evomerge merges into unquantised weights; switch quantization off")
        served = str(vllm_config.model_config.model)
        declared = declared_models(vllm_config.additional_config, os.environ)
        on_device, pinned = memory_budget(device, vllm_config.parallel_config.world_size)
        self.sources = Residency.open(
            [served, *declared], device, device_bytes=on_device, pinned_bytes=pinned
        )
        self.statistics = Statistics()
        unpacked = unpack_cpu_layers(model)
        self.experts = unpack_cpu_experts(model)
        self.destinations = trace_loading(model, self.sources.checkpoint(served))
        plain = [weight for experts in self.experts for weight in experts.plain.values()]
        check_filled([*unpacked, *plain], self.destinations)
        self._pack_experts()
        # vLLM sizes its key-value cache by what is left after this.
        self.sources.settle(
            (model, place.name, place.part)
            for place in self.destinations
            for model in self.sources.checkpoints
            if place.name in self.sources.checkpoints[model].tensors
        )
        elements = sum(destination.into.numel() for destination in self.destinations)
        self.compiled = compile_pays(elements, device)
        self.failure: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any] | None:
        """What is wrong with the last message, as `planning.failure_of` reads it; None if nothing.

        vLLM calls the attribute of its workers that a remote call names, and this object is one.
        """
        return self.failure

    def init_transfer_engine(self, init_info: MergeInitInfo) -> None:
        with self._failure_kept():
            for name in init_info.models:
                self.sources.checkpoint(name)

    def start_weight_update(self) -> None:
        """Nothing to prepare: the weights are written in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self._failure_kept():
            super().update_weights(update_info)

    @contextmanager
    def _failure_kept(self) -> Iterator[None]:
        """`failure` is what goes wrong in the block, in place of what went wrong before."""
        self.failure = None
        try:
            yield
        except (CandidateError, MemoryError, torch.OutOfMemoryError) as error:
            # Another method, or other numbers, may need less memory.
            self.failure = _failure(error, of_candidate=True)
        except EvomergeError as error:
            self.failure = _failure(error, of_candidate=False)
        except Exception as error:
            _log.exception("evomerge: a message failed in this worker")
            self.failure = _failure(error, of_candidate=False)

    def finish_weight_update(self) -> None:
        """Nothing to finish: the weights were written in place."""

    def receive_weights(self, update_info: MergeUpdateInfo) -> None:
        recipe = recipe_from_mapping(update_info.recipe, "the recipe in the message")
        for name in recipe.model_names():
            self.sources.checkpoint(name)
        plan = make_plan(recipe, self.sources.checkpoints)
        if plan.digest != update_info.digest:
            raise EvomergeError(
                f"this worker plans {plan.digest}, the driver {update_info.digest}: "
                "a source model changed after the engine started; start again"
            )
        if update_info.clear:
            clear_key_value_cache(self.vllm_config)
        self.apply(plan)

    def apply(self, plan: MergePlan) -> None:
        """Computes every parameter of the plan into its place.

        Raises CandidateError where a result is not finite, EvomergeError where the plan is not one
        for this model; the parameters are then a mixture until the next plan is applied.
        """
        entries = {entry.name: entry for entry in plan.entries}
        missing = {place.name for place in self.destinations} - entries.keys()
        if missing:
            raise EvomergeError(f"the recipe gives no tensor {min(missing)}, which this model has")
        broken = [
            place.name for place in self.destinations if not self._fill(place, entries[place.name])
        ]
        self._pack_experts()
        if broken:
            raise CandidateError(f"{broken[0]} has NaN or infinite values")

    def _pack_experts(self) -> None:
        for experts in self.experts:
            experts.pack()

    def _fill(self, place: Destination, entry: PlanEntry) -> bool:
        """Computes one part into its place; whether all of it is finite."""
        ready = prepare(entry, self._whole(entry), self.statistics.of(entry.inputs))
        if isinstance(ready, Blend):
            return self._blend(place, entry, ready)
        whole = View.whole(entry.shape)
        direct = place.part == whole and place.into.is_contiguous()
        if direct and place.into.dtype == entry.dtype.torch:
            fill_pieces(place.into, ready)
        else:
            out = torch.empty(entry.shape, dtype=entry.dtype.torch, device=self.sources.device)
            fill_pieces(out, ready)
            place.into.copy_(place.part.of(out))
        return not has_overflow(place.into)

    def _whole(self, entry: PlanEntry) -> list[Tensor]:
        """The source tensors of an entry whose method looks at them: whole, on every rank."""
        if entry.numbers is None:
            return []
        view = View.whole(entry.shape)
        return [self.sources.part(source.model, source.name, view) for source in entry.inputs]

    def _blend(self, place: Destination, entry: PlanEntry, blend: Blend) -> bool:
        keys = [(source.model, source.name, place.part) for source in entry.inputs]
        inputs = [self.sources.part(*key) for key in keys]
        rounded = place.into.dtype == entry.dtype.torch
        out = place.into if rounded else torch.empty_like(place.into, dtype=entry.dtype.torch)
        merge_into(out, blend.kernel, inputs, blend.weights, compiled=self.compiled)
        if not rounded:
            place.into.copy_(out)
        # A bound on the result from the inputs' magnitudes, known since the first candidate, spares
        # reading the result again.
        bound = largest_possible(blend, [self.sources.largest(*key) for key in keys])
        return bound < torch.finfo(entry.dtype.torch).max or not has_overflow(out)

    def shutdown(self) -> None:
        """Nothing is held that the process does not give back."""


def _failure(error: Exception, *, of_candidate: bool) -> dict[str, Any]:
    known = isinstance(error, EvomergeError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    return {"message": message, "of_candidate": of_candidate}


def largest_possible(blend: Blend, largest: list[float]) -> float:
    """An upper bound on the magnitude of the merged values, given those of the inputs."""
    if blend.kernel == "task_arithmetic":
        base, tuned = largest[0], largest[1:]
        moved = [abs(w) * (x + base) for w, x in zip(blend.weights, tuned, strict=True)]
        return 1.01 * (base + math.fsum(moved))
    if blend.kernel == "linear":
        return 1.01 * math.fsum(abs(w) * x for w, x in zip(blend.weights, largest, strict=True))
    return max(largest)


def declared_models(additional_config: object, environment: Mapping[str, str]) -> list[str]:
    """The source directories that the engine's owner declared at its start."""
    own = additional_config.get("evomerge") if isinstance(additional_config, Mapping) else None
    names = list((own or {}).get("models", []))
    return names + [name for name in environment.get(MODELS_VARIABLE, "").split(os.pathsep) if name]


def trace_loading(model: Any, checkpoint: Checkpoint) -> list[Destination]:
    """Loads `checkpoint` with the model's own loader and records which part went where.

    So fused projections, tensor-parallel shards, experts and renamings are as vLLM resolves them.
    Raises EvomergeError where a parameter was not filled by plain copies of checkpoint tensors.
    """
    recorder = _CopyRecorder()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            recorder.offer(name, tensor)
            yield name, tensor

    with recorder, torch.no_grad():
        model.load_weights(tensors())
    if recorder.untraced:
        raise EvomergeError(
            f"{type(model).__name__} computes {', '.join(sorted(recorder.untraced)[:3])} while it "
            "loads; such a model cannot be merged live (use `engine: {load: disk}`)"
        )
    return recorder.destinations


def check_filled(weights: Sequence[Tensor], destinations: Sequence[Destination]) -> None:
    """Raises EvomergeError unless `destinations` cover every element of `weights` once."""
    filled: dict[int, int] = {}
    for place in destinations:
        storage = place.into.untyped_storage().data_ptr()
        filled[storage] = filled.get(storage, 0) + place.into.numel()
    for weight in weights:
        found = filled.get(weight.untyped_storage().data_ptr(), 0)
        if found != weight.numel():
            raise EvomergeError(
                f"{found} of {weight.numel()} elements of a weight of shape {list(weight.shape)} "
                "come from the checkpoint; such a model cannot be merged live (use `engine: "
                "{load: disk}`)"
            )


class _CopyRecorder(TorchDispatchMode):
    """Records every copy from an offered tensor, or a view of one, while it is carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.destinations: list[Destination] = []
        self.untraced: set[str] = set()
        self._offered: tuple[str, Tensor] | None = None

    def offer(self, name: str, tensor: Tensor) -> None:
        """Says that the copies from now on come from `tensor`."""
        self._offered = (name, tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._record(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _record(self, into: Tensor, source: Tensor) -> None:
        assert self._offered is not None
        name, tensor = self._offered
        distance = source.data_ptr() - tensor.data_ptr()
        inside = 0 <= distance < tensor.numel() * tensor.element_size()
        if not inside or source.dtype != tensor.dtype or source.shape != into.shape:
            self.untraced.add(name)
            return
        part = View(tuple(source.shape), source.stride(), distance // tensor.element_size())
        self.destinations.append(Destination(name, part, into.detach()))
