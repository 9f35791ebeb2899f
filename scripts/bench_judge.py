"""How close grading comes to its ideal: a judge of 1 s latency, the cache, recorded judge texts.

    .venv/bin/python scripts/bench_judge.py [RECORDED.jsonl]

A local HTTP server, in a process of its own, stands for the judge: every reply takes it one second.
RECORDED holds one {"judge_output", "score"} per line. Exit status 1 where a bar is missed that can
be reached. That 100 answers alone take no more than 1.2 × 100/32 s cannot be: 32 at once make four
rounds. They are held to 1.2 × these; candidates after each other, as in a search, to the bar as it
is.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from evomerge.database import open_database
from evomerge.evaluate.judge import Rubric, open_judge
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.judge_reply import read_verdict
from evomerge.evaluate.task import GradeRequest, Task

ANSWERS, AT_ONCE, LATENCY = 100, 32, 1.0
# Of a search, whose grading overlaps generation: how many candidates' answers follow each other.
CANDIDATES = 8


class SlowJudge(BaseHTTPRequestHandler):
    """Replies with the same grade, a second later."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "slow", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(LATENCY)
        message = {"role": "assistant", "content": '{"reason": "fine", "grade": 4}'}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020}
        self._send({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})

    def _send(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """One thread per connection, and as many waiting as are allowed at once."""

    daemon_threads = True
    request_queue_size = 2 * AT_ONCE


def serve(address: Connection) -> None:
    """Answers until the process is ended; tells its port first."""
    server = Server(("127.0.0.1", 0), SlowJudge)
    address.send(server.server_address[1])
    server.serve_forever()


def requests(count: int, candidate: int = 0) -> list[GradeRequest]:
    """Answers of the size that elyza-tasks-100's have."""
    return [
        GradeRequest(
            Task(str(number), "質問" * 50, "正解" * 70, "all", "?", {"eval_aspect": "観点" * 55}),
            f"答え {candidate} {number} " * 60,
            0,
        )
        for number in range(count)
    ]


def graded_in(url: str, storage: Path, *units: list[GradeRequest]) -> float:
    """Seconds from the answers to their grades, of units that are handed in one after the other."""
    rubric = Rubric("{{ input }}\n{{ reference }}\n{{ eval_aspect }}\n{{ answer }}", 1, 5)
    config = {"model": "slow", "base_url": url, "concurrency": AT_ONCE}
    with open_judge(
        judge_from_mapping(config, "bench"),
        rubric,
        open_database=lambda: open_database(storage),
        payer=None,
        folder=storage,
        environment={},
        say=lambda line: None,
    ) as judge:
        judge.grade_all([]).result()  # its thread runs
        start = time.perf_counter()
        for future in [judge.grade_all(items) for items in units]:
            future.result()
        return time.perf_counter() - start


def main() -> int:
    """Prints a line per bar; 1 where one is missed."""
    port, told = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.Process(target=serve, args=(told,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        seconds = graded_in(url, storage, requests(ANSWERS))
        rounds = math.ceil(ANSWERS / AT_ONCE) * LATENCY
        flow = ANSWERS / AT_ONCE * LATENCY
        print(
            f"{ANSWERS} answers, {AT_ONCE} at once, {LATENCY:g} s each: {seconds:.2f} s, "
            f"{seconds / rounds:.3f} of {rounds:g} s in whole rounds, {seconds / flow:.3f} of "
            f"{flow:g} s (1.2 of it: {'reached' if seconds <= 1.2 * flow else 'not reached'}; the "
            f"least is {rounds / flow:.2f})"
        )
        units = [requests(ANSWERS, candidate) for candidate in range(1, CANDIDATES + 1)]
        stream = graded_in(url, storage, *units) / CANDIDATES
        print(
            f"the same, {CANDIDATES} candidates after each other: {stream:.2f} s each, "
            f"{stream / flow:.3f} of {flow:g} s"
        )
        # All different, so that each is a look-up of its own.
        hits = ANSWERS / graded_in(url, storage, requests(ANSWERS))
        print(f"cache hits: {hits:.0f} a second")
    server.terminate()
    right = parsed(Path(sys.argv[1])) if len(sys.argv) > 1 else True
    return 0 if max(seconds / rounds, stream / flow) <= 1.2 and hits > 2000 and right else 1


def parsed(path: Path) -> bool:
    """Whether every recorded text gives the recorded score."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    verdicts = [read_verdict(row["judge_output"], 1, 5) for row in rows]
    right = sum(
        int(verdict is not None and verdict.grade == row["score"])
        for verdict, row in zip(verdicts, rows, strict=True)
    )
    print(f"recorded judge texts: {right} of {len(rows)} right")
    return right == len(rows)


if __name__ == "__main__":
    raise SystemExit(main())
