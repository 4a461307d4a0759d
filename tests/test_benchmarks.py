"""What the benchmarks do around their measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report, run, small_kernels
from benchmarks.report import Row


def run_cell(cell: str, backends: dict[str, float]) -> list[Row]:
    rows = [Row(cell, name, us, "gbs", 1.0, 0.0) for name, us in backends.items()]
    for row in rows:
        report.print_row(row, 1.0)
    return rows


def test_ours_are_printed_before_a_peer_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    """json and no_such_package stand for peers."""
    backends = {"fi_backend": 1.0, "fi_backend pair": 2.0, "json": 3.0, "no_such_package tc": 4.0}
    rows = small_kernels.time_cells(["a", "b"], backends, run_cell)
    assert [(row.cell, row.backend) for row in rows] == [
        (cell, name) for cell in "ab" for name in ("fi_backend", "fi_backend pair", "json")
    ]
    said = capsys.readouterr().out.splitlines()
    (missing,) = (i for i, line in enumerate(said) if "no_such_package is not measured" in line)
    assert "No module named" in said[missing]
    ours_alone, others = said[:4], said[4:]
    assert all(" fi_backend" in line for line in ours_alone)
    assert any(line.startswith("json imported in") for line in others)


def test_without_peers_ours_are_timed_once(capsys: pytest.CaptureFixture[str]) -> None:
    backends = {"no_such_package": 4.0, "fi_backend": 1.0}
    (row,) = small_kernels.time_cells(["a"], backends, run_cell)
    assert row.backend == "fi_backend"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_copy_of_the_tree_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    assert report.commit() == "unknown"
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123abc")
    path = report.write(
        "merge", [Row("a", "fi_backend", 1.0, "gbs", 2.0, 0.0)], tmp_path / "x.json"
    )
    (row,) = json.loads(path.read_text())
    assert row["commit"] == "0123abc"
    assert row["gbs"] == 2.0


def test_what_a_run_has_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows are written cell by cell; none begins after the limit, and one that fails loses none."""
    begun = []

    def measure(cells: str, seconds: float) -> Iterator[list[Row]]:
        for name in ("first", "second"):
            begun.append(name)
            if name == cells:
                raise RuntimeError("out of memory")
            yield [Row(name, "fi_backend", 1.0, "gbs", 2.0, 0.0)]

    def cells_of(*arguments: str) -> list[str]:
        path = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["run", "merge", "--output", str(path), *arguments])
        begun.clear()
        try:
            run.main()
        finally:
            written = [row["cell"] for row in json.loads(path.read_text())]
        return written

    monkeypatch.setitem(sys.modules, "benchmarks.merge", SimpleNamespace(run=measure))
    assert cells_of() == ["first", "second"]
    assert cells_of("--limit", "0") == begun == ["first"]
    with pytest.raises(RuntimeError, match="out of memory"):
        cells_of("--cells", "second")
    assert begun == ["first", "second"]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["cell"] == "first"
