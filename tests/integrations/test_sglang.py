"""Runs the tests of tests/integrations/sglang, SGLang's own kit among them, where SGLang is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from e2e.sglang_site import ROOT, sglang_path

# Three minutes of two idle cores, what is compiled included; of a busy machine, many more.
TIMEOUT_SECONDS = 1170


@pytest.mark.timeout(TIMEOUT_SECONDS + 30)
def test_inside_sglang() -> None:
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang is installed in this environment: its tests run by themselves")
    try:
        path = sglang_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/integrations/sglang"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    tail = "\n".join(done.stdout.splitlines()[-40:])
    print(tail)
    assert done.returncode == 0, tail
    assert " passed" in tail
