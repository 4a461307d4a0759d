"""Rows of a benchmark run: a table to read, and JSON with the conditions they hold for."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "BENCHMARK_COMMIT"


@dataclass(frozen=True)
class Row:
    """One measurement: `rate` is in `unit`, "gbs" or "tflops"; `err` against float64."""

    cell: str
    backend: str
    us: float
    unit: str
    rate: float
    err: float


def machine_name() -> str:
    """Name the processor, or the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit measured, with a plus sign where files differ from it.

    A copy of the tree without its history is told by BENCHMARK_COMMIT, which comes first.
    """
    stated = os.environ.get(COMMIT_VARIABLE, "").strip()
    if stated:
        return stated

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ("git", *arguments), cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "fi_backend")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def print_row(row: Row, baseline_us: float) -> None:
    """Print one row; the last column is its time relative to ours."""
    print(
        f"{row.cell:38} {row.backend:16} {row.us:10.1f} us {row.rate:8.3f} {row.unit:6} "
        f"err {row.err:.2e} {row.us / baseline_us:6.2f}x",
        flush=True,
    )


def results_path(routine: str) -> Path:
    """Return where this machine's recorded run of a routine lies."""
    folder = "-".join(machine_name().lower().removeprefix("nvidia ").replace(",", "").split())
    return REPOSITORY / "benchmarks" / "results" / folder / f"{routine}.json"


def write(routine: str, rows: list[Row], path: Path | None = None) -> Path:
    """Write rows to benchmarks/results/<machine>/<routine>.json, or to `path`."""
    path = path or results_path(routine)
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions = {
        "gpu": machine_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
    data = [
        {
            "routine": routine,
            "cell": row.cell,
            "backend": row.backend,
            "us": round(row.us, 2),
            row.unit: round(row.rate, 4),
            "err": row.err,
            **conditions,
        }
        for row in rows
    ]
    text = ",\n".join(json.dumps(item) for item in data)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    return path
