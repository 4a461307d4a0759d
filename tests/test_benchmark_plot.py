"""What the plots draw of recorded rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.plot import ROUTINES, main, series


def test_prefill_by_length() -> None:
    """One request whose tokens are all queries, in one head layout; other cells stay out."""
    cells = {
        "bs1 q8192 ctx8192 hq32 hkv8 d128 p16 causal1": 600,
        "bs1 q1024 ctx1024 hq32 hkv8 d128 p16 causal1": 300,
        "bs1 q2048 ctx32768 hq32 hkv8 d128 p16 causal1": 1,
        "bs1 q8192 ctx8192 hq32 hkv8 d64 p16 causal1": 2,
        "bs1 q8192 ctx8192 hq32 hkv8 d128 p16 causal1 swa1024": 3,
        "bs16 q1024 ctx1024 hq32 hkv8 d128 p16 causal1": 4,
    }
    rows = [{"cell": cell, "backend": "a", "tflops": rate} for cell, rate in cells.items()]
    assert series(ROUTINES["prefill"], rows) == {"a": [(1024.0, 300), (8192.0, 600)]}


def test_decode_by_bytes() -> None:
    """Microseconds times GB/s are kilobytes; backends are apart."""
    cell = "bs8 ctx4096 hq32 hkv8 d128 p16"
    rows = [
        {"cell": cell, "backend": "a", "us": 40.0, "gbs": 3000.0},
        {"cell": cell, "backend": "b", "us": 50.0, "gbs": 2400.0},
        {"cell": cell + " fp8", "backend": "b", "us": 50.0, "gbs": 2400.0},
    ]
    assert series(ROUTINES["decode"], rows) == {"a": [(1.2e8, 3000.0)], "b": [(1.2e8, 2400.0)]}


def cascade_rows(times: dict[str, tuple[float, float]]) -> list[dict[str, object]]:
    """Rows of cells from their times, shared and unshared, in us."""
    backends = ("fi_backend", "fi_backend unshared")
    return [
        {"routine": "cascade", "gpu": "a GPU", "cell": cell, "backend": backend, "us": us}
        for cell, both in times.items()
        for backend, us in zip(backends, both, strict=True)
    ]


SHARED = {
    "bs128 shared8192 own256": (100.0, 500.0),
    "bs128 shared1024 own256": (50.0, 75.0),
    "bs8 shared1024 own256": (40.0, 20.0),
    "bs128 shared0 own256": (1.0, 1.0),
    "bs32 shared2048 own128": (1.0, 1.0),
    "bs120 shared6000 own250 in 3 groups": (1.0, 1.0),
}


def test_shared_prefixes_by_length_and_requests() -> None:
    """Time without sharing over time with it, plan included; peers and layers alone stay out."""
    rows = cascade_rows(SHARED)
    for backend in ("fi_backend layer", "fi_backend unshared layer", "fa3 paged"):
        rows.append({"cell": "bs128 shared8192 own256", "backend": backend, "us": 7.0})
    rows.append({"cell": "bs64 shared8192 own256", "backend": "fi_backend unshared", "us": 7.0})
    lines = series(ROUTINES["cascade"], rows)
    assert lines == {
        "128 requests": [(1024.0, 1.5), (8192.0, 5.0)],
        "8 requests": [(1024.0, 0.5)],
    }
    assert list(lines) == ["128 requests", "8 requests"]


def test_a_recorded_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="it is of the extra `bench`")
    recorded, drawn = tmp_path / "cascade.json", tmp_path / "speedup.svg"
    recorded.write_text(json.dumps(cascade_rows(SHARED)))
    monkeypatch.setattr(sys, "argv", ["plot", str(recorded), str(drawn)])
    main()
    assert "<svg" in drawn.read_text()
