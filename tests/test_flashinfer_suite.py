"""FlashInfer's tests run on this package: what the plugin of scripts/ counts, and as what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Written like FlashInfer's tests.
SUITE = """
import pytest
import torch

import flashinfer
from flashinfer.jit import MissingJITCacheError
from flashinfer.utils import get_compute_capability, is_sm100a_supported

def rows():
    return torch.ones(2, 64, device="cuda:0")

@pytest.mark.parametrize("case", range(5))
def test_passes(case):
    assert get_compute_capability(torch.device("cuda"))[0] >= 8
    y = flashinfer.norm.rmsnorm(rows(), torch.ones(64).to(0))
    torch.testing.assert_close(y, rows().cuda())

def test_refused():
    flashinfer.BatchDecodeWithPagedKVCacheWrapper(rows(), backend="cudnn")

def test_absent():
    flashinfer.gemm.SegmentGEMMWrapper(rows())

def test_skipped():
    if not is_sm100a_supported(torch.device("cuda")):
        pytest.skip("another GPU")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

def test_fails():
    assert flashinfer.norm.rmsnorm is None
"""


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    options = ["--noconftest", "-p", "no:cacheprovider", "-p", "flashinfer_suite", "--sample", "3"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        [*command, *options, "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "| file | passed | refused | absent | skipped | failed |" in done.stdout, done.stdout
    assert "| test_it.py | 3 | 1 | 1 | 2 | 1 |" in done.stdout, done.stdout
