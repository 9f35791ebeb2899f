"""Gates of a mixture of experts, made from prompts that say what each expert is for."""

# Shape letters: L = layers, E = experts, H = hidden size, T = tokens of one prompt

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.engine.tokenizer import Tokenizer
from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint

# The states of some prompts, [L, H] in float32.
States = Callable[[Sequence[list[int]]], Tensor]
# The positive and the negative prompts of one expert.
Prompts = tuple[Sequence[str], Sequence[str]]


def learned_gates(base: Checkpoint, prompts: Sequence[Prompts], mode: str) -> Tensor:
    """One row per expert and layer, unit(state(positive) − state(negative)): float32 [L, E, H].

    The state of some prompts is, by `mode`: "hidden" and "hidden_last", what enters each layer of
    the base at the last token, averaged over the prompts; "hidden_avg", the same averaged over a
    prompt's tokens first; "cheap_embed", the sum of the embeddings of all tokens of all prompts,
    scaled to length 1, the same for all layers. Every prompt goes through the model on its own, so
    no padding enters an average (in mergekit it does). Raises ConfigError where a prompt has no
    tokens or too many, and where an expert's prompts cancel each other.
    """
    tokenizer = Tokenizer(str(base.directory))
    encoded = [
        tuple([_encode(tokenizer, base, text) for text in side] for side in (positive, negative))
        for positive, negative in prompts
    ]
    states = _embedding_states(base) if mode == "cheap_embed" else _hidden_states(base, mode)
    rows = [_row(states, positive, negative) for positive, negative in encoded]
    for number, row in enumerate(rows):
        if not bool(torch.isfinite(row).all()):
            raise ConfigError(
                f"expert {number}: its prompts give no gate: its positive and negative prompts "
                "cancel each other, or the base model's states are not finite"
            )
    return torch.stack(rows, dim=1)


def _row(states: States, positive: list[list[int]], negative: list[list[int]]) -> Tensor:
    """unit(state(positive) − state(negative)) of one expert, [L, H]; NaN where that is 0."""
    state_LH = states(positive)
    if negative:
        state_LH = state_LH - states(negative)
    length_L1: Tensor = state_LH.norm(dim=-1, keepdim=True)
    return state_LH / length_L1


def _encode(tokenizer: Tokenizer, base: Checkpoint, prompt: str) -> list[int]:
    """The prompt's token ids after the tokenizer's bos token, and no other special ones."""
    start = tokenizer.inner.bos_token or ""
    if not tokenizer.encode(prompt, add_special_tokens=False):
        raise ConfigError(f"the prompt {prompt!r} has no tokens in {base.directory}'s tokenizer")
    ids = tokenizer.encode(start + prompt, add_special_tokens=False)
    limit = base.config.get("max_position_embeddings")
    if isinstance(limit, int) and len(ids) > limit:
        raise ConfigError(
            f"the prompt {prompt[:40]!r}… has {len(ids)} tokens, but {base.directory} takes {limit}"
        )
    return ids


def _embedding_states(base: Checkpoint) -> States:
    architecture = base.architecture
    embeddings = base.read(architecture.embedding)

    def states(prompts: Sequence[list[int]]) -> Tensor:
        tokens = [token for ids in prompts for token in ids]
        total: Tensor = embeddings[tokens].float().sum(dim=0)
        length: Tensor = total.norm()
        return (total / length).expand(architecture.num_layers, -1)

    return states


def _hidden_states(base: Checkpoint, mode: str) -> States:
    model = _open(base)

    def states(prompts: Sequence[list[int]]) -> Tensor:
        entering = [_entering(model, ids) for ids in prompts]
        each = [LTH.mean(dim=1) if mode == "hidden_avg" else LTH[:, -1] for LTH in entering]
        mean: Tensor = torch.stack(each).mean(dim=0)
        return mean

    return states


@torch.inference_mode()
def _entering(model: Any, ids: list[int]) -> Tensor:
    """What enters each layer, [L, T, H] in float32."""
    tokens = torch.tensor([ids], device=model.device)
    output = model.base_model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    # The last one leaves the last layer.
    return torch.stack([state[0].float().cpu() for state in output.hidden_states[:-1]])


def _open(base: Checkpoint) -> Any:
    """The base model in its own dtype."""
    from transformers import AutoModelForCausalLM

    embedding = base.architecture.embedding_header
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=embedding.dtype.torch, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers does not load {base.directory}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
