"""What the throughput run makes of its engines' answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.throughput import OURS, Backend, is_ours, record, report, with_setting
from e2e.workloads import CPU

CONTENDERS = {OURS: Backend("flashinfer"), "stock": Backend(None)}


def test_ours_runs_again_with_another_setting() -> None:
    found = with_setting(CONTENDERS, "FI_BACKEND_SHARED_PREFIX=1")
    assert list(found) == [OURS, "fi_backend FI_BACKEND_SHARED_PREFIX=1", "stock"]
    more = found["fi_backend FI_BACKEND_SHARED_PREFIX=1"]
    assert more == Backend("flashinfer", (("FI_BACKEND_SHARED_PREFIX", "1"),))
    assert [is_ours(name) for name in found] == [True, True, False]
    assert with_setting(CONTENDERS, "") == CONTENDERS
    with pytest.raises(SystemExit, match="NAME=VALUE; got FI_BACKEND_SHARED_PREFIX"):
        with_setting(CONTENDERS, "FI_BACKEND_SHARED_PREFIX")


def test_each_of_ours_is_compared_with_the_best_peer(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [[1, 2], [3, 4]]
    answers = {
        OURS: {"seconds": 2.0, "tokens": texts},
        f"{OURS} X=1": {"seconds": 1.0, "tokens": [[1, 2], [3, 5]]},
        "a": {"seconds": 4.0, "tokens": texts},
        "b": {"seconds": 3.0, "tokens": [[0, 0], [0, 0]]},
    }
    rows = {row["backend"]: row for row in report(CPU[0], [answers])}
    assert {name: row["tps_over_stock"] for name, row in rows.items()} == {
        **{OURS: 1.5, f"{OURS} X=1": 3.0},
        **{"a": 1.0, "b": 1.0},
    }
    assert rows[OURS]["out_tps"] == 2.0
    assert "1.500x  same tokens in 1, 2, 0 of 2 texts" in capsys.readouterr().out


def test_rows_say_whether_prefixes_were_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a machine without a folder" / "rows.json"
    for value, expected in (("1", True), ("0", False), ("", None)):
        monkeypatch.setenv("FI_BACKEND_SHARED_PREFIX", value)
        record([{"cell": "a"}], path, routine="e2e_vllm")
        (row,) = json.loads(path.read_text())
        assert (row["cell"], row["routine"], row["shared_prefix"]) == ("a", "e2e_vllm", expected)
