"""A mixture of experts whose models are references of any kind, as a model folder with its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from evomerge.engine.gates import learned_gates
from evomerge.engine.tokenizer import Tokenizer
from evomerge.errors import ConfigError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.inputs import InputModels
from evomerge.merge.materialize import refuse_inputs_as_output
from evomerge.merge.moe import MOE_CONFIG_FILE, check_moe, gated_experts, materialize_moe
from evomerge.merge.streaming import Progress
from evomerge.moe_config import MoEConfig
from evomerge.report.card import CardModel

_GATES = {
    "random": "drawn from N(0, 1)",
    "uniform_random": "drawn uniformly from ±1/√(hidden size)",
    "cheap_embed": "made from the embeddings of each expert's prompts",
    "hidden": "made from the base's hidden states at the last token of each expert's prompts",
    "hidden_last": "made from the base's hidden states at the last token of each expert's prompts",
    "hidden_avg": "made from the base's hidden states, averaged over each expert's prompts",
}


def build_moe(
    config: MoEConfig,
    out: Path,
    inputs: InputModels,
    *,
    verbatim: str,
    seed: int = 0,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes the mixture of `config`, whose models are references; `verbatim` is its file.

    `progress` is told of bytes written, `say` what is worth knowing, a sentence each. Raises
    ConfigError before any work where configuration, models or `out` do not allow it.
    """
    names = config.model_names()
    source = config.tokenizer_model
    wanted = (*names, source) if source else names
    named = [path for name in wanted for path in inputs.local_paths(name)]
    refuse_inputs_as_output(out.absolute(), named)
    found, mistakes = inputs.resolve_all(wanted)
    if mistakes:
        raise ConfigError("\n".join(map(str, mistakes.values())))
    resolved = config.with_models({name: str(folder) for name, folder in found.items()})
    folders = list(dict.fromkeys(found[name] for name in names))
    tokenizer = None if source is None else found[source]
    checkpoints = {str(folder): Checkpoint.open(folder) for folder in folders}
    check_moe(resolved, checkpoints)
    if resolved.tokenizer_source == "union":
        _check_union(folders)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, checkpoints[resolved.base_model], say)
    gates = None
    if resolved.has_learned_gates:
        experts = gated_experts(resolved, checkpoints)
        prompts = [(expert.positive_prompts, expert.negative_prompts) for expert in experts]
        say(f"making gates from the prompts of {len(experts)} experts")
        gates = learned_gates(checkpoints[resolved.base_model], prompts, resolved.gate_mode)
    models = {name: CardModel(name, inputs.hub_ids(name)) for name in names}
    texts = {"README.md": moe_card(out.name, config, models, verbatim), MOE_CONFIG_FILE: verbatim}
    return materialize_moe(
        resolved,
        out,
        checkpoints=checkpoints,
        gates=gates,
        seed=seed,
        tokenizer=tokenizer,
        extra_files=texts,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
        say=say,
    )


def moe_card(title: str, config: MoEConfig, models: Mapping[str, CardModel], verbatim: str) -> str:
    """README.md for the mixture of `config`; `verbatim` is the text of its file."""
    experts = "\n".join(f"* {models[expert.source_model].linked()}" for expert in config.experts)
    shared = "\n".join(
        f"* {models[expert.source_model].linked()} (shared: every token goes through it)"
        for expert in config.shared_experts
    )
    parts = [
        _front_matter(models),
        f"# {title}\n",
        "This is a mixture of experts made of dense language models with evomerge. "
        f"Every token goes through {config.experts_per_token} of the experts; attention, norms and "
        f"embeddings are those of {models[config.base_model].linked()}. The gates are "
        f"{_GATES[config.gate_mode]}.\n",
        f"## Experts\n\n{experts}\n" + (f"{shared}\n" if shared else ""),
        f"## Configuration\n\nIn mergekit-moe's format:\n\n```yaml\n{verbatim.rstrip()}\n```\n",
    ]
    return "\n".join(parts)


def _front_matter(models: Mapping[str, CardModel]) -> str:
    hub_ids = list(dict.fromkeys(hub_id for model in models.values() for hub_id in model.hub_ids))
    front: dict[str, object] = {"base_model": hub_ids} if hub_ids else {}
    front |= {"library_name": "transformers", "tags": ["mergekit", "moe", "merge", "evomerge"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _check_union(folders: Sequence[Path]) -> None:
    """Raises ConfigError where other models have tokens that the first one, the base, lacks."""
    known = Tokenizer(str(folders[0])).inner.get_vocab()
    for folder in folders[1:]:
        new = sorted(Tokenizer(str(folder)).inner.get_vocab().keys() - known.keys())
        if new:
            count = "1 token" if len(new) == 1 else f"{len(new)} tokens"
            raise ConfigError(
                f"tokenizer_source: union: {folder} has {count}, such as {new[0]!r}, for which the "
                "base model, whose embeddings a mixture has, has no embedding; write base"
            )


def _check_tokenizer(folder: Path, base: Checkpoint, say: Callable[[str], None]) -> None:
    """Raises ConfigError where a tokenizer has other ids than the base's; tells of other tokens."""
    wanted = Tokenizer(str(folder)).inner.get_vocab()
    known = Tokenizer(str(base.directory)).inner.get_vocab()
    if len(wanted) != len(known):
        raise ConfigError(
            f"tokenizer_source: {folder} has {len(wanted)} tokens, but the base model has "
            f"embeddings for the {len(known)} of its own tokenizer; write base"
        )
    moved = sum(known.get(token) != number for token, number in wanted.items())
    if moved:
        say(
            f"warning: tokenizer_source: {moved} tokens of {folder} have another number in the "
            "base model, whose embeddings the mixture has"
        )
