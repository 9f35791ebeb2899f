"""What fine-tuning did to a model, as a LoRA adapter: the task vector by truncated SVD."""

# Shape letters: O = outputs of a linear layer, I = its inputs, R = rank.

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import ConfigError, OutputExistsError
from evomerge.merge.checkpoint import Checkpoint, ShardedOutput
from evomerge.merge.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from evomerge.merge.headers import TensorHeader
from evomerge.merge.lora import ADAPTER_WEIGHTS
from evomerge.merge.model_files import ADAPTER_CONFIG, SINGLE_FILE
from evomerge.merge.parts import PartTensor, cut, write_tensors
from evomerge.merge.publishing import disk_failure, published

DTYPES = {dtype.name: dtype for dtype in (FLOAT32, BFLOAT16, FLOAT16)}

# Up to this many rows or columns the whole decomposition costs less than a second.
_EXACT_SIZE = 512
# The randomised one looks into this many directions more than are kept, and again at least as many.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 12
# It ends when another power iteration adds less than this share of the task vector's energy.
_GAIN = 1e-5

_PREFIX = "base_model.model."
# What chooses between experts is no linear layer in transformers, and small.
_ROUTER = re.compile(r".*\.(gate|router|shared_expert_gate)\.weight")
_BIAS = re.compile(r"(?P<module>.+)\.bias")
# These layers keep their weights transposed, [I, O].
_TRANSPOSED = ("gpt2",)
# What an adapter cannot carry, and would change the answers of a model that it is put on.
_COMPUTING_KEYS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps"),
    *("hidden_act", "num_attention_heads", "num_experts_per_tok", "sliding_window"),
)


@dataclass(frozen=True)
class Extraction:
    """What an adapter holds of a task vector Δ; energies are sums of squares of its numbers.

    `energy` and `kept` are, by group (the last part of the modules' names), Σσ² of Δ and of the
    factors; `ranks` the rank of each module. `saved` and `lost` name the tensors outside of the
    linear layers that differ, put in whole or left out; `notes` are for the user.
    """

    ranks: Mapping[str, int]
    energy: Mapping[str, float]
    kept: Mapping[str, float]
    saved: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def explained(self) -> dict[str, float]:
        """Σσ² kept / Σσ² of each group, in [0, 1]."""
        return {group: _share(self.kept[group], energy) for group, energy in self.energy.items()}

    @property
    def total(self) -> float:
        """Σσ² kept / Σσ² of all linear layers, in [0, 1]; 1 where none of them differs."""
        return _share(sum(self.kept.values()), sum(self.energy.values()))


