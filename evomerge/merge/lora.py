"""LoRA adapters, applied once to their base model: the result is an ordinary checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evomerge.errors import ConfigError
from evomerge.merge.architecture import HEAD
from evomerge.merge.checkpoint import Checkpoint, ShardedOutput, read_tensor_file
from evomerge.merge.dtypes import DType
from evomerge.merge.headers import TensorHeader
from evomerge.merge.model_files import ADAPTER_CONFIG
from evomerge.merge.parts import PartTensor, write_tensors
from evomerge.merge.publishing import disk_failure, published

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# As many elements are adapted at a time: the first factor is read anew for each part.
_PART = 1 << 20
_SHARD_BYTES = 5_000_000_000

_PREFIX = "base_model.model."
# The two factors of a module, by the ends of their names: a linear layer's and an embedding's.
_FACTOR_NAME = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?"
)
# Settings of PEFT whose arithmetic is not W + scale·B·A.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "megatron_config",
    "trainable_token_indices",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# These start from a changed base, which the adapter file does not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
)


@dataclass(frozen=True)
class _Factors:
    """The two matrices of one module and what they are multiplied with.

    `a` has shape [rank, in], `b` [out, rank]; `transposed` says that the weight is stored as
    [in, out] (embeddings, fan_in_fan_out).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def delta(self, rows: slice) -> Tensor:
        """scale · B · A in float32: those rows of it, in the weight's own orientation."""
        if self.transposed:
            return (self.a[:, rows].float().T @ self.b.float().T).mul_(self.scale)
        return (self.b[rows].float() @ self.a.float()).mul_(self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class _Adapter:
    """What an adapter changes, by the base's tensor names: deltas, and tensors put in whole."""

    directory: Path
    factors: Mapping[str, _Factors]
    replacements: Mapping[str, Tensor]


def apply_adapter(
    base_dir: Path, adapter_dir: Path, out_dir: Path, dtype: DType | None = None
) -> Path:
    """Writes the model W + scale·B·A to `out_dir`, computed in float32 and rounded once.

    The result has the dtype of the base's tensors, or `dtype`, and all of the base's other files.
    Raises ConfigError where the adapter is of another base or kind, or `out_dir` is taken.
    Source: Hu et al. 2021, arXiv:2106.09685, §4.1; the scale is alpha/r, or alpha/√r for rsLoRA.
    """
    base = Checkpoint.open(base_dir)
    adapter = _read_adapter(adapter_dir)
    _check_against_base(adapter, base)
    tensors = [_adapted(base, header, adapter, dtype) for header in base.tensors.values()]
    with published(out_dir) as unfinished:
        with ShardedOutput(unfinished, tensors, _SHARD_BYTES) as output:
            write_tensors(tensors, output)
        try:
            _copy_other_files(base, unfinished, dtype)
        except OSError as error:
            raise disk_failure(unfinished, error) from error
    return out_dir


def _read_adapter(directory: Path) -> _Adapter:
    config = _read_config(directory)
    weights = directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"{directory}: has no {ADAPTER_WEIGHTS}; only safetensors is read")
    pairs: dict[str, dict[str, Tensor]] = {}
    replacements: dict[str, Tensor] = {}
    for name, tensor in read_tensor_file(weights).items():
        inner = name.removeprefix(_PREFIX)
        if match := _FACTOR_NAME.fullmatch(inner):
            pairs.setdefault(match["module"], {})[match["factor"]] = tensor
        elif "lora_" in inner or not inner.endswith((".weight", ".bias")):
            raise ConfigError(f"{weights}: {name}: this kind of adapter is not supported")
        else:  # modules_to_save: trained whole; base_layer: what an embedding's factors go onto
            replacements[inner.replace(".base_layer.", ".")] = tensor
    factors = {
        f"{module}.weight": _factors(weights, config, module, pair)
        for module, pair in pairs.items()
    }
    if not factors and not replacements:
        raise ConfigError(f"{weights}: has no tensors of an adapter")
    return _Adapter(directory, factors, replacements)


