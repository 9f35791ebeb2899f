"""Where the time of a search goes."""

from __future__ import annotations

import pytest

from evomerge.search.timing import overhead_share


def test_the_overhead_is_what_no_candidate_needs_and_engine_start_is_not_counted() -> None:
    work = {"switch": 10.0, "generate": 80.0, "score": 6.0, "engine": 500.0}
    overhead = {"ask": 1.0, "log": 2.0, "other": 1.0}
    assert overhead_share(work | overhead) == pytest.approx(0.04)
    assert overhead_share(work) == 0.0
    assert overhead_share({}) == 0.0
