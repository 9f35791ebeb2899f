"""The `judge:` of a study or an evaluation: who grades, how hard it may be asked, its limits."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evomerge.errors import ConfigError, nearest

OPENAI_URL = "https://api.openai.com/v1"
_KEY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(_KEY|_TOKEN)")
_PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NumberFromZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, strict=True)]

# What a local judge's vLLM may be started with: nothing that loads code or opens a path.
_SERVER_OPTIONS = (
    *("dtype", "max_model_len", "max_num_seqs", "tensor_parallel_size", "gpu_memory_utilization"),
    *("kv_cache_memory_bytes", "enforce_eager", "quantization"),
)
# Of a request, beside those with keys of their own; none of them changes who is asked what.
_REQUEST_OPTIONS = (
    *("seed", "top_p", "top_k", "min_p", "reasoning_effort", "verbosity", "service_tier"),
    *("chat_template_kwargs", "repetition_penalty", "frequency_penalty", "presence_penalty"),
)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prices(_Strict):
    """What a million tokens cost, in any one currency."""

    input: _NumberFromZero
    output: _NumberFromZero


class JudgeServer(_Strict):
    """One judge: a model behind an OpenAI-compatible API, or one that we serve here.

    `model` at `base_url` with the key in the variable `api_key_env`, which servers on this machine
    do without; or `local`, a model that vLLM serves on this machine while it is needed, on GPU
    number `gpu` (None: the one that vLLM takes). With `sleep` it has the candidates' GPU: it sleeps
    while they answer, and they while it grades.

    `structured`: "json_schema" makes the server write JSON, "text" leaves it free, "auto" is the
    first where the server can. `reply_tokens` are the most of one reply, `timeout` the seconds that
    one call may take, `patience` the seconds in which a call is tried again. `temperature` None
    leaves it to the server (some models take none). `max_cost` and `max_total_tokens` end the run;
    it goes on where they are raised.
    """

    model: Annotated[str, Field(min_length=1)] | None = None
    base_url: Annotated[str, Field(pattern=r"^https?://\S+$")] = OPENAI_URL
    api_key_env: str | None = None
    local: Annotated[str, Field(min_length=1)] | None = None
    gpu: Annotated[int, Field(ge=0, strict=True)] | None = None
    sleep: bool = False
    options: Mapping[str, object] = Field(default_factory=dict)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    reply_tokens: _Count = 1024
    structured: Literal["auto", "json_schema", "text"] = "auto"
    request: Mapping[str, object] = Field(default_factory=dict)
    concurrency: _Count = 32
    requests_per_minute: _PositiveNumber | None = None
    tokens_per_minute: _PositiveNumber | None = None
    timeout: _PositiveNumber = 120.0
    patience: _PositiveNumber = 300.0
    prices: Prices | None = None
    max_cost: _PositiveNumber | None = None
    max_total_tokens: _Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _says_which_tokens(cls, content: object) -> object:
        if isinstance(content, Mapping) and "max_tokens" in content:
            raise ValueError(
                "max_tokens: say reply_tokens for the length of one reply, "
                "max_total_tokens for all that may be spent"
            )
        return content

    @field_validator("api_key_env")
    @classmethod
    def _names_a_key(cls, name: str | None) -> str | None:
        if name is not None and not _KEY_NAME.fullmatch(name):
            raise ValueError(
                f"{name[:40]!r} names no key variable: its name must end in _KEY or _TOKEN, "
                "as OPENAI_API_KEY does; the key itself stands in the environment only"
            )
        return name

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is no address of a server: {error}") from error
        if not host:
            raise ValueError(f"{url!r} is no address of a server: it names no host")
        if "@" in parts.netloc:
            raise ValueError("user and password do not belong into a file; use api_key_env")
        return url.rstrip("/")

    @field_validator("options")
    @classmethod
    def _is_harmless_to_start_with(cls, options: Mapping[str, object]) -> Mapping[str, object]:
        return _only_known(options, _SERVER_OPTIONS)

    @field_validator("request")
    @classmethod
    def _is_harmless_to_ask_with(cls, request: Mapping[str, object]) -> Mapping[str, object]:
        return _only_known(request, _REQUEST_OPTIONS)

    @model_validator(mode="after")
    def _names_one_judge(self) -> JudgeServer:
        if (self.model is None) == (self.local is None):
            raise ValueError("one of model (behind base_url) and local (served here) is needed")
        for key in ("base_url", "api_key_env"):
            if self.local is not None and key in self.model_fields_set:
                raise ValueError(f"{key}: a local judge has none; leave it out")
        for key in ("gpu", "options", "sleep"):
            if self.local is None and key in self.model_fields_set:
                raise ValueError(f"{key}: is for a local judge (local: MODEL) alone")
        if self.local is None and self.api_key_env is None and not self.on_this_machine:
            raise ValueError(
                f"api_key_env: is missing; name the variable with the key of {self.host}, "
                "as api_key_env: OPENAI_API_KEY"
            )
        if self.sleep and self.gpu is not None:
            raise ValueError("sleep: is for a judge on the candidates' GPU; leave out gpu or sleep")
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost: needs prices: {input: …, output: …} per million tokens")
        return self

    @property
    def name(self) -> str:
        """The judge as readers know it."""
        return self.model or self.local or ""

    @property
    def host(self) -> str:
        """Host and port that replies come from."""
        return urlsplit(self.base_url).netloc

    @property
    def on_this_machine(self) -> bool:
        """Whether the server listens on loopback."""
        if self.local is not None:
            return True
        host = urlsplit(self.base_url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def identity(self, folder: Path) -> dict[str, Any]:
        """All of the judge that can change a grade, as plain values.

        A server on this machine is known by its model alone, because its port may be another one
        tomorrow; a local model in a folder by its files. `folder` is where relative paths start.
        """
        said: dict[str, Any] = {
            "model": self.model or local_identity(self.local or "", folder),
            "temperature": self.temperature,
            "reply_tokens": self.reply_tokens,
            "structured": self.structured,
        }
        if not self.on_this_machine:
            said["base_url"] = self.base_url
        if self.request:
            said["request"] = dict(self.request)
        options = {
            key: self.options[key] for key in ("dtype", "quantization") if key in self.options
        }
        return said | ({"options": options} if options else {})


class Panel(_Strict):
    """Several gradings of one answer, averaged: `gradings` by the judge and by each of `others`."""

    gradings: Annotated[int, Field(ge=1, le=50, strict=True)] = 1
    others: tuple[JudgeServer, ...] = ()


class JudgeConfig(JudgeServer):
    """The judge with the panel that every answer is graded by, and that of the finalists.

    `finalists` is for wanted repetitions, which choose the winner; None: as all.
    """

    gradings: Annotated[int, Field(ge=1, le=50, strict=True)] = 1
    others: tuple[JudgeServer, ...] = ()
    finalists: Panel | None = None

    def panel(self, attempt: int) -> Panel:
        """Who grades answers of this attempt (0: the first; above: wanted repetitions)."""
        if attempt and self.finalists is not None:
            return self.finalists
        return Panel(gradings=self.gradings, others=self.others)

    @property
    def first(self) -> JudgeServer:
        """The judge alone, without its panels."""
        return JudgeServer.model_validate(
            {key: getattr(self, key) for key in self.model_fields_set & set(_SERVER_KEYS)}
        )

    @property
    def servers(self) -> tuple[JudgeServer, ...]:
        """All judges that may be asked, each once."""
        finalists = self.finalists.others if self.finalists else ()
        found: list[JudgeServer] = []
        for server in (self.first, *self.others, *finalists):
            if server not in found:
                found.append(server)
        return tuple(found)

    def fingerprint(self, folder: Path) -> dict[str, str]:
        """What counts as "the study changed", by the keys of the file."""
        said = {f"judge.{key}": str(value) for key, value in self.first.identity(folder).items()}
        said["judge.gradings"] = str(self.gradings)
        for place, panel in (("others", self.panel(0)), ("finalists", self.panel(1))):
            if panel.others or (place == "finalists" and self.finalists):
                who = [other.identity(folder) for other in panel.others]
                said[f"judge.{place}"] = f"{panel.gradings} × {who or 'the judge'}"
        return said


_SERVER_KEYS = tuple(JudgeServer.model_fields)


def judge_from_mapping(content: object, where: str) -> JudgeConfig:
    """The judge in plain values; ConfigError, beginning with `where`, names every mistake."""
    try:
        return JudgeConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _complaints(error))) from error


def key_of(server: JudgeServer, environment: Mapping[str, str]) -> str | None:
    """The key for a judge, from its variable; None where it needs none.

    Raises ConfigError naming a variable that is not set, or holds what cannot be sent.
    """
    if server.api_key_env is None:
        return None
    key = environment.get(server.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"judge: api_key_env: the variable {server.api_key_env} is not set; it should hold "
            f"the key for {server.host}"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        # An HTTP header takes no other, and who says so quotes it.
        raise ConfigError(
            f"judge: api_key_env: what the variable {server.api_key_env} holds is no key: one has "
            "ASCII characters alone, without spaces and line breaks"
        )
    return key


def local_identity(reference: str, folder: Path) -> str:
    """A local judge's model: a hub name as it is, a folder by its files' names, sizes and times."""
    path = folder / Path(reference).expanduser()
    if not path.is_dir():
        return reference
    with os.scandir(path) as entries:
        stats = sorted(
            (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
            for entry in entries
            if entry.is_file()
        )
    return f"{path.name} {hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


def _only_known(given: Mapping[str, object], known: Sequence[str]) -> Mapping[str, object]:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}{nearest(str(unknown[0]), known)}")
    return dict(given)


def _complaints(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        place = ".".join(("judge", *map(str, item["loc"])))
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown key{nearest(str(item['loc'][-1]), JudgeConfig.model_fields)}"
        lines.append(f"{place}: {message}")
    return lines
