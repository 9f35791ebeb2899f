"""One judge over HTTP: questions in, replies out, at the pace and to the cost that are allowed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from evomerge.errors import ConfigError, EvomergeError, RunError, nearest
from evomerge.evaluate.judge_config import JudgeServer

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

Found = TypeVar("Found")

_LONGEST_BACK_OFF = 30.0
# A start waits less for a judge than a run that has something to lose.
_START_PATIENCE = 10.0
# After how long somebody who waits is told what for.
_SILENT_SECONDS = 10.0
# How often a server of ours is looked at, which may end under a call.
_LOOK_SECONDS = 0.5
_TEMPORARY = frozenset({408, 409, 425, 429})
# No tokens are so long on the average: a longer text is no reply, and is not kept whole.
_CHARACTERS_A_TOKEN = 100
# What one request can be to blame for: too long, against the server's rules.
_OF_THE_REQUEST = frozenset({400, 413, 422})
_NO_SUCH_ROUTE = frozenset({404, 405, 501})


@dataclass(frozen=True)
class Reply:
    """What the judge wrote; `finish_reason` "stop" where it is whole; `seconds` of the last try."""

    text: str
    finish_reason: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class RefusedError(EvomergeError):
    """The judge does not take this one question: no fault of the run."""


class _TemporaryError(Exception):
    """Worth another try, not before `wait` seconds."""

    def __init__(self, words: str, wait: float = 0.0) -> None:
        super().__init__(words)
        self.wait = wait


@dataclass
class Account:
    """What has been spent on a judge, by this study, in all its runs."""

    tokens: int = 0
    cost: float = 0.0


class Pace:
    """When the next call may start, by requests and tokens per minute and by the server's word."""

    def __init__(self, server: JudgeServer) -> None:
        self._spacing = 60.0 / server.requests_per_minute if server.requests_per_minute else 0.0
        self._per_token = 60.0 / server.tokens_per_minute if server.tokens_per_minute else 0.0
        self._next_slot = 0.0
        self._not_before = 0.0
        self._paid_until = 0.0

    async def turn(self) -> None:
        """Returns when a call may start."""
        slot = max(time.monotonic(), self._next_slot)
        self._next_slot = slot + self._spacing
        while (wait := max(slot, self._not_before, self._paid_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        """No call starts for that long."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def spend(self, tokens: int) -> None:
        """Takes note of what a call took of the tokens per minute, which is known afterwards."""
        self._paid_until = max(self._paid_until, time.monotonic()) + tokens * self._per_token


class JudgeClient:
    """Asks the judge `server`. Belongs to one event loop.

    `key`: None where it needs none. `account` is charged, and its limits end the run. `ended` says
    how a server of ours ended (None: it did not), where it is one. `say` is told once where calls
    fail for long.
    """

    def __init__(
        self,
        server: JudgeServer,
        key: str | None,
        account: Account,
        ended: Callable[[], str | None] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._server = server
        self._say = say
        self._has_told = False
        self._ended = ended
        self._key = key
        self._account = account
        self._pace = Pace(server)
        self._slots = asyncio.Semaphore(server.concurrency)
        self._takes_schema: bool | None = {"json_schema": True, "text": False}.get(
            server.structured
        )
        self._broken: str | None = None
        self._client = _openai_client(server, key)

    async def close(self) -> None:
        """Lets go of the connections."""
        await self._client.close()

    def stop(self, reason: str) -> None:
        """No call begins from here on: RunError says why."""
        self._broken = reason

    async def check(self, say: Callable[[str], None]) -> None:
        """Raises ConfigError where the judge cannot be reached, or is not what was named.

        Says where answers will go. Where the server's list of models does not show the judge, or
        tells nothing of the key because nobody needs one for it, the judge is asked for one token.
        """
        server = self._server
        key = f", with the key in {server.api_key_env}" if server.api_key_env else ""
        say(f"judge: answers go to {server.host} ({server.name}){key}")
        listed: list[str] = []
        patience = min(server.patience, _START_PATIENCE)
        try:
            listed = await self._patiently(self._models, patience)
            if server.model not in listed or await self._lists_to_anybody():
                await self._patiently(self._ask_one_token, patience)
        except (RunError, RefusedError) as error:
            known = nearest(server.name, listed) if listed else ""
            raise ConfigError(f"{error}{known}") from error

    async def ask(self, prompt: str, schema: Mapping[str, Any]) -> Reply:
        """The judge's reply to `prompt`, in JSON by `schema` where the server can.

        Raises RefusedError where it does not take this prompt, RunError where it cannot be reached,
        where it lets nobody in, and where a limit of the account is reached; then always.
        """
        async with self._slots:
            self._check_not_stopped()
            try:
                asking = self._patiently(
                    lambda: self._ask_once(prompt, schema), self._server.patience
                )
                return await self._while_served(asking)
            except RunError as error:
                self.stop(str(error))  # whoever waits for a slot need not find out by itself
                raise

    async def _patiently(self, call: Callable[[], Awaitable[Found]], patience: float) -> Found:
        """What `call` gives, tried again while it fails for a passing reason."""

        def tell(state: RetryCallState) -> None:
            if not self._has_told and (state.seconds_since_start or 0.0) > _SILENT_SECONDS:
                self._has_told = True
                error = state.outcome.exception() if state.outcome else None
                self._say(
                    f"judge: {self._server.base_url} fails ({error}); it is tried for "
                    f"{patience:g} s (patience)"
                )

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TemporaryError),
            stop=stop_before_delay(patience),
            wait=_back_off,
            before_sleep=tell,
            reraise=True,
        )

        async def once() -> Found:
            await self._pace.turn()
            return await call()

        try:
            return await retrying(once)
        except _TemporaryError as error:
            how = f"could not be had for {patience:g} s"
            if error.wait > patience:  # and so it was given up at once
                how = f"asks to be left alone for {error.wait:g} s, longer than {patience:g} s"
            raise RunError(f"judge: {self._server.base_url} {how}: {error}") from error

    async def _while_served(self, asking: Coroutine[Any, Any, Found]) -> Found:
        """What `asking` gives, given up as soon as a server of ours has ended: RunError.

        What it leaves behind may keep its port open, where nobody answers.
        """
        if self._ended is None:
            return await asking
        work = asyncio.create_task(asking)
        try:
            while not work.done():
                if (how := self._ended()) is not None:
                    raise RunError(how)
                await asyncio.wait({work}, timeout=_LOOK_SECONDS)
            return work.result()
        finally:
            work.cancel()

    async def _ask_once(self, prompt: str, schema: Mapping[str, Any]) -> Reply:
        self._check_not_stopped()
        self._check_limits()
        if self._takes_schema is False:
            return await self._complete(prompt, {})
        try:
            reply = await self._complete(prompt, _response_format(schema))
        except RefusedError:
            if self._takes_schema:
                raise
            # A server without structured output, or a prompt that it takes in no form.
            reply = await self._complete(prompt, {})
            self._takes_schema = False
            return reply
        self._takes_schema = True
        return reply

    async def _complete(self, prompt: str, more: Mapping[str, Any]) -> Reply:
        """One call. Raises _TemporaryError, too."""
        server = self._server
        request = self._request(prompt, server.reply_tokens) | dict(more)
        if server.temperature is not None:
            request["temperature"] = server.temperature
        start = time.monotonic()
        completion = await self._call(
            lambda: self._client.chat.completions.create(
                **request, extra_body=dict(server.request) or None
            )
        )
        return self._reply(completion, time.monotonic() - start)

    def _reply(self, completion: Any, seconds: float) -> Reply:
        try:
            choice = completion.choices[0]
            text = str(choice.message.content or getattr(choice.message, "refusal", None) or "")
            finish_reason = str(choice.finish_reason)
            usage = completion.usage
            prompt_tokens = int(usage.prompt_tokens) if usage else 0
            completion_tokens = int(usage.completion_tokens) if usage else 0
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise _TemporaryError("what it sent is no chat completion") from error
        most = _CHARACTERS_A_TOKEN * self._server.reply_tokens
        return Reply(
            text=text[:most],
            finish_reason=finish_reason if len(text) <= most else "length",
            seconds=seconds,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost=self._charge(prompt_tokens, completion_tokens, counted=usage is not None),
        )

    async def _models(self) -> list[str]:
        """The server's models; none where it does not list them."""
        try:
            page = await self._call(self._client.models.list)
        except _NoSuchRouteError:
            return []
        try:
            return [str(model.id) for model in page.data]
        except (AttributeError, TypeError) as error:
            raise RunError(
                f"judge: {self._server.base_url} is no OpenAI-compatible API: "
                "what it lists are no models"
            ) from error

    async def _lists_to_anybody(self) -> bool:
        """Whether a key was taken along to a list of models that is open to all."""
        from openai import OpenAIError

        if self._key is None:
            return False
        try:
            await self._client.with_options(api_key="none").models.list()
        except (OpenAIError, ValueError):
            return False
        return True

    async def _ask_one_token(self) -> None:
        request = self._request("1", 1)
        await self._call(lambda: self._client.chat.completions.create(**request))

    def _request(self, prompt: str, tokens: int) -> dict[str, Any]:
        # OpenAI's newer models refuse max_tokens, other servers may not know the other one.
        longest = "max_completion_tokens" if self._server.host == "api.openai.com" else "max_tokens"
        messages = [{"role": "user", "content": prompt}]
        return {"model": self._server.model, "messages": messages, longest: tokens}

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """What `call` of the client gives; its errors sorted by whose fault they are."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        try:
            return await call()
        except APITimeoutError as error:
            raise _TemporaryError(f"no reply within {self._server.timeout:g} s") from error
        except APIConnectionError as error:
            raise _TemporaryError(
                self._quoted("no connection", error.__cause__ or error)
            ) from error
        except APIStatusError as error:
            self._sort(error)
        except (OpenAIError, ValueError) as error:  # a body that is no JSON
            raise _TemporaryError(self._quoted("what it sent cannot be read", error)) from error

    def _quoted(self, what: str, said: object) -> str:
        """What went wrong and what was said of it, in one short line; never with the key.

        Some servers quote one that they do not take.
        """
        line = " ".join(str(said).split())
        if self._key is not None:
            line = line.replace(self._key, "…")
        return f"{what}: {line if len(line) <= 300 else f'{line[:300]}…'}"

    def _sort(self, error: APIStatusError) -> NoReturn:
        status = error.status_code
        words = self._quoted(str(status), _words(error))
        where = f"judge: {self._server.base_url}"
        if status == 429 and error.code == "insufficient_quota":
            raise RunError(f"{where} says {words}") from error
        if status in _TEMPORARY or (status >= 500 and status != 501):
            wait = _retry_after(error)
            self._pace.pause(wait)
            raise _TemporaryError(words, wait) from error
        if status in _OF_THE_REQUEST:
            raise RefusedError(f"{where} says {words}") from error
        if status in _NO_SUCH_ROUTE:
            raise _NoSuchRouteError(
                f"{where} says {words}; most base_urls end in /v1, and model: "
                f"{self._server.name} has to be one of its models"
            ) from error
        key = self._server.api_key_env
        whose = f" (the key in {key})" if key and status in (401, 403) else ""
        raise RunError(f"{where} says {words}{whose}") from error

    def _check_not_stopped(self) -> None:
        if self._broken is not None:
            raise RunError(self._broken)

    def _check_limits(self) -> None:
        """Raises RunError where the account has reached a limit."""
        server, account = self._server, self._account
        if server.max_cost is not None and account.cost >= server.max_cost:
            raise RunError(
                f"judge: {server.name} has cost {account.cost:.2f}, max_cost is "
                f"{server.max_cost:g}; raise it and resume"
            )
        if server.max_total_tokens is not None and account.tokens >= server.max_total_tokens:
            raise RunError(
                f"judge: {server.name} has taken {account.tokens} tokens, max_total_tokens is "
                f"{server.max_total_tokens}; raise it and resume"
            )

    def _charge(self, prompt_tokens: int, completion_tokens: int, *, counted: bool) -> float | None:
        """Adds a call to the account; its cost, if prices are known."""
        server = self._server
        if not counted and (server.max_cost is not None or server.max_total_tokens is not None):
            raise RunError(
                f"judge: {server.base_url} does not say how many tokens it took, so max_cost and "
                "max_total_tokens cannot be kept; leave them out"
            )
        self._account.tokens += prompt_tokens + completion_tokens
        self._pace.spend(prompt_tokens + completion_tokens)
        if server.prices is None:
            return None
        cost = prompt_tokens * server.prices.input + completion_tokens * server.prices.output
        self._account.cost += cost / 1e6
        return cost / 1e6


class _NoSuchRouteError(RunError):
    """The server has nothing at this address, or no model of this name."""


def _openai_client(server: JudgeServer, key: str | None) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    client = AsyncOpenAI(
        api_key=key or "none",
        base_url=server.base_url,
        timeout=server.timeout,
        max_retries=0,
        # Proxies of the environment are for other machines. Nobody sends us on to another host.
        http_client=DefaultAsyncHttpxClient(
            trust_env=not server.on_this_machine, follow_redirects=False
        ),
    )
    if server.host != "api.openai.com":
        # Found in the environment, and nobody else's business.
        client.organization = client.project = None
    return client


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "grade", "strict": True, "schema": dict(schema)},
        }
    }


_EXPONENTIAL = wait_random_exponential(multiplier=0.5, max=_LONGEST_BACK_OFF)


def _back_off(state: RetryCallState) -> float:
    """Seconds until the next try: as the server says, at least; else more with every try."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _TemporaryError) else 0.0
    return asked + float(_EXPONENTIAL(state))


def _retry_after(error: APIStatusError) -> float:
    """The seconds of a Retry-After header; 0 without one. A date counts from now."""
    value = error.response.headers.get("retry-after", "")
    try:
        return min(max(float(value), 0.0), 3600.0)
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        return min(max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0), 3600.0)
    except (TypeError, ValueError):
        return 0.0


def _words(error: APIStatusError) -> str:
    """What a server says of an error."""
    body = error.body
    said = body.get("message") if isinstance(body, Mapping) else None
    return str(said or error.message)
