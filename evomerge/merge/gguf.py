"""Checkpoints as GGUF files, llama.cpp's format: tensors renamed, laid out and quantised for it."""

from __future__ import annotations

import fcntl
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import ConfigError, OutputExistsError, nearest
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.gguf_vocabulary import Vocabulary, read_vocabulary
from evomerge.merge.model_files import CONFIG_FILE
from evomerge.merge.publishing import disk_failure

SUFFIX = ".gguf"

# What the gguf package can write; the k-quants and iq-quants need llama.cpp's own quantiser.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_WIDE_TYPES = ("f32", "f16", "bf16")
_BLOCK = 32  # numbers of one row that share a scale in all of the q types
# A 4- or 5-bit output matrix costs more quality than all other tensors together; llama.cpp's own
# quantiser keeps it wider, too (in Q6_K, which only it can write).
_OUTPUT_TYPE = "q8_0"
_LARGEST_F16 = 65504.0

_PIECE = 1 << 22  # numbers that are converted at a time

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<matrix>\w+)\.weight")
_FUSED_EXPERTS = re.compile(r"(?P<stack>.+\.experts)\.(?P<matrix>gate_up_proj|down_proj)")
_SHARED_GATE = ".shared_expert_gate.weight"
_SHARED_DOWN = ".shared_expert.down_proj.weight"
_ROTARY = re.compile(r".*\.self_attn\.(?P<which>[qk])_proj\.(weight|bias)")


@dataclass(frozen=True)
class _Family:
    """How llama.cpp takes a family of models.

    `arch` is its name there; `rotary_pairs`: rotary embeddings turn neighbours instead of halves;
    `norm_shift` is added to the weights of norms; `tied`: it always ties the embeddings; `sliding`:
    every so-manieth layer has full attention, the others a window; `scale_layers`: for this number
    of layers the attention's scale is that of hidden size / heads instead of the head's own;
    `norm_topk`: what it can compute of `norm_topk_prob`, whether the weights of a token's experts
    are scaled to sum to 1; empty where it has no experts. `needs_head`: it knows no tied
    embeddings; `ungated`: its shared experts have no gate.
    """

    arch: str
    rotary_pairs: bool = False
    norm_shift: float = 0.0
    tied: bool = False
    sliding: int = 0
    scale_layers: int = 0
    norm_topk: tuple[bool, ...] = ()
    needs_head: bool = False
    ungated: bool = False


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", rotary_pairs=True),
    "MistralForCausalLM": _Family("llama", rotary_pairs=True),
    "MixtralForCausalLM": _Family("llama", rotary_pairs=True, norm_topk=(True,)),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen2MoeForCausalLM": _Family("qwen2moe", norm_topk=(False,), needs_head=True),
    "Qwen3ForCausalLM": _Family("qwen3"),
    "Qwen3MoeForCausalLM": _Family("qwen3moe", norm_topk=(True,)),
    "GemmaForCausalLM": _Family("gemma", norm_shift=1.0, tied=True),
    "Gemma2ForCausalLM": _Family("gemma2", norm_shift=1.0, tied=True, sliding=2, scale_layers=46),
    "Gemma3ForCausalLM": _Family("gemma3", norm_shift=1.0, sliding=6, scale_layers=62),
}
# Qwen2-MoE whose shared experts have gates of 0, which add half of their answers: what is left of
# the gate is a factor of 1/2 on the way down. (llama.cpp's qwen2moe makes 0/0 of such a gate.)
_UNGATED = _Family(
    "bailingmoe", rotary_pairs=True, norm_topk=(False, True), needs_head=True, ungated=True
)


@dataclass(frozen=True)
class _Output:
    """One tensor of the file: `pieces` gives its numbers in order, whole rows at a time."""

    name: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterator[Tensor]]


def check_gguf_output(out: Path, kind: str, *, overwrite: bool) -> None:
    """Raises ConfigError where `kind` is none of TYPES, or no GGUF file can be written to `out`."""
    if kind not in TYPES:
        raise ConfigError(
            f"--type: {kind!r} is not written here{nearest(kind, TYPES)}; what is written are "
            f"{', '.join(TYPES)} (for k-quants run llama.cpp's llama-quantize on an f16 file)"
        )
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out}: the name of a GGUF file should end in {SUFFIX}")
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise OutputExistsError(f"{out}: exists and is no file; choose another name")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out}: exists already; --overwrite replaces it")
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{out}: writing GGUF files needs one more package: pip install 'evomerge[gguf]'"
        )


