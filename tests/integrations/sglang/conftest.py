"""Tests that run inside an SGLang process; test_sglang.py starts it where there is none.

SGLang pins other versions of packages than vLLM does, so one process cannot have both.
"""

from __future__ import annotations

import importlib.util
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

STUBS = Path(__file__).parent / "stubs"

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.append(str(STUBS))  # last: real packages win


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Our factories in SGLang's table, as its plugin loader leaves it."""
    from sglang.srt.plugins import load_plugins

    from fi_backend.integrations.sglang import activate

    activate()
    load_plugins()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """As an engine runs; the kit itself writes into pools outside of it."""
    with torch.no_grad():
        yield


@pytest.fixture
def case() -> unittest.TestCase:
    """What SGLang's kit reports to; a case that it would skip is a failure."""

    class Case(unittest.TestCase):
        def skipTest(self, reason: str) -> None:
            raise AssertionError(f"the kit skipped a case: {reason}")

    return Case()
