"""A short soak of SGLang: what `python -m e2e.sglang_soak` checks, in a quarter of a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.sglang_site import sglang_path
from e2e.sglang_soak import PATIENCE_SECONDS, soak
from e2e.soak import MAX_GROWN_BYTES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(PATIENCE_SECONDS + 60)]


def test_traffic_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    try:
        sglang_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    result = soak(0.25, "fi_backend", 1, tmp_path / "log.txt", tmp_path / "soak.json")
    for happened in ("finished", "aborted", "retracted", "cached_tokens"):
        assert result[happened] > 0, happened
    assert result["probes"] >= 2
    assert result["texts_of_probe"] == 1
    assert result["grown_bytes"]["host"] < MAX_GROWN_BYTES