def write_gguf(
    directory: Path, out: Path, kind: str, *, overwrite: bool = False, name: str | None = None
) -> tuple[str, ...]:
    """Writes the model in `directory` to the GGUF file `out`; what a user should know of it.

    `kind` is one of TYPES. Norms, biases and routers are f32 in all of them; under the q types, a
    tensor whose rows are no multiple of 32 is f16, and under those of fewer than 8 bits the output
    matrix is q8_0. `name` is the model's, else its folder's. Memory needed: a few million numbers,
    however large the model is. Raises ConfigError where the model is of a family or has a property
    that llama.cpp does not have, or numbers that the type cannot hold; RunError where the disk
    fails. `out` is then as it was.
    """
    check_gguf_output(out, kind, overwrite=overwrite)
    import gguf

    checkpoint = Checkpoint.open(directory)
    family = _family(checkpoint)
    config = _config(checkpoint)
    _check_family(checkpoint, family, config)
    rows = checkpoint.architecture.embedding_header.shape[0]
    vocabulary = read_vocabulary(directory, rows)
    outputs = _outputs(checkpoint, family, config, kind)
    with _published_file(out) as partial_file:
        writer = gguf.GGUFWriter(partial_file, family.arch)
        try:
            _add_description(writer, name or directory.name, kind)
            _add_hyperparameters(writer, family, config, rows)
            _add_vocabulary(writer, vocabulary)
            _write_tensors(writer, outputs)
        finally:
            writer.close()
    return (*vocabulary.notes, *_notes(outputs, kind, config))


def _family(checkpoint: Checkpoint) -> _Family:
    named = checkpoint.config.get("architectures") or ["none"]
    if named[0] not in FAMILIES:
        raise ConfigError(
            f"{checkpoint.directory / CONFIG_FILE}: architectures: {named[0]} cannot be exported "
            f"to GGUF; {', '.join(FAMILIES)} can"
        )
    gates = [name for name in checkpoint.tensors if name.endswith(_SHARED_GATE)]
    zero = [name for name in gates if not torch.count_nonzero(checkpoint.read(name))]
    if zero and zero != gates:
        raise ConfigError(
            f"{checkpoint.directory}: {zero[0]} is 0 and {(set(gates) - set(zero)).pop()} is not; "
            "llama.cpp has no model of both"
        )
    return _UNGATED if zero else FAMILIES[named[0]]


def _config(checkpoint: Checkpoint) -> Any:
    """The model's config with transformers' defaults for what the file does not say."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    except Exception as error:  # whatever its many classes raise on a config that is not theirs
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(f"{checkpoint.directory / CONFIG_FILE}: {reason}") from error


def _check_family(checkpoint: Checkpoint, family: _Family, config: Any) -> None:
    """Raises ConfigError where llama.cpp would compute something else than the model."""
    wrong = [*_wrong_attention(family, config), *_wrong_experts(family, config)]
    if family.tied and not checkpoint.architecture.tied:
        wrong.append("tie_word_embeddings: false: it always ties them")
    if wrong:
        raise ConfigError(
            f"{checkpoint.directory / CONFIG_FILE}: llama.cpp's {family.arch} cannot compute "
            f"this model: {'; '.join(wrong)}"
        )


def _wrong_attention(family: _Family, config: Any) -> Iterator[str]:
    head = _head_size(config)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if family.sliding and scalar is not None:
        is_large = config.num_hidden_layers == family.scale_layers
        right = config.hidden_size // config.num_attention_heads if is_large else head
        if scalar != right:
            yield f"query_pre_attn_scalar: {scalar}: it has {right} for this size"
    if family.sliding and list(config.layer_types) != _layer_types(family, config):
        yield f"layer_types: it has full attention in every {family.sliding}th layer, no others"
    if getattr(config, "partial_rotary_factor", None) not in (None, 1, 1.0):
        yield f"partial_rotary_factor: {config.partial_rotary_factor}: it has 1"
    ropes = {"default", "linear", "yarn", "dynamic"}
    if family.arch == "llama":
        ropes.add("llama3")
    for kind in sorted(_rope_types(config) - ropes):
        yield f"rope_type: {kind}: it has {', '.join(sorted(ropes - {'dynamic'}))}"
    if family.arch == "llama" and config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act: {config.hidden_act}: it has silu"


def _wrong_experts(family: _Family, config: Any) -> Iterator[str]:
    if not family.norm_topk:
        return
    normalised = getattr(config, "norm_topk_prob", family.norm_topk[0])
    # The weights of all experts sum to 1 as they are.
    takes_all = config.num_experts_per_tok == _expert_count(config)
    if normalised not in family.norm_topk and not takes_all:
        yield f"norm_topk_prob: {normalised}: it has {family.norm_topk[0]}"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        yield "mlp_only_layers, decoder_sparse_step: it has experts in every layer"
    if family.ungated and config.shared_expert_intermediate_size % config.moe_intermediate_size:
        yield (
            f"shared_expert_intermediate_size: {config.shared_expert_intermediate_size}: without "
            "gates it has multiples of moe_intermediate_size"
        )


def _layer_types(family: _Family, config: Any) -> list[str]:
    return [
        "full_attention" if (layer + 1) % family.sliding == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary embeddings' settings (rope_type, rope_theta, …) of one kind of layers."""
    found = getattr(config, "rope_parameters", None)
    if found is None:  # transformers 4
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        theta = config.rope_theta
        if layers == "sliding_attention":
            scaling, theta = {}, config.rope_local_base_freq
        found = {"rope_theta": theta, "rope_type": scaling.pop("type", "default"), **scaling}
    return dict(found.get(layers, found))


