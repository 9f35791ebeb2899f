"""What a merge tells of itself: a bar on a terminal, one line at the end."""

from __future__ import annotations

import io
import re
import time

import pytest

from evomerge.report.merge_display import MergeDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def merge_of_one_gigabyte(stream: io.StringIO) -> str:
    with MergeDisplay(stream) as display:
        for done in (250, 500, 1000):
            time.sleep(0.15)
            display(done * 10**6, 10**9)
    return stream.getvalue()


def test_where_there_is_no_terminal_there_is_one_line() -> None:
    told = merge_of_one_gigabyte(io.StringIO())
    assert re.fullmatch(r"1\.00 GB in 0\.\d s: \d\.\d\d GB/s\n", told)


def test_a_terminal_sees_bytes_and_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    told = merge_of_one_gigabyte(Terminal())
    assert "merging" in told
    assert "1.0/1.0 GB" in told
    assert "GB/s" in told.rsplit("\n", 2)[0]
    assert re.search(r"1\.00 GB in 0\.\d s: \d\.\d\d GB/s\n$", told)


def test_a_failed_merge_has_no_closing_line() -> None:
    def fail() -> None:
        with MergeDisplay(stream) as display:
            display(1, 2)
            raise ValueError("broken")

    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"):
        fail()
    assert stream.getvalue() == ""
