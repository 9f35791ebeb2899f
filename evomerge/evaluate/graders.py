"""Who grades a suite's answers outside of this process: its judge, where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from evomerge.database import Database
from evomerge.errors import ConfigError
from evomerge.evaluate.judge import open_judge
from evomerge.evaluate.judge_config import JudgeConfig
from evomerge.evaluate.suite import JUDGE, Suite
from evomerge.evaluate.task import Grader


def needs_judge(suite: Suite) -> bool:
    """Whether answers of this suite are graded by a judge."""
    return JUDGE in suite.weights


def check_graders(suite: Suite, judge: JudgeConfig | None) -> None:
    """Raises ConfigError where nobody is named to grade the suite's answers."""
    if needs_judge(suite) and judge is None:
        raise ConfigError(
            "judge: is missing, and the suite's answers are graded by one; name it, as "
            "judge: {model: gpt-4.1, api_key_env: OPENAI_API_KEY}, or a server on this machine, as "
            "judge: {model: NAME, base_url: 'http://127.0.0.1:8000/v1'}, or a model that vLLM "
            "serves here, as judge: {local: MODEL}"
        )


def shares_gpu(suite: Suite, judge: JudgeConfig | None) -> bool:
    """Whether a judge grades on the engine's own GPU, which they take in turns."""
    return judge is not None and needs_judge(suite) and any(one.sleep for one in judge.servers)


@contextmanager
def open_graders(
    suites: Sequence[Suite],
    judge: JudgeConfig | None,
    *,
    open_database: Callable[[], Database],
    payer: str | None,
    folder: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Iterator[Sequence[Mapping[str, Grader]]]:
    """The graders of each suite by scorer, for the block; none where it has scorers alone.

    `Evaluation` takes them; suites share one judge. See `open_judge`, which also says what is
    raised, for the rest.
    """
    for suite in suites:
        check_graders(suite, judge)
    rubrics = [suite.rubric for suite in suites]
    first = next((rubric for rubric in rubrics if rubric is not None), None)
    if judge is None or first is None:
        yield [{} for _ in suites]
        return
    with open_judge(
        judge,
        first,
        open_database=open_database,
        payer=payer,
        folder=folder,
        environment=environment,
        say=say,
    ) as opened:
        yield [{} if rubric is None else {JUDGE: opened.by(rubric)} for rubric in rubrics]
