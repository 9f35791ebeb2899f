"""What a study leaves: the model of its winner or of any trial, and its report."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.merge.inputs import InputModels
from evomerge.merge.materialize import RECIPE_FILE, materialize, refuse_inputs_as_output
from evomerge.recipe import Recipe
from evomerge.report.card import CardModel, model_card
from evomerge.report.certainty import certainty_lines, certainty_markdown
from evomerge.report.plots import COURSE_CHARTS, LAYERS_CHARTS, plot_study
from evomerge.report.status import REPORT_FILE, which
from evomerge.report.table import (
    Row,
    held_out_words,
    outcome_markdown,
    outcome_rows,
    score_text,
    task_counts,
)
from evomerge.search.log import begun_with
from evomerge.search.status import BEST_FILE, study_status, trial_recipe
from evomerge.search.storage import held, open_log, write_whole
from evomerge.search.study import study_directory
from evomerge.search.timing import overhead_share

MODEL_FOLDER = "model"

_KINDS = {
    "engine": "starting the engine",
    "switch": "switching candidates",
    "generate": "generation",
    "score": "scoring",
    "ask": "proposing and learning",
    "log": "logging",
    "other": "everything else",
}


@dataclass(frozen=True)
class Results:
    """What a finished study leaves: its files, and what a terminal shows of them."""

    config: Path
    model: Path
    report: Path
    rows: list[Row]
    tasks: tuple[int, int]
    held_out: str
    seconds: Mapping[str, float]
    certainty: list[str]
    charts: tuple[Path, ...]


def export_model(
    storage: Path,
    name: str,
    out: Path,
    number: int | None = None,
    *,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the model of a study's trial (None: the winner, else the best) to the folder `out`."""
    recipe = trial_recipe(storage, name, number)
    begun = _begun(storage, name)
    models = _known_models(storage, begun)
    # What the study names, too: an applied adapter and its model lie in another folder.
    inputs = InputModels(storage, Path(begun["folder"]))
    named = [path for model in models.values() for path in inputs.local_paths(model.written)]
    refuse_inputs_as_output(out.absolute(), named)
    card = model_card(title or out.name, recipe, models, _origin(storage, name, number))
    return materialize(recipe, out, extra_files={"README.md": card}, overwrite=overwrite)


def write_results(storage: Path, name: str, say: Callable[[str], None]) -> Results:
    """Writes the winner's model, charts and the report of a finished study into its folder.

    What is there and still true is left as it is; `say` is told what takes its time. Raises
    ConfigError where the study is not finished or another process is at work on it.
    """
    with held(study_directory(storage, name)):
        return _write_results(storage, name, say)


def _write_results(storage: Path, name: str, say: Callable[[str], None]) -> Results:
    status, begun = study_status(storage, name), _begun(storage, name)
    if status["outcome"] is None:
        raise ConfigError(f"study {name} is not finished: evomerge resume {name} finishes it")
    directory = study_directory(storage, name).absolute()
    recipe = trial_recipe(storage, name)
    model = directory / MODEL_FOLDER
    if not _is_model_of(model, recipe):
        say(f"writing the winner's model to {model}")
        export_model(storage, name, model, title=name, overwrite=True)
    results = Results(
        config=directory / BEST_FILE,
        model=model,
        report=directory / REPORT_FILE,
        rows=outcome_rows(status),
        tasks=task_counts(status),
        held_out=held_out_words(status),
        seconds=status["seconds"],
        certainty=certainty_lines(status["outcome"]),
        charts=_plot(storage, name, say),
    )
    write_whole(results.report, _report(status, begun, results))
    return results


def _plot(storage: Path, name: str, say: Callable[[str], None]) -> tuple[Path, ...]:
    """The study's charts; none where they cannot be drawn, which is said."""
    try:
        return tuple(plot_study(storage, name, say))
    except ConfigError as error:
        say(f"no charts: {error}")
        return ()


