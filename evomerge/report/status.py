"""What `evomerge status` shows: a line for each study, or some lines on one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.report.table import score_text
from evomerge.search.status import Source

REPORT_FILE = "report.md"

# Of candidates that are no trials.
_SOURCES: dict[Source, str] = {
    "mean": "a mean of the distribution that candidates were drawn from",
    "peak": "the peak of a Gaussian process over all candidates",
    "model": "one of the models, as it is",
    "uniform": "a uniform merge",
    "warm start": "one of the merges that the search was given to start from",
}


def which(source: Source, number: int | None) -> str:
    """A candidate by where it comes from: "trial 17", or words for one that is no trial."""
    return f"trial {number}" if source == "trial" else _SOURCES[source]


def studies_text(studies: Sequence[Mapping[str, Any]]) -> str:
    """A line for each study of `list_studies`, the columns below each other."""
    width = max((len(study["study"]) for study in studies), default=0)
    return "\n".join(_study_line(study, width) for study in studies) or "no studies yet"


def _study_line(study: Mapping[str, Any], width: int) -> str:
    name_and_state = f"{study['study']:<{width}}  {study['state']:<11}"
    if study["state"] == "unreadable":
        return f"{name_and_state}  {study['reason'].splitlines()[0]}"
    return f"{name_and_state}  {study['trials']:>5} trials  best {score_text(study['best'])}"


def status_text(found: Mapping[str, Any]) -> str:
    """One study by its `study_status`; the outcome of a finished one is a table of its own."""
    best = found["best"]
    lines = [
        f"study   {found['study']}: {found['state']}",
        f"trials  {len(found['trials'])}{_of_budget(found['budget'])}{_rest(found)}",
        f"best    {score_text(best and best['score'])}",
    ]
    if found["stopped"]:
        lines.insert(1, f"stopped {found['stopped']}")
    if best:
        lines[-1] += f" on search tasks ({which(best['source'], best['number'])})"
        lines.append(f"recipe  {best['config']}")
        report = Path(best["config"]).with_name(REPORT_FILE)
        if found["state"] == "finished" and report.is_file():
            lines.append(f"report  {report}")
    for judge in found["judges"]:
        tokens = judge["prompt_tokens"] + judge["completion_tokens"]
        cost = "" if judge["cost"] is None else f", cost {judge['cost']:.2f}"
        lines.append(f"judge   {judge['judge']}: {judge['calls']} calls, {tokens} tokens{cost}")
    return "\n".join(lines)


def _of_budget(budget: Mapping[str, Any]) -> str:
    if budget["trials"] is not None:
        return f" of {budget['trials']}"
    return f" ({budget['spent']} of {budget['task_evaluations']} task evaluations)"


def _rest(found: Mapping[str, Any]) -> str:
    """Why a study ended below its budget, where that was too little for another generation."""
    budget, generation = found["budget"], found["budget"]["population"] or 0
    left = (budget["trials"] or 0) - len(found["trials"])
    if found["state"] != "finished" or found["stopped"] or not 0 < left < generation:
        return ""
    return f" (the other {left} are no whole generation of {generation})"