def _rope_types(config: Any) -> set[str]:
    return {str(_rope(config).get("rope_type", "default"))}


def _outputs(
    checkpoint: Checkpoint, family: _Family, config: Any, kind: str
) -> tuple[_Output, ...]:
    """The file's tensors, in the checkpoint's order; experts are stacked where the first stands."""
    rename = _renamer(checkpoint, family)
    outputs: dict[str, _Output] = {}
    if factors := _rope_factors(config):
        numbers = torch.tensor(factors, dtype=torch.float32)
        outputs["rope_freqs.weight"] = _Output(
            "rope_freqs.weight", tuple(numbers.shape), "f32", lambda: iter([numbers])
        )
    architecture = checkpoint.architecture
    if architecture.others:
        raise ConfigError(
            f"{checkpoint.directory}: has more than a language model "
            f"({', '.join(architecture.others)}), which is not exported to GGUF"
        )
    wanted = {
        *architecture.before,
        *architecture.after,
        *(header.name for layer in architecture.layers for header in layer.values()),
    }
    has_head = family.needs_head or not architecture.tied
    output_matrix = rename(architecture.head if has_head else architecture.embedding)
    for name in checkpoint.tensors:
        if name not in wanted:
            continue
        layouts = _laid_out(checkpoint, name, family, config)
        if name == architecture.embedding and architecture.tied and has_head:
            layouts += [(architecture.head, *layout[1:]) for layout in layouts]
        for stem, shape, pieces in layouts:
            renamed = rename(stem)
            if renamed not in outputs:
                chosen = _tensor_type(renamed, shape, kind, is_output=renamed == output_matrix)
                outputs[renamed] = _Output(renamed, shape, chosen, pieces)
    return tuple(outputs.values())


def _renamer(checkpoint: Checkpoint, family: _Family) -> Callable[[str], str]:
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, checkpoint.architecture.num_layers)

    def rename(name: str) -> str:
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ConfigError(
                f"{checkpoint.directory}: the tensor {name} has no place in llama.cpp's "
                f"{family.arch}"
            )
        return str(renamed)

    return rename


def _tensor_type(name: str, shape: tuple[int, ...], kind: str, *, is_output: bool) -> str:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    if kind in _WIDE_TYPES:
        return kind
    if shape[-1] % _BLOCK:
        return "f16"
    return _OUTPUT_TYPE if is_output else kind


_Layout = tuple[str, tuple[int, ...], Callable[[], Iterator[Tensor]]]


def _laid_out(checkpoint: Checkpoint, name: str, family: _Family, config: Any) -> list[_Layout]:
    """What becomes of one tensor: names (still in the checkpoint's manner), shapes, numbers."""
    shape = checkpoint.tensors[name].shape
    if match := _EXPERT.fullmatch(name):
        return [_stacked(checkpoint, match, config)]
    if match := _FUSED_EXPERTS.fullmatch(name):
        return _split(checkpoint, match, shape)
    if name.endswith(_SHARED_GATE):
        shape = shape[-1:]
        if family.ungated:
            return []
    return [(name, shape, partial(_pieces, checkpoint, name, family, config))]


