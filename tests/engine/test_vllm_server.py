"""What a vLLM server does that a sound one does not: a stand-in forces it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evomerge.engine import EngineConfig, open_engine
from evomerge.engine.base import GenerationSettings
from evomerge.errors import ConfigError, EngineDiedError
from tests import tiny


class Server(BaseHTTPRequestHandler):
    """Takes every message, answers a completion, and then hangs up."""

    models: object = [{"id": "m", "max_model_len": 64}]

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send({"data": self.models})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop"}
        self._send({"results": [None], "choices": [choice | {"prompt_token_ids": [1]}]})

    def _send(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_server_that_dies_after_its_answers_is_a_dead_engine(url: str, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", layers=1)
    config = EngineConfig(str(base), (), repeatable=False, url=url)
    with open_engine("vllm", config) as engine, pytest.raises(EngineDiedError, match="weight_info"):
        engine.generate(["a"], GenerationSettings(max_tokens=1), add_special_tokens=True)


def test_a_server_without_models_is_told(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "models", [])
    base = tiny.llama(tmp_path / "base", layers=1)
    with pytest.raises(ConfigError, match=f"engine: url: {url}: .* lists no model"):
        open_engine("vllm", EngineConfig(str(base), (), repeatable=False, url=url))
