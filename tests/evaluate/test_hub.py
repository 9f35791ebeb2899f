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

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluate.hub_splits import files_of_split

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import sys
from pathlib import Path
from evomerge.errors import ConfigError
from evomerge.evaluate.suite import SuiteConfig, load_suite
for file in sys.argv[1:]:
    data = {"hub": "me/tasks", "revision": "1.0.0"}
    suite = {"data": data}
    if file.startswith("split="):
        suite["split"] = file.removeprefix("split=")
    else:
        data["file"] = file.split("+")
    try:
        suite = load_suite(SuiteConfig.model_validate(suite), Path())
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
                siblings = [{"rfilename": name} for name in files]
                return json.dumps({"id": "me/tasks", "sha": COMMIT, "siblings": siblings}).encode()
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


def read(folder: Path, endpoint: str, *files: str, script: str = READ) -> list[str]:
    """What a process of its own says: the hub's address is read when its client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder)}
    command = [sys.executable, "-c", script, *files]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_the_files_of_a_dataset_are_fetched_and_read_again_without_the_hub(tmp_path: Path) -> None:
    files = {
        "test.csv": b"input,output\na,first\n",
        "data/more.csv": b"output,input\nsecond,b\n",
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n"
        b"  - {split: test, path: test.csv}\n  - {split: all, path: ['*.csv', data/*.csv]}\n---\n",
    }
    with hub(files) as endpoint:
        found, whole, tset, absent = read(
            tmp_path, endpoint, "test.csv+data/more.csv", "split=all", "split=tset", "absent.csv"
        )
        assert found == "first second"
        assert whole == "second first"  # by the files' names
        assert "me/tasks at 1.0.0: there is no split 'tset'; did you mean 'test'?" in tset
        assert absent.startswith("suite: absent.csv of https://huggingface.co/datasets/me/tasks")
    assert read(tmp_path, endpoint, "test.csv", "split=all") == ["first", "second first"]


JOIN = """
import sys
from pathlib import Path
from evomerge.errors import ConfigError
from evomerge.evaluate.graders import check_graders
from evomerge.evaluate.judge_config import judge_from_mapping
from evomerge.evaluate.suite import SuiteConfig, load_suite
far = {"model": "m", "base_url": "https://far.example/v1", "api_key_env": "JUDGE_KEY"}
for name in sys.argv[2:]:
    suite = {
        "scorer": "judge",
        "data": {"hub": "me/tasks", "revision": "1.0.0", "file": "data/asked.jsonl"},
        "join": {"file": name.split("+"), "key": "id"},
    }
    try:
        folder = Path(sys.argv[1])
        suite = load_suite(SuiteConfig.model_validate(suite, context={"folder": folder}), folder)
        check_graders(suite, judge_from_mapping(far, "study.yaml"))
        print(*(task.reference for task in suite.tasks))
    except ConfigError as error:
        print(error)
"""


def test_a_second_table_of_the_same_dataset_is_fetched_and_graded_anywhere(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "mine.jsonl").write_text('{"id": "1", "output": "mine"}\n')
    files = {
        "data/asked.jsonl": b'{"id": "1", "input": "a"}\n',
        "data/right.jsonl": b'{"id": "1", "output": "beside"}\n',
        "right.jsonl": b'{"id": "1", "output": "above"}\n',
    }
    names = ("right.jsonl", "../right.jsonl", "absent.jsonl+right.jsonl", "absent.jsonl")
    arguments = (str(tmp_path / "study"), *names, str(tmp_path / "mine.jsonl"))
    with hub(files) as endpoint:
        first = read(tmp_path / "hub", endpoint, *arguments, script=JOIN)
    assert first[:3] == ["beside", "above", "beside"]
    assert first[3].startswith("suite: join: data/absent.jsonl of https://huggingface.co/datasets/")
    # What is no part of it is a file of the study's, wherever the table is.
    assert first[4].startswith(f"join.file: {tmp_path}/mine.jsonl lies outside of {tmp_path}/study")
    again = read(tmp_path / "hub", endpoint, *arguments, script=JOIN)
    assert again[:3] == first[:3]


PARTS = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00002.parquet"]
PARTS.append("data/test-00001-of-00002.parquet")


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "expected"),
    [
        (PARTS, "", None, "test", PARTS[1:]),
        (["README.md", "a.csv", "b.csv"], "", None, "train", ["a.csv", "b.csv"]),
        (["dev/x.jsonl", "test_x.jsonl", "x_eval.csv"], "", None, "validation", ["dev/x.jsonl"]),
        (["dev/x.jsonl", "test_x.jsonl"], "", None, "test", ["test_x.jsonl"]),
        (["data/gold-00000-of-00001.parquet", "test.csv"], "", None, "gold", 1),
        (["data/dev-00000-of-00001.parquet"], "", None, "dev", 1),
        ([f"data/test_{x}-00000-of-00001.parquet" for x in "ab"], "", None, "test_b", 1),
        (PARTS, "configs: [{config_name: a, data_files: [{split: s, path: data/test-*}]}]", None,
         "s", PARTS[1:]),
        (["ja/test.csv", "en/test.csv"],
         "configs: [{config_name: ja, data_dir: ja}, {config_name: en, data_dir: en}]", "en",
         "test", ["en/test.csv"]),
        (["x/y/a.csv", "a.csv", "b.txt"], "configs: [{data_files: '**/a.csv'}]", None, "train", 2),
    ],
)  # fmt: skip
def test_the_files_of_a_split_are_found_as_the_hub_finds_them(
    names: list[str], card: str, config: str | None, split: str, expected: list[str] | int
) -> None:
    card = f"---\n{card}\n---\n# Tasks\n" if card else "# Tasks\n"
    found = files_of_split(names, card, config, split)
    assert (len(found) if isinstance(expected, int) else found) == expected


@pytest.mark.parametrize(
    ("names", "card", "config", "split", "message"),
    [
        (PARTS, "", None, "tset", "no split 'tset'; did you mean 'test'"),
        (PARTS, "", "ja", "test", "no config 'ja'; it has none"),
        (["a.arrow"], "", None, "train", r"no file of it is a table of a split \(\.jsonl, "),
        (["a.json"], "configs: [{data_files: a.json}]", None, "train", "in a.json; right are .jso"),
        (PARTS[:2], "", None, "test", r"of data/test 1 of 2 parts are there"),
        (PARTS, "configs: [{config_name: ja}, {config_name: en}]", None, "test", "ja or en"),
        (PARTS, "configs: [{config_name: ja}]", "jp", "test", "no config 'jp'; .*ja"),
    ],
)
def test_a_split_that_cannot_be_had_is_told(
    names: list[str], card: str, config: str | None, split: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        files_of_split(names, f"---\n{card}\n---\n", config, split)
