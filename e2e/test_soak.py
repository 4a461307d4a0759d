"""A short soak of the engine: what `python -m e2e.soak` checks, in a quarter of a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.harness import ENVIRONMENT, ROOT
from e2e.soak import MOST_SECONDS

# An engine's start, which may compile, and twice the most that few requests may take.
TIMEOUT_SECONDS = 600 + 2 * MOST_SECONDS
pytestmark = [pytest.mark.engine, pytest.mark.timeout(TIMEOUT_SECONDS + 30)]


def test_traffic_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    child = subprocess.run(
        [sys.executable, "-m", "e2e.soak", "--minutes", "0.25", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},  # OpenMP reads its own before main() can set it
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    result = json.loads(child.stdout[child.stdout.index("\n{\n") :])
    for happened in ("finished", "aborted", "preemptions", "mixed_steps", "cached_tokens"):
        assert result[happened] > 0, happened
    assert result["probes"] >= 2
    assert result["texts_of_probe"] == 1
    assert result["pages_lost"] == 0
    (row,) = json.loads(output.read_text())
    assert {name: row[name] for name in result} == result
    assert result["counters"]["attention_runs"] == result["counters"]["layer_calls"] > 0