@dataclass(frozen=True)
class _Factors:
    """Δ ≈ B·A: `a` [R, I], `b` [O, R], with the energies of Δ and of the product."""

    a: Tensor
    b: Tensor
    energy: float
    kept: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def extract_lora(
    fine_dir: Path,
    base_dir: Path,
    out_dir: Path,
    rank: int,
    *,
    explained: float = 1.0,
    save_others: bool = False,
    dtype: str = "float32",
    base_name: str | None = None,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """Writes the PEFT adapter whose B·A are the best approximations of fine − base to `out_dir`.

    Each linear layer gets the first `rank` singular triples of its difference, computed in float32
    (fewer where they are 0, or where fewer explain the share `explained` of the layer's energy),
    √σ on either side, stored as `dtype` (one of DTYPES). Layers that do not differ get none.
    `save_others` puts what differs outside of them (norms, embeddings, biases) in whole.
    `base_name` is the base's name in the adapter's config; `report` is told modules done and in
    all. Memory needed: the adapter and a few of the model's largest matrices in float32.

    No other adapter of these ranks comes nearer to the fine-tuned weights (Eckart & Young 1936).
    Large matrices are decomposed by a randomised method with power iterations (Halko, Martinsson,
    Tropp 2011, arXiv:0909.4061, §4.5), ended when one adds less than 1e-5 of the energy; what is
    told as explained is exact for the factors written, either way.

    Raises ConfigError where the models have other tensors or do not differ, or `out_dir` is taken.
    """
    check_extraction(out_dir, rank, explained=explained, dtype=dtype, overwrite=overwrite)
    fine, base = Checkpoint.open(fine_dir), Checkpoint.open(base_dir)
    names = _common_tensors(fine, base)
    linear = _linear_layers(base, names)
    differing = [name for name in names if name not in linear and _differs(fine, base, name)]
    whole, lost = _sort_out(base, differing, linear, save_others=save_others)
    wanted = [name for name in linear if name not in whole]
    factors = {
        module: _stored(found, DTYPES[dtype])
        for module, found in _factorised(
            fine, base, wanted, rank=rank, explained=explained, report=report
        )
    }
    if not factors and not whole and not lost:
        raise ConfigError(
            f"{fine_dir}: does not differ from {base_dir}; there is nothing to extract"
        )
    if not factors and not whole:
        raise ConfigError(
            f"{fine_dir}: differs from {base_dir} outside of its linear layers only "
            f"({_some(lost)}), which --save-others puts into the adapter"
        )
    config = _adapter_config(base, factors, whole, base_name or str(base_dir))
    with published(out_dir, overwrite=overwrite) as unfinished:
        _write(unfinished, config, factors, fine=fine, whole=whole, dtype=DTYPES[dtype])
    return _extraction(fine, base, rank, factors, whole=whole, lost=lost)


def check_extraction(
    out_dir: Path, rank: int, *, explained: float, dtype: str, overwrite: bool
) -> None:
    """Raises ConfigError for settings that cannot be, and where `out_dir` is not to be replaced."""
    if rank < 1:
        raise ConfigError(f"--rank: {rank} should be at least 1")
    if not 0 < explained <= 1:
        raise ConfigError(f"--explained: {explained} should be a share above 0 and up to 1")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not overwrite:
            raise OutputExistsError(
                f"{out_dir}: exists and is not empty; choose another name or say --overwrite"
            )
        if not (out_dir / ADAPTER_CONFIG).is_file():
            raise OutputExistsError(
                f"{out_dir}: is not empty and no adapter, so it is not replaced; "
                "choose another name"
            )


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, R], σ [R], V [R, I] with U·diag(σ)·V the best rank-R approximation of `matrix` [O, I].

    `matrix` is float32; R = min(rank, O, I). Exact where one side has at most 512 numbers or the
    rank is a large part of it, else randomised, see extract_lora; deterministic in both cases.
    """
    smaller = min(matrix.shape)
    rank = min(rank, smaller)
    width = 2 * rank + _OVERSAMPLING
    if smaller <= _EXACT_SIZE or width > smaller // 2:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    basis = _range_basis(matrix, rank, width)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def _range_basis(matrix: Tensor, rank: int, width: int) -> Tensor:
    """Orthonormal columns [O, width] whose span holds nearly all that a rank-`rank` one can."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator)
    basis: Tensor = torch.linalg.qr(matrix @ start).Q
    energy = float(matrix.square().sum(dtype=torch.float64))
    held = 0.0
    for _ in range(_POWER_ITERATIONS):
        projected = matrix.T @ basis
        values = torch.linalg.eigvalsh(projected.T @ projected)[-rank:]
        now = float(values.sum(dtype=torch.float64))
        if now - held <= _GAIN * energy:
            break
        held = now
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(projected).Q).Q
    return basis


def _common_tensors(fine: Checkpoint, base: Checkpoint) -> tuple[str, ...]:
    """The parameters of both models; ConfigError where they are not of one architecture."""
    if base.config.get("model_type") in _TRANSPOSED:
        raise ConfigError(
            f"{base.directory}: {base.config['model_type']} stores its layers transposed, which is "
            "not supported"
        )
    ours, theirs = _parameters(fine), _parameters(base)
    for name in [*theirs, *ours]:
        mine, other = ours.get(name), theirs.get(name)
        if mine is None or other is None or mine.shape != other.shape:
            raise ConfigError(
                f"{fine.directory}: is no fine-tuned {base.directory}: {name} is {_told(mine)} in "
                f"the first and {_told(other)} in the second"
            )
    return tuple(theirs)


