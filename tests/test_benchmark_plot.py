"""What the plots draw of recorded rows."""

from __future__ import annotations

from benchmarks.plot import ROUTINES, series


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
