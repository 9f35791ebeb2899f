"""Mixtures of experts from dense models: Mixtral, Qwen2-MoE and Qwen3-MoE directories.

Attention, norms and embeddings are the base model's; the MLPs of the experts stand side by side in
every layer, and a gate (one row per expert) says which of them a token goes through:
y = Σₑ pₑ · MLPₑ(x) over the k largest of p = softmax(gate · x), scaled to sum 1 (Jiang et al. 2024,
arXiv:2401.04088, §2.1). Weights are stored expert by expert under the names that the first models
of each kind have on the hub: transformers, vLLM and GGUF converters all read those.
"""

# Shape letters: L = layers, E = experts, S = shared experts, H = hidden size

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint, ShardedOutput
from evomerge.merge.dtypes import MERGED, DType
from evomerge.merge.headers import TensorHeader
from evomerge.merge.materialize import (
    as_json,
    generation_config,
    refuse_inputs_as_output,
    require_space,
)
from evomerge.merge.model_files import CONFIG_FILE, GENERATION_FILE, require_tokenizer
from evomerge.merge.moe_kinds import (
    BIASES,
    DENSE_KEYS,
    DENSE_NAMES,
    MIXTRAL,
    MLP,
    NORMS_AND_ATTENTION,
    PROJECTIONS,
    QWEN2_MOE,
    QWEN3_MOE,
    STACK,
    Kind,
    Layout,
    choose_kind,
    layout_of,
    model_type,
    with_defaults,
)
from evomerge.merge.parts import BLOCK, Part, PartTensor, cut, write_tensors
from evomerge.merge.publishing import disk_failure, published, refuse_existing
from evomerge.merge.streaming import Progress
from evomerge.merge.tokenizer import write_tokenizer
from evomerge.moe_config import Expert, MoEConfig

MOE_CONFIG_FILE = "mergekit_moe_config.yml"
# Above it the gates of a layer are so alike that some expert is hardly ever chosen (mergekit's).
LARGEST_CONDITION = 5.0


