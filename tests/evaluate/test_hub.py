"""Datasets of the hub: fetched over real HTTP, kept, and read again when it is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import sys
from pathlib import Path
from evomerge.errors import ConfigError
from evomerge.evaluate.suite import SuiteConfig, load_suite
for file in sys.argv[1:]:
    data = {"hub": "me/tasks", "revision": "1.0.0", "file": file.split("+")}
    try:
        suite = load_suite(SuiteConfig.model_validate({"data": data}), Path())
        print(*(task.reference for task in suite.tasks))
    except ConfigError as error:
        print(error)
"""


@contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a server with as much of the hub's interface as a dataset's files need."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            body = self.body(self.path.partition("?")[0])
            self.send_response(404 if body is None else 200)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body and body is not None:
                self.wfile.write(body)

        def body(self, path: str) -> bytes | None:
            if path == "/api/datasets/me/tasks/revision/1.0.0":
                return json.dumps({"id": "me/tasks", "sha": COMMIT}).encode()
            return files.get(path.removeprefix("/datasets/me/tasks/resolve/1.0.0/"))

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(folder: Path, endpoint: str, *files: str) -> list[str]:
    """What a process of its own says: the hub's address is read when its client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder)}
    command = [sys.executable, "-c", READ, *files]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_the_files_of_a_dataset_are_fetched_and_read_again_without_the_hub(tmp_path: Path) -> None:
    files = {
        "test.csv": b"input,output\na,first\n",
        "data/more.csv": b"output,input\nsecond,b\n",
    }
    with hub(files) as endpoint:
        found, absent = read(tmp_path, endpoint, "test.csv+data/more.csv", "absent.csv")
        assert found == "first second"
        assert absent.startswith("suite: absent.csv of https://huggingface.co/datasets/me/tasks")
    assert read(tmp_path, endpoint, "test.csv") == ["first"]
