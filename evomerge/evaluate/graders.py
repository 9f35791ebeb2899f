"""Who grades a suite's answers outside of this process: its judge, where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from evomerge.database import Database
from evomerge.errors import ConfigError
from evomerge.evaluate.judge import open_judge
from evomerge.evaluate.judge_config import JudgeConfig, key_of
from evomerge.evaluate.judge_trust import check_trust
from evomerge.evaluate.suite import JUDGE, Suite
from evomerge.evaluate.task import Grader


def needs_judge(suite: Suite) -> bool:
    """Whether answers of this suite are graded by a judge."""
    return JUDGE in suite.weights


def check_graders(
    suite: Suite,
    judge: JudgeConfig | None,
    *,
    trust_code: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Raises ConfigError where the suite's answers cannot be graded, or not by this judge.

    Nobody is named for it; or it would be sent what it is not sent without `trust_code`
    (`judge_trust`); or a key is not in `environment` (None: not looked for).
    """
    if not needs_judge(suite):
        return
    if judge is None:
        raise ConfigError(
            "judge: is missing, and the suite's answers are graded by one; name it, as "
            "judge: {model: gpt-4.1, api_key_env: OPENAI_API_KEY}, or a server on this machine, as "
            "judge: {model: NAME, base_url: 'http://127.0.0.1:8000/v1'}, or a model that vLLM "
            "serves here, as judge: {local: MODEL}"
        )
    if not trust_code:
        check_trust(judge, suite.files)
    if environment is not None:
        for server in judge.servers:
            key_of(server, environment)


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
    trust_code: bool = False,
) -> Iterator[Sequence[Mapping[str, Grader]]]:
    """The graders of each suite by scorer, for the block; none where it has scorers alone.

    `Evaluation` takes them; suites share one judge. Raises what `check_graders` does first; see
    `open_judge`, which also says what else is raised, for the rest.
    """
    for suite in suites:
        check_graders(suite, judge, trust_code=trust_code, environment=environment)
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