def _read_config(directory: Path) -> dict[str, Any]:
    """The adapter's config; ConfigError where it is no plain LoRA."""
    file = directory / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory}: has no {ADAPTER_CONFIG}, so it is no adapter") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: peft_type should be LORA; other adapters are not supported")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ConfigError(f"{file}: {key}: {config[key]!r} is not supported; plain LoRA is")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{file}: bias: {config['bias']!r} is not supported; none is")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ConfigError(
            f"{file}: init_lora_weights: {start!r} changes the base model; convert the adapter to "
            "plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _factors(
    file: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]
) -> _Factors:
    is_embedding = "lora_embedding_A" in pair
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    if set(pair) != set(names):
        raise ConfigError(f"{file}: {module} should have {names[0]} and {names[1]}")
    a, b = pair[names[0]], pair[names[1]]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ConfigError(
            f"{file}: {module}: factors of shape {list(a.shape)} and {list(b.shape)} are not those "
            "of a linear layer or an embedding"
        )
    rank = a.shape[0]
    alpha = _alpha(file, config, module)
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return _Factors(a, b, scale, is_embedding or bool(config.get("fan_in_fan_out")))


def _alpha(file: Path, config: Mapping[str, Any], module: str) -> float:
    """lora_alpha, or what alpha_pattern says for the modules whose names end as its keys do."""
    where = file.with_name(ADAPTER_CONFIG)
    patterns = config.get("alpha_pattern") or {}
    try:
        matching = [key for key in patterns if re.match(rf"(.*\.)?({key})$", module)]
        key, alpha = "lora_alpha", config.get("lora_alpha")
        if matching:
            key, alpha = f"alpha_pattern: {matching[0]}", patterns[matching[0]]
    except (TypeError, re.error) as error:
        raise ConfigError(
            f"{where}: alpha_pattern: {patterns!r} should map patterns of module names to numbers "
            f"({error})"
        ) from error
    if not isinstance(alpha, int | float):
        raise ConfigError(f"{where}: {key}: {alpha!r} is no number")
    return float(alpha)


def _check_against_base(adapter: _Adapter, base: Checkpoint) -> None:
    """Raises ConfigError where the adapter is not one of `base`, by tensor names and shapes."""
    shapes: list[tuple[str, tuple[int, ...]]] = [
        *((name, tuple(tensor.shape)) for name, tensor in adapter.replacements.items()),
        *((name, factors.shape) for name, factors in adapter.factors.items()),
    ]
    for name, shape in shapes:
        header = base.tensors.get(name)
        if header is None or header.shape != shape:
            has = "has no such tensor" if header is None else f"has {list(header.shape)} there"
            raise ConfigError(
                f"{adapter.directory}: is an adapter of another model than {base.directory}: it "
                f"changes {name} of shape {list(shape)}, but that model {has}"
            )
    architecture = base.architecture
    if architecture.tied and {architecture.embedding, HEAD} & dict(shapes).keys():
        raise ConfigError(
            f"{adapter.directory}: changes the embeddings of {base.directory}, which serve as "
            "input and as output; that is not supported"
        )


def _adapted(
    base: Checkpoint, header: TensorHeader, adapter: _Adapter, dtype: DType | None
) -> PartTensor:
    """A tensor of the base as the adapter changes it; what stays as it is is not checked."""
    factors = adapter.factors.get(header.name)
    replaced = adapter.replacements.get(header.name)
    columns = max(1, header.shape[-1]) if header.shape else 1

    def part(start: int, stop: int) -> Tensor:
        weight = base.read(header.name) if replaced is None else replaced
        numbers = weight.reshape(-1)[start:stop]
        if factors is None:
            return numbers
        delta = factors.delta(slice(start // columns, stop // columns))
        return numbers.float().add_(delta.reshape(-1))

    return PartTensor(
        header.name,
        header.shape,
        dtype or header.dtype,
        part,
        step=columns * max(1, _PART // columns),
        checked=factors is not None or replaced is not None or dtype not in (None, header.dtype),
    )


def _copy_other_files(base: Checkpoint, directory: Path, dtype: DType | None) -> None:
    """Everything of the base but its weights; the config tells a new dtype."""
    for file in sorted(base.directory.iterdir()):
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and not file.name.startswith("."):
            shutil.copyfile(file, directory / file.name)
    if dtype is not None:
        config = {key: value for key, value in base.config.items() if key != "torch_dtype"}
        config["dtype"] = dtype.name
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