@dataclass(frozen=True)
class MoEPlan:
    """All output tensors from input to output, and the content of config.json.

    `notes` are sentences about what differs from the base or from mergekit, for the user.
    """

    tensors: tuple[PartTensor, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def materialize_moe(
    config: MoEConfig,
    directory: Path,
    *,
    checkpoints: Mapping[str, Checkpoint],
    gates: Tensor | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes the mixture of `config` to `directory`, which appears only when it is whole.

    `checkpoints` are its models by name; `gates` as for `plan_moe`; `tokenizer` is the folder of
    another tokenizer than the base's; `workers` and `progress` are those of `write_tensors`. Memory
    needed is some megabytes. Raises ConfigError before any work where configuration, models, disk
    or directory do not allow it; CandidateError where an output number is NaN or infinite.
    """
    directory = directory.absolute()
    refuse_existing(directory, overwrite=overwrite)
    plan = plan_moe(config, checkpoints, gates=gates, seed=seed)
    for note in plan.notes:
        say(note)
    base = checkpoints[config.base_model].directory
    tokenizer = tokenizer or base
    inputs = [checkpoint.directory for checkpoint in checkpoints.values()]
    refuse_inputs_as_output(directory, [*inputs, tokenizer])
    require_tokenizer(tokenizer)
    require_space(directory, plan.tensors)
    with published(directory, overwrite=overwrite) as partial:
        with ShardedOutput(partial, plan.tensors, max_shard_size) as output:
            write_tensors(plan.tensors, output, workers=workers, progress=progress)
        try:
            write_tokenizer(partial, tokenizer, None, None)
            texts = {
                CONFIG_FILE: as_json(plan.config),
                GENERATION_FILE: generation_config(base, plan.config),
                **(extra_files or {}),
            }
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_failure(partial, error) from error
    return directory


def plan_moe(
    config: MoEConfig,
    checkpoints: Mapping[str, Checkpoint],
    *,
    gates: Tensor | None = None,
    seed: int = 0,
) -> MoEPlan:
    """What `config` makes of `checkpoints`, from headers alone.

    `gates` (float32, [L, E + S, H]) are gates that somebody made from prompts; without them they
    are drawn as gate_mode says, from `seed` and the tensor's name: the same on every run. Raises
    ConfigError where configuration and models do not fit together.
    """
    assert (gates is not None) == config.has_learned_gates
    builder = _checked(config, checkpoints, gates, seed)
    kind, layout = builder.kind, builder.layout
    notes = [*_window_notes(builder), *_kind_notes(kind, layout)]
    if gates is not None:
        notes += _gate_notes(gates[:, : len(config.experts)])
    return MoEPlan(tuple(builder.tensors()), builder.config(), tuple(notes))


def check_moe(config: MoEConfig, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raises ConfigError where configuration and models do not fit together."""
    _checked(config, checkpoints)


def gated_experts(config: MoEConfig, checkpoints: Mapping[str, Checkpoint]) -> tuple[Expert, ...]:
    """The experts that need a row of the gates, in the rows' order: shared ones last, if at all."""
    kind = choose_kind(config, checkpoints)
    return (*config.experts, *(config.shared_experts if kind.gates_shared else ()))


def _checked(
    config: MoEConfig,
    checkpoints: Mapping[str, Checkpoint],
    gates: Tensor | None = None,
    seed: int = 0,
) -> _Builder:
    kind = choose_kind(config, checkpoints)
    builder = _Builder(config, checkpoints, layout_of(kind, config), kind, gates, seed)
    builder.check()
    return builder


@dataclass(frozen=True)
class _Builder:
    """One mixture on its way from configuration to tensors."""

    moe: MoEConfig
    checkpoints: Mapping[str, Checkpoint]
    layout: Layout
    kind: Kind
    gates: Tensor | None
    seed: int

    @property
    def base(self) -> Checkpoint:
        return self.checkpoints[self.moe.base_model]

    @property
    def dtype(self) -> DType:
        """That of the configuration, else of the base's config, else of its embeddings."""
        named = self.moe.dtype or self.base.config.get("dtype", self.base.config.get("torch_dtype"))
        for dtype in MERGED:
            if dtype.name == str(named).removeprefix("torch."):
                return dtype
        return self.base.architecture.embedding_header.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one expert's projections, which every layer of every expert has."""
        return {name: self.base.architecture.layers[0][name].shape for name in sorted(MLP)}

    def check(self) -> None:
        """Raises ConfigError where a model has tensors or shapes that the output cannot hold."""
        _check_base(self.moe.base_model, self.base, self.layout)  # it is where shapes come from
        for name in self.moe.model_names():
            _check_expert(name, self.checkpoints[name], self.moe.base_model, self.base, self.shapes)
        if self.layout is QWEN2_MOE:
            _check_head_size(self.moe.base_model, self.base)

    def tensors(self) -> Iterator[PartTensor]:
        """The output tensors from input to output."""
        architecture = self.base.architecture
        yield from map(self._copy, architecture.before.values())
        for index in range(architecture.num_layers):
            yield from self._layer(index)
        yield from map(self._copy, architecture.after.values())

    def _layer(self, index: int) -> Iterator[PartTensor]:
        layer = self.base.architecture.layers[index]
        yield from (self._copy(header) for rest, header in layer.items() if rest not in MLP)
        if self.layout is QWEN2_MOE:  # vLLM and llama.cpp expect them of every model of this class
            yield from self._zero_biases(layer)
        block = f"{STACK}.{index}.{self.layout.block}"
        count = len(self.moe.experts)
        yield self._gate(f"{block}.gate.weight", index, slice(0, count))
        for number, expert in enumerate(self.moe.experts):
            yield from self._expert(f"{block}.experts.{number}", self.layout.names, expert, index)
        for expert in self.moe.shared_experts:
            name = f"{block}.shared_expert_gate.weight"
            if self.kind.gates_shared:
                yield self._gate(name, index, slice(count, count + 1))
            else:
                yield PartTensor(name, (1, self._hidden), self.dtype, _zeros)
            yield from self._expert(
                f"{block}.shared_expert",
                DENSE_NAMES,
                expert,
                index,
                factor=1.0 if self.kind.gates_shared else 2.0,
            )

    @property
    def _hidden(self) -> int:
        return self.shapes["mlp.gate_proj.weight"][1]

    def _copy(self, header: TensorHeader) -> PartTensor:
        part = partial(_read_part, self.base, header.name)
        return PartTensor(header.name, header.shape, self.dtype, part)

    def _zero_biases(self, layer: Mapping[str, TensorHeader]) -> Iterator[PartTensor]:
        for rest in sorted(BIASES - layer.keys()):
            weight = layer[rest.replace("bias", "weight")]
            name = weight.name.replace(".weight", ".bias")
            yield PartTensor(name, (weight.shape[0],), self.dtype, _zeros)

    def _gate(self, name: str, layer: int, rows: slice) -> PartTensor:
        shape = (rows.stop - rows.start, self._hidden)
        if self.gates is not None:
            given = self.gates[layer, rows]
            assert tuple(given.shape) == shape, "gates of another model"
        else:
            given = random_gate(self.moe.gate_mode, name, shape, self.seed)
        return PartTensor(name, shape, self.dtype, partial(cut, given.reshape(-1)))

    def _expert(
        self,
        prefix: str,
        names: Mapping[str, str],
        expert: Expert,
        layer: int,
        factor: float = 1.0,
    ) -> Iterator[PartTensor]:
        checkpoint = self.checkpoints[expert.source_model]
        for projection in PROJECTIONS:
            header = checkpoint.architecture.layers[layer][f"mlp.{projection}.weight"]
            name = f"{prefix}.{names[projection]}.weight"
            scale = 1.0
            if projection == "down_proj":
                scale = factor * (1.0 if expert.residual_scale is None else expert.residual_scale)
            part = partial(
                expert_part,
                partial(_read_part, checkpoint, header.name),
                noise_scale=expert.noise_scale or 0.0,
                scale=scale,
                name=name,
                seed=self.seed,
            )
            yield PartTensor(name, header.shape, self.dtype, part)

    def config(self) -> dict[str, Any]:
        """The content of config.json: the base's, as the output's class has it."""
        given = with_defaults(self.base)
        config = {key: value for key, value in given.items() if key not in DENSE_KEYS}
        config |= {
            "architectures": [self.layout.model_class],
            "model_type": self.layout.model_type,
            "dtype": self.dtype.name,
            "tie_word_embeddings": self.base.architecture.tied,
            "vocab_size": self.base.architecture.embedding_header.shape[0],
            "hidden_size": self._hidden,
            "intermediate_size": self.shapes["mlp.gate_proj.weight"][0],
            self.layout.count_key: len(self.moe.experts),
            "num_experts_per_tok": self.moe.experts_per_token,
            "output_router_logits": False,
        }
        config.pop("torch_dtype", None)
        if self.layout is MIXTRAL:
            return config | {"sliding_window": given.get("sliding_window")}
        config |= {
            "moe_intermediate_size": config["intermediate_size"],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": None,
        }
        if self.layout is QWEN3_MOE:
            return config | {"attention_bias": bool(given.get("attention_bias", False))}
        config.pop("head_dim", None)  # checked to be what the class computes itself
        return config | {
            "shared_expert_intermediate_size": config["intermediate_size"],
            "qkv_bias": True,
        }


def _read_part(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    return checkpoint.read(name).reshape(-1)[start:stop]


def _zeros(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start)


def expert_part(
    read: Part, start: int, stop: int, *, noise_scale: float, scale: float, name: str, seed: int
) -> Tensor:
    """scale · (weight + N(0, noise_scale²)) in float32; the weight itself where nothing changes.

    The noise is drawn from `seed`, the output's `name` and the block that begins at `start`.
    """
    weight = read(start, stop)
    if noise_scale == 0.0 and scale == 1.0:
        return weight
    out = weight.float()
    if noise_scale:
        generator = _generator(f"{name} {start // BLOCK}", seed)
        noise = generator.standard_normal(stop - start, dtype=np.float32)
        out = out + noise_scale * torch.from_numpy(noise)
    return out * scale


def random_gate(mode: str, name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Rows drawn from `seed` and the tensor's `name`, in float32.

    "random" is N(0, 1); "uniform_random" is U(−1/√H, 1/√H), as torch initialises a linear layer.
    """
    generator = _generator(name, seed)
    if mode == "random":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    assert mode == "uniform_random", mode
    limit = shape[1] ** -0.5
    return torch.from_numpy(generator.uniform(-limit, limit, shape).astype(np.float32))


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def gate_conditions(gates: Tensor) -> list[float]:
    """Each layer's condition number, of gates [L, E, H]; infinite where rows depend on each other.

    1 is the best: the gates are orthogonal and of one length.
    """
    return [float(torch.linalg.cond(layer.float())) for layer in gates]


def _gate_notes(gates: Tensor) -> list[str]:
    """A warning where the gates of layers are nearly dependent."""
    numbers = gate_conditions(gates)
    alike = [layer for layer, number in enumerate(numbers) if not number <= LARGEST_CONDITION]
    if not alike:
        return []
    where = "all layers" if len(alike) == len(numbers) else f"layers {', '.join(map(str, alike))}"
    return [
        f"warning: the gates of {where} are nearly dependent (condition number up to "
        f"{max(numbers):.1f}): some expert will hardly be chosen; let the prompts differ more"
    ]


def _window_notes(builder: _Builder) -> Iterable[str]:
    config = with_defaults(builder.base)
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", model_type(builder.base) == "mistral")
    if builder.layout is not MIXTRAL and window and used:
        yield (
            f"warning: {builder.moe.base_model} attends to the last {window} tokens, the mixture "
            "to all: a Qwen mixture has no such window"
        )


def _kind_notes(kind: Kind, layout: Layout) -> Iterable[str]:
    if kind.name != "deepseek moe":
        return
    if layout is MIXTRAL:
        yield "deepseek moe without a shared expert computes what mixtral does: written as mixtral"
    else:
        yield (
            "deepseek moe is written as Qwen2-MoE, whose shared gate of 0 and doubled shared down "
            "projection compute the same"
        )


def _check_base(name: str, base: Checkpoint, layout: Layout) -> None:
    architecture = base.architecture
    if architecture.stack != STACK:
        raise ConfigError(f"{name}: its layers are called {architecture.stack}, not {STACK}")
    needed = NORMS_AND_ATTENTION | MLP
    for index, layer in enumerate(architecture.layers):
        for rest in sorted(layer.keys() - layout.attention - MLP):
            raise ConfigError(
                f"{name}: has {layer[rest].name}, for which {layout.model_class} has no place"
            )
        for rest in sorted(needed - layer.keys()):
            raise ConfigError(f"{name}: {STACK}.{index}.{rest} is missing")
    types = base.config.get("layer_types")
    if isinstance(types, list) and any(kind != types[0] for kind in types):
        raise ConfigError(f"{name}: layer_types: a mixture has the same attention in all layers")


def _check_expert(
    name: str,
    checkpoint: Checkpoint,
    base_name: str,
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises ConfigError where a model's MLPs do not fit beside the base's."""
    count, expected = checkpoint.architecture.num_layers, base.architecture.num_layers
    if count != expected:
        raise ConfigError(f"{name}: has {count} layers, but {base_name} has {expected}")
    for index, layer in enumerate(checkpoint.architecture.layers):
        mlp = {rest: header.shape for rest, header in layer.items() if rest.startswith("mlp.")}
        for rest in sorted(mlp.keys() ^ shapes.keys()):
            says = "is missing" if rest in shapes else "has no place in a mixture"
            raise ConfigError(f"{name}: {STACK}.{index}.{rest} {says}")
        for rest, shape in shapes.items():
            if mlp[rest] != shape:
                raise ConfigError(
                    f"{name}: {STACK}.{index}.{rest} has shape {list(mlp[rest])}, but "
                    f"{list(shape)} in {base_name}"
                )
    ours, theirs = (with_defaults(model).get("hidden_act") for model in (base, checkpoint))
    if ours != theirs:
        raise ConfigError(f"{name}: hidden_act is {theirs}, but {ours} in {base_name}")


def _check_head_size(name: str, base: Checkpoint) -> None:
    config = with_defaults(base)
    heads = config["num_attention_heads"]
    hidden = base.architecture.embedding_header.shape[1]
    size = config.get("head_dim", hidden // heads)
    if size != hidden // heads:
        raise ConfigError(
            f"{name}: head_dim {size}: Qwen2-MoE has heads of hidden_size / num_attention_heads = "
            f"{hidden // heads} numbers"
        )