def _parameters(checkpoint: Checkpoint) -> dict[str, TensorHeader]:
    architecture = checkpoint.architecture
    headers = [
        *architecture.before.values(),
        *(header for layer in architecture.layers for header in layer.values()),
        *architecture.after.values(),
        *(header for other in architecture.others.values() for header in other.tensors.values()),
    ]
    return {header.name: header for header in headers}


def _told(header: TensorHeader | None) -> str:
    return "missing" if header is None else f"of shape {list(header.shape)}"


def _linear_layers(base: Checkpoint, names: Sequence[str]) -> tuple[str, ...]:
    """The matrices that a LoRA can be put on: those of the layers but routers, and the head."""
    architecture = base.architecture
    inside = {header.name for layer in architecture.layers for header in layer.values()}
    if not architecture.tied:
        inside.add(architecture.head)
    return tuple(
        name
        for name in names
        if name in inside
        and name.endswith(".weight")
        and len(base.tensors[name].shape) == 2
        and not _ROUTER.fullmatch(name)
    )


def _differs(fine: Checkpoint, base: Checkpoint, name: str) -> bool:
    ours, theirs = fine.read(name), base.read(name)
    if ours.dtype != theirs.dtype:
        ours, theirs = ours.float(), theirs.float()
    return not torch.equal(ours, theirs)


