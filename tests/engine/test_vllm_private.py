"""What depends on vLLM's version says so."""

from __future__ import annotations

import pytest

from evomerge.engine.vllm_private import TESTED, check_vllm_version
from evomerge.errors import EvomergeError


@pytest.mark.parametrize("version", [TESTED[0], "0.32.0", "0.32.1.post1+cpu"])
def test_tested_versions_are_taken(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.31.9", TESTED[1], "1.0.0", "0.33.0rc1"])
def test_other_versions_are_named_with_what_would_be_right(version: str) -> None:
    with pytest.raises(
        EvomergeError, match=rf"0\.32\.0.*{version.replace('.', '[.]')}.*pip install"
    ):
        check_vllm_version(version)