def _pieces(checkpoint: Checkpoint, name: str, family: _Family, config: Any) -> Iterator[Tensor]:
    """The numbers of a tensor that stays one tensor."""
    tensor = checkpoint.read(name)
    match = _ROTARY.fullmatch(name)
    if match and family.rotary_pairs:
        heads = config.num_attention_heads
        if match["which"] == "k":
            heads = getattr(config, "num_key_value_heads", None) or heads
        return _paired(tensor, heads)
    if name.endswith("norm.weight") and family.norm_shift:
        return _in_pieces(tensor.float() + family.norm_shift)
    if name.endswith(_SHARED_DOWN) and family.ungated:
        return (piece.float() / 2 for piece in _in_pieces(tensor))
    return _in_pieces(tensor)


def _stacked(checkpoint: Checkpoint, match: re.Match[str], config: Any) -> _Layout:
    """One matrix of all experts of a layer, as one tensor [experts, rows, columns]."""
    stack, matrix = match["stack"], match["matrix"]
    count = _expert_count(config)
    names = [f"{stack}.{index}.{matrix}.weight" for index in range(count)]
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing or f"{stack}.{count}.{matrix}.weight" in checkpoint.tensors:
        raise ConfigError(
            f"{checkpoint.directory}: config.json counts {count} experts, but the tensors "
            f"{stack}.*.{matrix} are others"
        )

    def pieces() -> Iterator[Tensor]:
        for name in names:
            yield from _in_pieces(checkpoint.read(name))

    shape = (count, *checkpoint.tensors[names[0]].shape)
    return f"{stack}.{matrix}.weight", shape, pieces


def _split(checkpoint: Checkpoint, match: re.Match[str], shape: tuple[int, ...]) -> list[_Layout]:
    """Fused experts [experts, rows, columns]; those of gate and up have gate's rows first."""
    name, stack = match.string, match["stack"]
    experts, rows, columns = shape

    def pieces(start: int, stop: int) -> Iterator[Tensor]:
        for expert in checkpoint.read(name):
            yield from _in_pieces(expert[start:stop])

    half = rows // 2
    cuts = [("gate_proj", 0, half), ("up_proj", half, rows)]
    if match["matrix"] == "down_proj":
        cuts = [("down_proj", 0, rows)]
    return [
        (f"{stack}.{matrix}.weight", (experts, stop - start, columns), partial(pieces, start, stop))
        for matrix, start, stop in cuts
    ]