def _sort_out(
    base: Checkpoint, differing: Sequence[str], linear: Sequence[str], *, save_others: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the tensors outside of linear layers that differ: what is put in whole, and what is lost.

    A bias goes in with the weight of its layer: PEFT replaces modules, not tensors. Embeddings that
    serve as output, too, and tensors that belong to no module by PEFT's names cannot be put in.
    """
    architecture = base.architecture
    whole: list[str] = []
    lost: list[str] = []
    for name in differing:
        is_tied = architecture.tied and name == architecture.embedding
        if not save_others or is_tied or not name.endswith((".weight", ".bias")):
            lost.append(name)
            continue
        whole.append(name)
        weight = f"{match['module']}.weight" if (match := _BIAS.fullmatch(name)) else name
        if weight in linear:
            whole.append(weight)
    return tuple(dict.fromkeys(whole)), tuple(lost)


def _factorised(
    fine: Checkpoint,
    base: Checkpoint,
    names: Sequence[str],
    *,
    rank: int,
    explained: float,
    report: Callable[[int, int], None],
) -> Iterator[tuple[str, _Factors]]:
    """The factors of each module that differs, one after the other."""
    for done, name in enumerate(names):
        report(done, len(names))
        if not _differs(fine, base, name):
            continue
        delta = fine.read(name).float() - base.read(name)  # in float32; the base is not copied
        if not torch.isfinite(delta).all():
            raise ConfigError(f"{name}: the difference of the models has NaN or infinite numbers")
        yield name.removesuffix(".weight"), _factors(delta, rank, explained)
    report(len(names), len(names))


def _factors(delta: Tensor, rank: int, explained: float) -> _Factors:
    left, values, right = truncated_svd(delta, rank)
    energy = float(delta.square().sum(dtype=torch.float64))
    kept = values.square().cumsum(0, dtype=torch.float64)
    # Of what rounding alone makes of a 0, numpy's and torch's matrix_rank keep nothing, either.
    noise = float(values[0]) * max(delta.shape) * torch.finfo(torch.float32).eps
    count = max(1, int(torch.count_nonzero(values > noise)))
    if explained < 1:  # the whole energy, too, may seem to be reached early, by rounding
        count = min(count, int(torch.count_nonzero(kept < explained * energy)) + 1)
    root = values[:count].sqrt()
    return _Factors(
        a=root[:, None] * right[:count],
        b=left[:, :count] * root,
        energy=energy,
        kept=min(energy, float(kept[count - 1])),
    )


def _stored(factors: _Factors, dtype: DType) -> _Factors:
    a, b = factors.a.to(dtype.torch).contiguous(), factors.b.to(dtype.torch).contiguous()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigError(f"--dtype: {dtype} cannot hold the factors; use float32 or bfloat16")
    return _Factors(a, b, factors.energy, factors.kept)


def _adapter_config(
    base: Checkpoint, factors: Mapping[str, _Factors], whole: Sequence[str], base_name: str
) -> dict[str, Any]:
    """PEFT's config; alpha is each module's rank, so that the scale is 1."""
    highest = max((found.rank for found in factors.values()), default=1)
    lower = {module: found.rank for module, found in factors.items() if found.rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": _targets(base, factors),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(base: Checkpoint, factors: Mapping[str, _Factors]) -> list[str]:
    """The modules by the last parts of their names where all modules so called are meant."""
    named: dict[str, set[str]] = defaultdict(set)
    for name in base.tensors:
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            named[_group(module)].add(module)
    targets: list[str] = []
    for group in dict.fromkeys(map(_group, factors)):
        meant = [module for module in factors if _group(module) == group]
        targets += [group] if named[group] == set(meant) else meant
    return targets


def _group(module: str) -> str:
    return module.rpartition(".")[2]


def _write(
    directory: Path,
    config: Mapping[str, Any],
    factors: Mapping[str, _Factors],
    *,
    fine: Checkpoint,
    whole: Sequence[str],
    dtype: DType,
) -> None:
    made = [
        (f"{_PREFIX}{module}.{factor}.weight", dtype, tensor)
        for module, found in factors.items()
        for factor, tensor in (("lora_A", found.a), ("lora_B", found.b))
    ]
    made += [(f"{_PREFIX}{name}", fine.tensors[name].dtype, fine.read(name)) for name in whole]
    tensors = [
        PartTensor(
            name, tuple(numbers.shape), kind, partial(cut, numbers.reshape(-1)), checked=False
        )
        for name, kind, numbers in made
    ]
    with ShardedOutput(directory, tensors, max_shard_size=1 << 62) as output:
        write_tensors(tensors, output)
    try:
        (directory / SINGLE_FILE).rename(directory / ADAPTER_WEIGHTS)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_failure(directory, error) from error


def _extraction(
    fine: Checkpoint,
    base: Checkpoint,
    rank: int,
    factors: Mapping[str, _Factors],
    *,
    whole: tuple[str, ...],
    lost: tuple[str, ...],
) -> Extraction:
    energy: dict[str, float] = defaultdict(float)
    kept: dict[str, float] = defaultdict(float)
    for module, found in factors.items():
        energy[_group(module)] += found.energy
        kept[_group(module)] += found.kept
    return Extraction(
        ranks={module: found.rank for module, found in factors.items()},
        energy=dict(energy),
        kept=dict(kept),
        saved=whole,
        lost=lost,
        notes=tuple(_notes(fine, base, rank, factors, lost)),
    )


def _notes(
    fine: Checkpoint,
    base: Checkpoint,
    rank: int,
    factors: Mapping[str, _Factors],
    lost: Sequence[str],
) -> Iterator[str]:
    clipped = [module for module in factors if min(base.tensors[f"{module}.weight"].shape) < rank]
    if clipped:
        yield (
            f"rank {rank} is more than {len(clipped)} modules have rows or columns "
            f"({_some(clipped)}); they get what they have"
        )
    if lost:
        yield (
            f"{len(lost)} tensors outside of linear layers differ and are not in the adapter "
            f"({_some(lost)}); --save-others puts in norms, biases, routers, untied embeddings"
        )
    for key in _COMPUTING_KEYS:
        if fine.config.get(key) != base.config.get(key):
            yield (
                f"{key} is {fine.config.get(key)!r} in {fine.directory.name}, but "
                f"{base.config.get(key)!r} in {base.directory.name}, whose value stays"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
