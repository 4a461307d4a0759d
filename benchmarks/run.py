"""Run a benchmark routine: `python -m benchmarks.run cpu`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.report import machine_name, write

ROUTINES = (
    "activation",
    "append",
    "cascade",
    "cpu",
    "decode",
    "fused",
    "graph",
    "jit",
    "merge",
    "mixed",
    "norm",
    "plan",
    "prefill",
    "rope",
    "variants",
)


def main() -> None:
    """Parse the command line, run the routine, record its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("routine", choices=ROUTINES)
    parser.add_argument("--cells", default="", help="only cells whose name contains this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each cell")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    print(
        f"{arguments.routine} on {machine_name()}; last column: time relative to ours", flush=True
    )
    routine = importlib.import_module(f"benchmarks.{arguments.routine}")
    rows = routine.run(arguments.cells, arguments.seconds)
    if not arguments.no_write:
        print("wrote", write(arguments.routine, rows, arguments.output))


if __name__ == "__main__":
    main()
