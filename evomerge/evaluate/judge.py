"""The judge: language models that grade answers by a rubric, while the engine goes on."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from evomerge.database import Database
from evomerge.errors import ConfigError, RunError
from evomerge.evaluate.judge_client import Account, JudgeClient, RefusedError, Reply
from evomerge.evaluate.judge_config import JudgeConfig, JudgeServer, key_of
from evomerge.evaluate.judge_reply import read_verdict
from evomerge.evaluate.local_judge import Served, Sleeper, served
from evomerge.evaluate.loop_thread import LoopThread
from evomerge.evaluate.replies import Asked, Given, Replies
from evomerge.evaluate.rubric import Rubric
from evomerge.evaluate.task import GradeRequest, ScorerGrade, UngradedError, Usage

__all__ = ["Judge", "Rubric", "Seat", "open_judge"]

# How often one run asks about an answer before it is left without a grade.
_TRIES = 3
_UNSCORED_SHARE = 0.02
# What calls in flight get to arrive, and be kept, when the run ends before them.
_GRACE_SECONDS = 3.0
_SHOWN_OF_A_REPLY = 200
_ENDED = "the run ended before all was graded"


@dataclass(frozen=True, eq=False)
class Seat:
    """A judge of the panel: `server` as it can be reached, `identity` what decides its grades.

    `ended` is as that of `local_judge.Served`.
    """

    name: str
    server: JudgeServer
    key: str | None
    identity: Mapping[str, Any]
    ended: Callable[[], str | None] | None = None


@dataclass(frozen=True)
class _Opinion:
    """One grading of one answer; `usage` None where it was known already.

    `cut`: the reply ends at its most tokens.
    """

    grade: float | None
    reply: str = ""
    usage: Usage | None = None
    refused: str | None = None
    cut: bool = False

    def for_free(self) -> _Opinion:
        """The opinion, for those who do not pay for it."""
        return replace(self, usage=None)


@dataclass(frozen=True)
class _Question:
    seat: Seat
    asked: Asked


@dataclass(frozen=True)
class _Begun:
    """What has become of a unit's questions so far, by key; `others` began some of the calls."""

    known: dict[str, _Opinion] = field(default_factory=dict)
    calls: dict[str, asyncio.Task[_Opinion]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Answer:
    """An answer with its place in its unit, and what is asked about it, or why nothing can be."""

    place: int
    item: GradeRequest
    questions: Sequence[_Question] = ()
    fault: str | None = None


class _Unit:
    """The answers of a unit on their way to the judge (`evaluate.task.GradingUnit`).

    `answer` makes one of its place and its request; `grade` grades what comes out of a queue, until
    None.
    """

    def __init__(
        self,
        thread: LoopThread,
        answer: Callable[[int, GradeRequest], _Answer],
        grade: Callable[[_Queue], Coroutine[Any, Any, list[ScorerGrade]]],
    ) -> None:
        self._thread = thread
        self._answer = answer
        self._queue: _Queue = asyncio.Queue()
        self.future = thread.submit(grade(self._queue))

    def add(self, place: int, item: GradeRequest) -> None:
        self._thread.call(self._queue.put_nowait, self._answer(place, item))

    def end(self) -> None:
        self._thread.call(self._queue.put_nowait, None)


_Queue: TypeAlias = "asyncio.Queue[_Answer | None]"


class Judge:
    """Grades answers by a panel of language models (`evaluate.task.Grader`).

    Every reply is in the database as soon as it is there, and none with a grade is ever asked for
    again; where all had none, another `Judge` (the next run's) asks anew. Of an answer graded
    several times the grade is the mean over the judges of their means; without a grade of one of
    them it has none.
    """

    name = "judge"

    def __init__(
        self,
        config: JudgeConfig,
        rubric: Rubric,
        seats: Sequence[Seat],
        replies: Replies,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config = config
        self._say = say
        self._seats = seats  # in the order of config.servers
        self._replies = replies
        self._go_by(rubric)
        self._sleepers = [Sleeper(seat.server.base_url) for seat in seats if seat.server.sleep]
        self.needs_gpu = bool(self._sleepers)
        self._clients: dict[Seat, JudgeClient] = {}
        self._calls: dict[str, asyncio.Task[_Opinion]] = {}
        # What was asked about here as often as it may be, and has no grade.
        self._given_up: dict[str, _Opinion] = {}
        self._thread = LoopThread()
        # SQLite has one writer at a time: waiting for it must not hold up the network.
        self._writer = ThreadPoolExecutor(max_workers=1)

    def by(self, rubric: Rubric) -> Judge:
        """The same judge, with its connections and limits, grading by another rubric.

        It ends with the one that it was made of.
        """
        other = copy.copy(self)
        other._go_by(rubric)
        return other

    def _go_by(self, rubric: Rubric) -> None:
        self._rubric = rubric
        self._has_graded = False
        self.low, self.high = float(rubric.low), float(rubric.high)

    def grade_all(self, items: Sequence[GradeRequest]) -> Future[list[ScorerGrade]]:
        """A grade per item, in their order; see `evaluate.task.Grader`.

        The future raises UngradedError where more than 2 % of the answers, and more than one, have
        no grade; RunError where the judge cannot be reached or a limit of its cost is reached. No
        call that was paid is lost by either.
        """
        answers = [self._answer(place, item) for place, item in enumerate(items)]
        if not self._sleepers or self._all_known(answers):
            return self._thread.submit(self._grade_all(answers))
        with ExitStack() as asleep_again:
            self._check_served()
            for sleeper in self._sleepers:
                sleeper.wake()
                asleep_again.callback(sleeper.sleep)
            future = self._thread.submit(self._grade_all(answers))
            wait([future])
        return future

    @contextmanager
    def unit(self) -> Iterator[_Unit]:
        """See `evaluate.task.Grader`; grades and errors are those of `grade_all`."""
        assert not self._sleepers
        unit = _Unit(self._thread, self._answer, self._grade_queue)
        try:
            yield unit
        except BaseException:
            unit.future.cancel()
            raise
        unit.end()

    def _check_served(self) -> None:
        """Raises RunError where a server of ours has ended."""
        for seat in self._seats:
            if seat.ended is not None and (how := seat.ended()) is not None:
                raise RunError(how)

    def _all_known(self, answers: Sequence[_Answer]) -> bool:
        keys = {each.asked.key for one in answers for each in one.questions}
        return self._replies.look_up(list(keys)).keys() | self._given_up.keys() >= keys

    def stop(self) -> None:
        """See `evaluate.task.Grader`: calls in flight get some seconds to arrive."""
        if self._thread.has_begun:
            self._thread.submit(self._wind_up()).result()

    def close(self) -> None:
        """Lets calls in flight arrive for some seconds, then ends all."""
        self.stop()
        if self._thread.has_begun:
            self._thread.submit(self._disconnect()).result()
        self._thread.close()
        self._writer.shutdown()
        self._replies.close()

    def _answer(self, place: int, item: GradeRequest) -> _Answer:
        try:
            return _Answer(place, item, self._questions(item))
        except ConfigError as error:
            # The rubric was filled for every task before the run: this is the answer's doing.
            return _Answer(place, item, fault=str(error))

    def _questions(self, item: GradeRequest) -> list[_Question]:
        """Every grading that one answer gets; none where it is empty and that has its grade."""
        if self._rubric.empty is not None and not item.answer.strip():
            return []
        prompt = self._rubric.question(item)
        panel = self._config.panel(item.attempt)
        places = map(self._config.servers.index, (self._config.first, *panel.others))
        return [
            self._question(self._seats[place], item, prompt, grading)
            for place in places
            for grading in range(panel.gradings)
        ]

    def _question(self, seat: Seat, item: GradeRequest, prompt: str, grading: int) -> _Question:
        parts = [seat.identity, self._rubric.schema, prompt, item.attempt, grading]
        text = json.dumps(parts, sort_keys=True)
        asked = Asked(
            key=hashlib.sha256(text.encode()).hexdigest(),
            judge=seat.name,
            host=seat.server.host,
            settings=seat.identity,
            task=item.task.id,
            attempt=item.attempt,
            grading=grading,
            prompt=prompt,
        )
        return _Question(seat, asked)

    async def _grade_all(self, answers: Sequence[_Answer]) -> list[ScorerGrade]:
        begun = _Begun()
        self._begin([each for one in answers for each in one.questions], begun)
        return await self._graded(answers, begun)

    async def _grade_queue(self, queue: _Queue) -> list[ScorerGrade]:
        begun = _Begun()
        answers: list[_Answer] = []
        while (answer := await queue.get()) is not None:
            self._begin(answer.questions, begun)
            answers.append(answer)
        return await self._graded(sorted(answers, key=lambda one: one.place), begun)

    async def _graded(self, answers: Sequence[_Answer], begun: _Begun) -> list[ScorerGrade]:
        """A grade per answer, once all that was begun is there."""
        opinions = await self._opinions(begun)
        graded = []
        for one in answers:
            pairs = [(each, opinions[each.asked.key]) for each in one.questions]
            graded.append(self._grade(one, pairs))
            # Equal answers are one call, which is paid for once.
            opinions |= {each.asked.key: opinion.for_free() for each, opinion in pairs}
        faults = [one.fault for one in answers if one.fault is not None]
        self._refuse_too_many_unscored(graded, list(opinions.values()), faults)
        return graded

    def _begin(self, questions: Sequence[_Question], begun: _Begun) -> None:
        """Asks what is neither known nor asked already, and notes all of it in `begun`.

        No coroutine: every call is in `_calls` before another can look, so no two make the same.
        """
        by_key = {
            question.asked.key: question
            for question in questions
            if question.asked.key not in begun.known and question.asked.key not in begun.calls
        }
        known = self._replies.look_up([key for key in by_key if key not in self._calls])
        for key, question in by_key.items():
            if key in known:
                begun.known[key] = _Opinion(known[key].grade, known[key].reply)
            elif key in self._given_up:
                begun.known[key] = self._given_up[key].for_free()
            elif key in self._calls:  # begun, and paid for, by somebody else
                begun.others.add(key)
                begun.calls[key] = self._calls[key]
            else:
                begun.calls[key] = self._begin_call(question)

    async def _opinions(self, begun: _Begun) -> dict[str, _Opinion]:
        """key -> opinion: those that are known, then those that are asked for."""
        calls = begun.calls
        if calls:
            # All of them, whatever becomes of some: what is paid for is to be kept.
            await asyncio.wait(calls.values())
            for call in calls.values():
                if call.cancelled():
                    raise RunError(_ENDED)
                if (error := call.exception()) is not None:
                    raise error
        given = {key: call.result() for key, call in calls.items()}
        return begun.known | {
            key: opinion.for_free() if key in begun.others else opinion
            for key, opinion in given.items()
        }

    def _begin_call(self, question: _Question) -> asyncio.Task[_Opinion]:
        key = question.asked.key
        call = asyncio.create_task(self._ask(question))
        self._calls[key] = call

        def done(_: asyncio.Task[_Opinion]) -> None:
            self._calls.pop(key, None)
            if not call.cancelled():
                call.exception()  # nobody may be left who asks for it: a unit was given up

        call.add_done_callback(done)
        return call

    async def _ask(self, question: _Question) -> _Opinion:
        """Asks until a reply has a grade, as often as that may take."""
        rubric, client = self._rubric, self._client(question.seat)
        usage = Usage(0, 0)
        for number in range(_TRIES):
            prompt = question.asked.prompt
            if number:
                # At temperature 0 the same words would get the same reply.
                prompt += (
                    f"\n\nEnd your reply with the grade: a whole number from {rubric.low} to "
                    f"{rubric.high}. Be brief."
                )
            try:
                reply = await client.ask(prompt, rubric.schema)
            except RefusedError as error:
                return _Opinion(None, f"[{error}]", refused=str(error))
            given = self._given(reply)
            await asyncio.get_running_loop().run_in_executor(
                self._writer, self._replies.add, question.asked, given
            )
            usage = _sum(usage, reply)
            opinion = _Opinion(given.grade, reply.text, usage, cut=reply.finish_reason == "length")
            if given.grade is not None:
                return opinion
        self._given_up[question.asked.key] = opinion
        return opinion

    def _given(self, reply: Reply) -> Given:
        # What was cut may have ended in a number that is no grade.
        whole = reply.finish_reason not in ("length", "content_filter")
        verdict = read_verdict(reply.text, self._rubric.low, self._rubric.high) if whole else None
        return Given(
            reply=reply.text,
            finish_reason=reply.finish_reason,
            grade=verdict.grade if verdict else None,
            reason=verdict.reason if verdict else "",
            seconds=reply.seconds,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            cost=reply.cost,
        )

    def _grade(self, one: _Answer, opinions: Sequence[tuple[_Question, _Opinion]]) -> ScorerGrade:
        turn = len(one.item.earlier)
        if one.fault is not None:
            return ScorerGrade(self.name, None, f"[not asked: {one.fault}]", turn=turn)
        if not opinions:
            return ScorerGrade(self.name, self._rubric.empty, turn=turn)
        by_judge: dict[Seat, list[float]] = {}
        for question, opinion in opinions:
            grades = by_judge.setdefault(question.seat, [])
            grades += [opinion.grade] if opinion.grade is not None else []
        return ScorerGrade(
            scorer=self.name,
            grade=_mean([_mean(grades) for grades in by_judge.values()]),
            reply=_all_replies(opinions),
            usage=_all_usage([opinion.usage for _, opinion in opinions]),
            turn=turn,
        )

    def _refuse_too_many_unscored(
        self, graded: Sequence[ScorerGrade], opinions: Sequence[_Opinion], faults: Sequence[str]
    ) -> None:
        """Raises UngradedError where the score would rest on too few answers.

        RunError where the judge took no question at all, or has never given a grade: that is no
        matter of one candidate.
        """
        self._has_graded |= any(opinion.grade is not None for opinion in opinions)
        refused = [opinion.refused for opinion in opinions if opinion.refused is not None]
        if len(refused) > 1 and len(refused) == len(opinions):
            raise RunError(f"no answer was taken to be graded: {refused[-1]}")
        unscored = sum(one.grade is None for one in graded)
        allowed = max(1, int(_UNSCORED_SHARE * len(graded)))
        if unscored > allowed:
            no_grade = f"the judge's replies hold no grade{_hint(opinions)}"
            why = next(reversed([*faults, *refused]), no_grade)
            if len(opinions) > 1 and not refused and not self._has_ever_graded():
                last = " ".join(opinions[-1].reply.split())[:_SHOWN_OF_A_REPLY]
                raise RunError(
                    f"{no_grade}, for none of {len(graded)} answers; the last is {last!r}"
                )
            raise UngradedError(
                f"{unscored} of {len(graded)} answers could not be graded, "
                f"{allowed} at most may be left out: {why}",
                graded,
            )

    def _has_ever_graded(self) -> bool:
        """Whether the judge gave a grade by this rubric, or to whoever pays in a run before.

        So a run that goes on with a candidate of which no answer gets a grade gets past it, too.
        """
        return self._has_graded or any(self._replies.has_grade(one.identity) for one in self._seats)

    def _client(self, seat: Seat) -> JudgeClient:
        if seat not in self._clients:
            spent = self._replies.spent(seat.name)
            account = Account(spent.tokens, spent.cost)
            self._clients[seat] = JudgeClient(seat.server, seat.key, account, seat.ended, self._say)
        return self._clients[seat]

    async def _wind_up(self) -> None:
        for client in self._clients.values():
            client.stop(_ENDED)
        if self._calls:
            _, late = await asyncio.wait(self._calls.values(), timeout=_GRACE_SECONDS)
            for call in late:
                call.cancel()

    async def _disconnect(self) -> None:
        for client in self._clients.values():
            await client.close()


@contextmanager
def open_judge(
    config: JudgeConfig,
    rubric: Rubric,
    *,
    open_database: Callable[[], Database],
    payer: str | None,
    folder: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Iterator[Judge]:
    """The judge of `config`, reached, for the block; local ones are served until its end.

    `open_database` gives the database of the replies, on first use; `payer` is the study whose
    limits count, None for an evaluation; relative paths start at `folder`. Raises ConfigError
    where a key's variable is not set, and where a judge cannot be reached or is not there.
    """
    keys = [key_of(server, environment) for server in config.servers]
    with ExitStack() as stack:
        seats = [
            _seat(server, stack.enter_context(served(server, folder, say)), key, folder)
            for server, key in zip(config.servers, keys, strict=True)
        ]
        _reach(seats, say)
        judge = Judge(config, rubric, seats, Replies(open_database, payer), say)
        stack.callback(judge.close)
        yield judge


def reach_judge(
    config: JudgeConfig,
    *,
    folder: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Raises what `open_judge` does where a judge that others serve cannot be had."""
    elsewhere = [server for server in config.servers if server.local is None]
    keys = [key_of(server, environment) for server in elsewhere]
    _reach(
        [
            _seat(server, Served(server), key, folder)
            for server, key in zip(elsewhere, keys, strict=True)
        ],
        say,
    )


def _seat(server: JudgeServer, reached: Served, key: str | None, folder: Path) -> Seat:
    return Seat(server.name, reached.server, key, server.identity(folder), reached.ended)


def _reach(seats: Sequence[Seat], say: Callable[[str], None]) -> None:
    with LoopThread() as thread:
        for seat in seats:
            thread.submit(_check(seat, say)).result()


async def _check(seat: Seat, say: Callable[[str], None]) -> None:
    client = JudgeClient(seat.server, seat.key, Account())
    try:
        await client.check(say)
    finally:
        await client.close()


def _hint(opinions: Sequence[_Opinion]) -> str:
    cut = sum(opinion.cut for opinion in opinions if opinion.grade is None)
    return f" ({cut} were cut: raise reply_tokens, in which thinking counts, too)" if cut else ""


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None where nothing is, or where a value is None."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found and len(found) == len(values) else None


def _sum(usage: Usage, reply: Reply) -> Usage:
    cost = None if reply.cost is None else reply.cost + (usage.cost or 0.0)
    return Usage(
        usage.prompt_tokens + reply.prompt_tokens,
        usage.completion_tokens + reply.completion_tokens,
        cost,
    )


def _all_usage(usages: Sequence[Usage | None]) -> Usage | None:
    paid = [usage for usage in usages if usage is not None]
    if not paid:
        return None
    costs = [usage.cost for usage in paid if usage.cost is not None]
    return Usage(
        sum(usage.prompt_tokens for usage in paid),
        sum(usage.completion_tokens for usage in paid),
        math.fsum(costs) if costs else None,
    )


def _all_replies(opinions: Sequence[tuple[_Question, _Opinion]]) -> str:
    """One reply as it is; several one under the other, each below its judge."""
    if len(opinions) == 1:
        return opinions[0][1].reply
    return "\n\n".join(
        f"[{question.seat.name}, grading {question.asked.grading + 1}]\n{opinion.reply}"
        for question, opinion in opinions
    )