def _paired(weight: Tensor, heads: int) -> Iterator[Tensor]:
    """The rows of each head reordered, 0, n/2, 1, n/2 + 1, …: what are halves become neighbours."""
    size = weight.shape[0] // heads
    for start in range(0, weight.shape[0], size):
        head = weight[start : start + size]
        halves = head.reshape(2, size // 2, *weight.shape[1:])
        yield from _in_pieces(halves.transpose(0, 1).reshape(head.shape))


def _in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Whole rows in order, together not much more than _PIECE numbers at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _PIECE // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]


def _rope_factors(config: Any) -> list[float]:
    """What llama.cpp divides the rotary frequencies by, for Llama 3's scaling; empty for others.

    The frequencies of wavelengths over the original context / low_freq_factor are divided by
    `factor`, those under the original context / high_freq_factor by 1, with a ramp between.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return []
    low, high, context = (
        float(rope[key])
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    size = _head_size(config)
    factors = []
    for place in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (place / size)
        ramp = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - ramp) / float(rope["factor"]) + ramp))
    return factors


def _add_description(writer: Any, name: str, kind: str) -> None:
    import gguf

    types = gguf.LlamaFileType
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(types.ALL_F32 if kind == "f32" else types[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_hyperparameters(writer: Any, family: _Family, config: Any, rows: int) -> None:
    head = _head_size(config)
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    writer.add_rope_dimension_count(head)
    _add_rope(writer, config)
    if family.norm_topk:
        _add_experts(writer, family, config)
    if family.sliding:
        writer.add_sliding_window(config.sliding_window)
        for setting in ("attn_logit_softcapping", "final_logit_softcapping"):
            if cap := getattr(config, setting, None):
                getattr(writer, f"add_{setting}")(cap)
    if family.arch == "gemma3":
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention")["rope_theta"])


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope.get("beta_fast"):
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow"):
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _expert_count(config: Any) -> int:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return int(count or 0)


def _add_experts(writer: Any, family: _Family, config: Any) -> None:
    writer.add_expert_count(_expert_count(config))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if size := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(size)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if family.ungated:
        writer.add_expert_shared_count(shared // config.moe_intermediate_size)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(1.0)
        writer.add_leading_dense_block_count(0)
    elif shared:
        writer.add_expert_shared_feed_forward_length(shared)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.words)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.model != "gpt2":
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(vocabulary.removes_spaces)
        if vocabulary.charsmap:
            writer.add_precompiled_charsmap(vocabulary.charsmap)
    if set(vocabulary.templates) == {"default"}:
        writer.add_chat_template(vocabulary.templates["default"])
    elif vocabulary.templates:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in vocabulary.templates.items()]
        )


def _write_tensors(writer: Any, outputs: Sequence[_Output]) -> None:
    import gguf

    for output in outputs:
        writer.add_tensor_info(
            output.name,
            output.shape,
            np.dtype(np.float32),  # of what is not stored so, raw_dtype decides
            _stored_bytes(output),
            raw_dtype=gguf.GGMLQuantizationType[output.type.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in outputs:
        writer.write_tensor_data(_Streamed(output))


@dataclass(frozen=True)
class _Streamed:
    """What GGUFWriter asks of an array, for a tensor that is converted while it is written."""

    output: _Output

    @property
    def nbytes(self) -> int:
        return _stored_bytes(self.output)

    def tofile(self, file: IO[bytes]) -> None:
        for piece in self.output.pieces():
            file.write(_encoded(self.output, piece).data)


def _stored_bytes(output: _Output) -> int:
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[output.type.upper()]]
    return math.prod(output.shape) // int(numbers) * int(size)


def _encoded(output: _Output, piece: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The numbers of `piece` as they are stored, rounded once."""
    if output.type == "f32":
        return np.ascontiguousarray(piece.float().numpy())
    if output.type == "bf16":
        return piece.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    # NaN and infinity fail this, too.
    if piece.numel() and not float(piece.abs().max()) <= _LARGEST_F16:
        raise ConfigError(
            f"{output.name}: has a number that {output.type} cannot hold (none of more than "
            f"{_LARGEST_F16:.0f}, no NaN); --type bf16 and f32 can"
        )
    if output.type == "f16":
        return piece.to(torch.float16).contiguous().numpy()
    import gguf

    kind = gguf.GGMLQuantizationType[output.type.upper()]
    quantised: np.ndarray[Any, np.dtype[Any]] = gguf.quants.quantize(piece.float().numpy(), kind)
    return quantised


def _notes(outputs: Sequence[_Output], kind: str, config: Any) -> tuple[str, ...]:
    notes = []
    if kind not in _WIDE_TYPES:
        wider = [output.name for output in outputs if output.type == "f16"]
        if wider:
            notes.append(
                f"{len(wider)} tensors whose rows are no multiple of {_BLOCK} are f16: "
                f"{', '.join(wider[:3])}{' …' if len(wider) > 3 else ''}"
            )
    window = getattr(config, "sliding_window", None)
    has_window = (
        window and not hasattr(config, "layer_types") and window < (config.max_position_embeddings)
    )
    if has_window and getattr(config, "use_sliding_window", True):
        notes.append(
            f"sliding_window: {window}: llama.cpp attends to the whole context for this family; "
            "answers differ beyond the window"
        )
    if "dynamic" in _rope_types(config):
        notes.append("rope_type: dynamic: llama.cpp does not scale; keep to the original context")
    return tuple(notes)


@contextmanager
def _published_file(out: Path) -> Iterator[Path]:
    """A file to write, which takes the name `out` only when the block ends without an error.

    What a killed writer leaves behind ends in `.partial`; the next writer starts it anew.
    """
    partial_file = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = partial_file.open("ab")
    except OSError as error:
        raise ConfigError(
            f"{partial_file}: cannot be made ({error.strerror}); choose another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{partial_file}: another process is writing it; wait for its end"
            ) from None
        try:
            yield partial_file
            partial_file.rename(out)
        except OSError as error:
            partial_file.unlink(missing_ok=True)
            raise disk_failure(out, error) from error
        except BaseException:
            partial_file.unlink(missing_ok=True)
            raise
