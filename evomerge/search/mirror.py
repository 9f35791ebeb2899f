"""The told candidates as an Optuna study, for optuna-dashboard and plots; Optuna's importances.

Write-only: nothing of the search is ever read back from it. It follows from the log; what is
behind it (after a kill, or a deleted file) is written anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal import JournalFileBackend

Grades = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class MirroredTrial:
    """A told candidate: its genes as decoded (clipped) and as drawn, and how it ended.

    `score` is what candidates may be compared by. `reason` says why it failed, or, where it was
    `stopped` before the end of its tasks, why that was.
    """

    number: int
    label: str
    generation: int
    clipped: Sequence[float]
    genome: Sequence[float]
    score: float | None
    reason: str | None
    stopped: bool = False


@dataclass(frozen=True)
class MirroredSpace:
    """The names of the genes and their bounds."""

    genes: Sequence[str]
    low: Sequence[float]
    high: Sequence[float]


class Mirror:
    """Writes trials to the journal `path` in a thread of its own, out of the search's way.

    `read_grades` gives task grades by candidate label. A mirror that cannot be written is said
    once and given up: the search does not need it.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        space: MirroredSpace,
        read_grades: Callable[[Sequence[str]], Grades],
        say: Callable[[str], None],
    ) -> None:
        self._path = path
        self._name = name
        self._space = space
        self._read_grades = read_grades
        self._say = say
        self._study: optuna.Study | None = None
        self._given_up = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")

    @contextmanager
    def running(self) -> Iterator[Mirror]:
        """The mirror at work; all that was handed in is written when the block ends."""
        try:
            yield self
        finally:
            self._thread.shutdown(wait=True)

    def catch_up(self, number: int, told: Callable[[], Sequence[MirroredTrial]]) -> None:
        """Makes the journal hold exactly what was told before: `number` trials.

        `told` gives them, in the mirror's thread, where the journal does not hold them all.
        """
        self._thread.submit(self._guarded, lambda: self._catch_up(number, told))

    def add(self, trials: Sequence[MirroredTrial]) -> None:
        """Adds a generation that was told just now."""
        self._thread.submit(self._guarded, lambda: self._write(trials))

    def _guarded(self, write: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            write()
        # Whatever goes wrong in here is no reason to stop a search that may have cost days.
        except Exception as error:
            self._given_up = True
            self._say(f"{self._path}: the mirror for Optuna is given up: {error}")

    def _catch_up(self, number: int, told: Callable[[], Sequence[MirroredTrial]]) -> None:
        if self._is_whole() and self._holds() == number:
            return
        fresh = self._path.with_name(self._path.name + ".partial")
        fresh.unlink(missing_ok=True)
        self._study = _open_study(fresh, self._name)
        self._write(told())
        fresh.replace(self._path)
        self._study = _open_study(self._path, self._name)

    def _holds(self) -> int | None:
        """The number of trials in the journal; None where Optuna cannot read it."""
        try:
            self._study = _open_study(self._path, self._name)
            return len(self._study.get_trials(deepcopy=False))
        # Whatever Optuna makes of a file that is no journal, or not of this study.
        except Exception:
            return None

    def _is_whole(self) -> bool:
        """Whether there is a journal, its last line written to the end."""
        # Left by a killed process of this study, which nobody else writes.
        with suppress(OSError):
            Path(f"{self._path}.lock").unlink()
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"
        return False

    def _write(self, trials: Sequence[MirroredTrial]) -> None:
        assert self._study is not None
        grades = self._read_grades([trial.label for trial in trials])
        for trial in trials:
            self._study.add_trial(self._frozen(trial, grades.get(trial.label, {})))

    def _frozen(
        self, trial: MirroredTrial, grades: Mapping[str, float | None]
    ) -> optuna.trial.FrozenTrial:
        from optuna.distributions import FloatDistribution
        from optuna.trial import create_trial

        space = self._space
        attributes: dict[str, Any] = {
            "number": trial.number,
            "generation": trial.generation,
            "genome": list(trial.genome),
            "grades": dict(grades),
        }
        if trial.reason is not None:
            attributes["reason"] = trial.reason
        return create_trial(
            state=_state(trial),
            value=trial.score,
            params=dict(zip(space.genes, trial.clipped, strict=True)),
            distributions={
                gene: FloatDistribution(low, high)
                for gene, low, high in zip(space.genes, space.low, space.high, strict=True)
            },
            user_attrs=attributes,
        )


def _state(trial: MirroredTrial) -> optuna.trial.TrialState:
    """Failed ones have no value; stopped ones have one that plots and importances leave out."""
    from optuna.trial import TrialState

    if trial.score is None:
        return TrialState.FAIL
    return TrialState.PRUNED if trial.stopped else TrialState.COMPLETE


def _open_study(path: Path, name: str) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage

    # Else it prints a line of its own for each study that it makes.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=name,
        storage=JournalStorage(_backend(path)),
        direction="maximize",
        load_if_exists=True,
    )


def _backend(path: Path) -> JournalFileBackend:
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    # An open lock, not the default link: file systems without symbolic links are common enough.
    return JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))


def importances(
    places: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], share: float
) -> npt.NDArray[np.float64]:
    """How much each column of `places` (n, genes) matters to be among the best `share`.

    Of every row of `scores` (k, n), by Optuna's PED-ANOVA, not normalised: shape (k, genes). Each
    column must vary.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The range that was drawn from, not the bounds: on a grid over bounds that are far away all
    # candidates are in one cell.
    distributions = {
        str(gene): FloatDistribution(float(column.min()), float(column.max()))
        for gene, column in enumerate(places.T)
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                value=0.0,
                params=dict(zip(distributions, map(float, place), strict=True)),
                distributions=dict(distributions),
            )
            for place in places
        ]
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    found = np.empty((len(scores), len(distributions)))
    with warnings.catch_warnings():
        # That a target is to be low, hence the minus, and that `normalize` is new.
        warnings.simplefilter("ignore")
        for index, row in enumerate(scores):
            by_gene = get_param_importances(
                study, evaluator=evaluator, target=_minus(row), normalize=False
            )
            found[index] = [by_gene[gene] for gene in distributions]
    return found


def _minus(scores: npt.NDArray[np.float64]) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: -float(scores[trial.number])
