"""A scripted judge over real HTTP, with the faults that real ones have."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx

MODEL = "scripted"


@dataclass
class Fault:
    """What is sent instead of a reply: a status with headers and body, or half of the body.

    `silent`: nothing at all, until the client gives up.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    half: bool = False
    silent: bool = False


BUSY = Fault(429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}')
BROKEN = Fault(500, {}, '{"error": {"message": "out of order"}}')
GARBAGE = Fault(200, {"Content-Type": "text/html"}, "<html>a proxy's page</html>")
HALF_JSON = Fault(200, {"Content-Type": "application/json"}, '{"choices": [{"mess')
HALF_BODY = Fault(200, {"Content-Type": "application/json"}, '{"choices": [{"mess', half=True)
SILENCE = Fault(silent=True)


def grade_in_prompt(prompt: str) -> str:
    """The reply of a judge that finds the grade in the answer: "… deserves 4 …"."""
    found = re.findall(r"deserves (\d+)", prompt)
    return json.dumps({"reason": "as it says", "grade": int(found[-1])}) if found else "Hm."


@dataclass
class ScriptedJudge:
    """`faults` are sent first, one per request; then `reply` of the prompt.

    `takes_schema` False: requests with a response_format are refused, as by servers that know none.
    `prompts` are those that were replied to, in their order: the calls that are paid. `upstream`:
    another server's URL, which then replies to what is no fault. `turns`: what it was told about
    sleeping. `lists_with_key`: whoever has another key is not told the models.
    """

    reply: Callable[[str], str] = grade_in_prompt
    faults: list[Fault] = field(default_factory=list)
    takes_schema: bool = True
    lists_models: bool = True
    lists_with_key: str | None = None
    latency: float = 0.0
    finish_reason: str = "stop"
    prompts: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    turns: list[str] = field(default_factory=list)
    url: str = ""
    upstream: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def completion(self, prompt: str) -> dict[str, Any]:
        text = self.reply(prompt)
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": self.finish_reason,
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: ClassVar[ScriptedJudge]

    def do_GET(self) -> None:
        if self.judge.upstream:
            self._pass_on(httpx.get(self._above(), trust_env=False))
            return
        if not self.judge.lists_models:
            self._send(404, '{"error": {"message": "no such route"}}')
            return
        wanted = self.judge.lists_with_key
        if wanted is not None and self.headers["Authorization"] != f"Bearer {wanted}":
            self._send(401, '{"error": {"message": "wrong key"}}')
            return
        self._send(200, json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))

    def do_POST(self) -> None:
        judge = self.judge
        if self.path.startswith(("/sleep", "/wake_up")):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            judge.turns.append(f"{self.path} after {len(judge.prompts)}")
            self._send(200, "{}")
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append(request)
            judge.headers.append({name.lower(): value for name, value in self.headers.items()})
            fault = judge.faults.pop(0) if judge.faults else None
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            if fault is not None:
                self._fail(fault)
            elif judge.upstream:
                answer = httpx.post(self._above(), json=request, timeout=60, trust_env=False)
                with judge.lock:
                    judge.prompts.append(request["messages"][-1]["content"])
                self._pass_on(answer)
            elif self.path != "/v1/chat/completions" or request["model"] != MODEL:
                self._send(404, '{"error": {"message": "no such model"}}')
            elif "response_format" in request and not judge.takes_schema:
                self._send(400, '{"error": {"message": "response_format is unknown"}}')
            else:
                self._reply(request)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def _above(self) -> str:
        return self.judge.upstream.removesuffix("/v1") + self.path

    def _pass_on(self, answer: httpx.Response) -> None:
        self._send(answer.status_code, answer.text)

    def _reply(self, request: dict[str, Any]) -> None:
        prompt = request["messages"][-1]["content"]
        if self.judge.latency:
            time.sleep(self.judge.latency)
        with self.judge.lock:
            self.judge.prompts.append(prompt)
        self._send(200, json.dumps(self.judge.completion(prompt)))

    def _fail(self, fault: Fault) -> None:
        if fault.silent:
            self.judge.ended.wait(30)
            self.close_connection = True
            return
        self._send(fault.status, fault.body, fault.headers, 2 if fault.half else 1)

    def _send(
        self, status: int, body: str, headers: Mapping[str, str] = {}, promised: int = 1
    ) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) * promised))
        self.end_headers()
        self.wfile.write(content)
        if promised > 1:
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: tests look at what was asked, not at a log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that gave up are what is tested."""


@contextmanager
def scripted(judge: ScriptedJudge) -> Iterator[ScriptedJudge]:
    """`judge` on a port of loopback, for the block."""
    handler = type("Handler", (_Handler,), {"judge": judge})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        judge.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