def time_split(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(what, seconds, share of all) for everything that a search spent its time on."""
    total = sum(seconds.values()) or 1.0
    return [
        (words, seconds[kind], seconds[kind] / total)
        for kind, words in _KINDS.items()
        if kind in seconds
    ]


def _begun(storage: Path, name: str) -> Mapping[str, Any]:
    """What the study was when it began: its file's content, its models' folders, its tasks."""
    log = open_log(storage, name)
    if log is None:
        raise ConfigError(f"{storage}: there is no study {name}")
    with contextlib.closing(log):
        return begun_with(log)


def _known_models(storage: Path, begun: Mapping[str, Any]) -> dict[str, CardModel]:
    """The models of a study by folder, as its file names them."""
    study, space = begun["study"], begun["space"]
    inputs = InputModels(storage, Path(begun["folder"]))
    folders = (space["base_model"], *space["models"])
    written = (study["base_model"], *study["models"])
    return {
        folder: CardModel(name, inputs.hub_ids(name))
        for folder, name in zip(folders, written, strict=True)
    }


def _origin(storage: Path, name: str, number: int | None) -> str:
    status = study_status(storage, name)
    trial = "the winner" if number is None else f"trial {number}"
    origin = f"It is {trial} of an evolutionary search over {len(status['trials'])} candidates"
    outcome = status["outcome"]
    if number is not None or outcome is None:
        return f"{origin} (study `{name}`)."
    scores = (
        f"mean grade {score_text(outcome['search']['evolved'])} on the tasks it was searched on"
    )
    if outcome["holdout"] is not None:
        scores += f", {score_text(outcome['holdout']['evolved'])} on held-out tasks"
    return " ".join([f"{origin} (study `{name}`): {scores}.", *certainty_lines(outcome)])


def _is_model_of(model: Path, recipe: Recipe) -> bool:
    """Whether the folder `model`, which exists only whole, was made from `recipe`."""
    made_from = model / RECIPE_FILE
    return made_from.is_file() and made_from.read_text(encoding="utf-8") == recipe.to_yaml()


def _report(status: Mapping[str, Any], begun: Mapping[str, Any], results: Results) -> str:
    parts = [
        f"# Study {status['study']}\n",
        _summary(status, begun),
        "## Scores\n\nMean grade; higher is better.\n",
        outcome_markdown(results.rows, results.tasks, results.held_out),
        _caution(results.tasks),
        certainty_markdown(status["outcome"]),
        *_pictures(results.charts),
        *_judges(status),
        *_gates(status),
        "## Where the time went\n",
        _time_table(results.seconds),
        "## How to repeat it\n",
        _how_to_repeat(status, begun),
        "## Files\n",
        f"- `{BEST_FILE}`: the winner's recipe, a mergekit configuration\n"
        f"- `{MODEL_FOLDER}/`: its model\n"
        f"{_chart_files(results.charts)}"
        "- `study.yaml`: what was asked, with versions and seeds\n"
        "- `optuna.journal`: every trial, for optuna-dashboard\n",
    ]
    return "\n".join(parts)


def _summary(status: Mapping[str, Any], begun: Mapping[str, Any]) -> str:
    study = begun["study"]
    models = ", ".join(f"`{name}`" for name in study["models"])
    space = study["genome"] if study.get("genome") else study["search_space"]
    best = status["best"]
    failed = sum(trial["state"] == "failed" for trial in status["trials"])
    lines = [
        f"{space['merge_method']} of {models} over `{study['base_model']}`, "
        f"{len(status['trials'])} trials ({failed} failed) in generations of "
        f"{begun['population']}, seed {study['sampler']['seed']}.",
        f"Answers came from {begun['fingerprint']['engine.name']} in {begun['space']['dtype']} and "
        f"were graded {_graded(study['suite'])}.",
        f"The winner is {which(best['source'], best['number'])}.",
    ]
    return "\n".join(lines) + "\n"


def _graded(suite: str | Mapping[str, Any]) -> str:
    """How the answers of a study's suite are graded, to stand behind "were graded"."""
    if isinstance(suite, str):
        return f"as `{suite}` says"
    if suite.get("harness"):
        return "by lm-evaluation-harness"
    scorer = suite.get("scorer")
    if scorer is None:
        return f"as `{suite['like']}` says"
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    return "by " + " and ".join(f"`{name}`" for name in names)


def _caution(tasks: tuple[int, int]) -> str:
    if tasks[1]:
        return (
            "The winner was searched and chosen on the search tasks, so its score there may "
            "flatter it; the held-out tasks had no say in the search.\n"
        )
    return (
        "The winner was searched, chosen and is shown on the same tasks: its score flatters it. "
        "`holdout: 0.3` in the study file keeps tasks apart.\n"
    )


def _pictures(charts: Sequence[Path]) -> list[str]:
    """The section with the charts; nothing where there are none."""
    course, layers = COURSE_CHARTS[0], LAYERS_CHARTS[0]
    words = {
        course: "The scores of all candidates in their order, and what they are held against",
        layers: "The numbers of the winner's recipe over the layers",
    }
    shown = [f"![{words[one.name]}]({one.name})\n" for one in charts if one.name in words]
    return ["## Course\n", *shown] if shown else []


def _chart_files(charts: Sequence[Path]) -> str:
    names = ", ".join(f"`{one.name}`" for one in charts)
    return f"- {names}: the pictures\n" if names else ""


def _judges(status: Mapping[str, Any]) -> list[str]:
    """Who graded, and what that took; nothing where no judge was asked."""
    rows = [
        f"| {judge['judge']} ({judge['host']}) | {judge['calls']} | {judge['prompt_tokens']} | "
        f"{judge['completion_tokens']} | "
        f"{'–' if judge['cost'] is None else format(judge['cost'], '.2f')} |"
        for judge in status["judges"]
    ]
    if not rows:
        return []
    heading = "| judge | calls | prompt tokens | reply tokens | cost |\n|---|---:|---:|---:|---:|"
    note = "\nReplies that other studies had paid for already were taken from the ledger.\n"
    return ["## Judges\n", heading, *rows, note]


def _gates(status: Mapping[str, Any]) -> list[str]:
    """How many answers were wrong on their face: of all, and of the winner."""
    gates = status["gates"]
    winners = gates["best"]
    rows = [
        f"| {gate} | {number} of {gates['answers']} | "
        f"{winners['closed'].get(gate, 0)} of {winners['answers']} |"
        for gate, number in gates["closed"].items()
    ]
    if not rows:
        return []
    return [
        "## Answers that are wrong on their face\n",
        "| gate | all answers | the winner's |\n|---|---:|---:|",
        *rows,
        "\nlanguage: not in Japanese where that is asked for; repetition: a loop; length: cut, or "
        "above 4000 characters; empty: no words. They change a grade only by `gates:` of the "
        "suite.\n",
    ]


def _time_table(seconds: Mapping[str, float]) -> str:
    rows = [
        f"| {words} | {spent:.1f} | {share:.1%} |" for words, spent, share in time_split(seconds)
    ]
    rest = (
        "\nEverything that is not switching, generation or scoring: "
        f"{overhead_share(seconds):.1%} of the time after the engine's start."
    )
    return "\n".join(["| what | seconds | share |", "|---|---:|---:|", *rows, rest]) + "\n"


def _how_to_repeat(status: Mapping[str, Any], begun: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in begun["versions"].items())
    trials = status["budget"]["trials"]
    total = "" if trials is None else f" --trials {trials}"
    return (
        f"With the file that the study came from ({shlex.quote(begun['folder'])}), in an empty "
        f"storage:\n\n    evomerge search FILE --seed {begun['study']['sampler']['seed']}"
        f"{total}\n\nVersions: {versions}.\n"
    )
