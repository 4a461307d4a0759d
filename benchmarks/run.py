"""Run a benchmark routine: `python -m benchmarks.run cpu`."""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report import Row, machine_name, results_path, write

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


def so_far(measured: Iterable[list[Row]], limit: float) -> Iterator[list[Row]]:
    """Yield after each cell the rows of all so far: a run that is cut short keeps those written.

    Args:
        measured: yields the rows of a cell as it is done.
        limit: no cell begins after so many seconds.
    """
    begin = time.monotonic()
    rows: list[Row] = []
    for of_cell in measured:
        rows += of_cell
        yield rows
        if time.monotonic() - begin >= limit:
            print(f"no further cell after {limit:.0f} s", flush=True)
            return


def main() -> None:
    """Parse the command line, run the routine, record its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("routine", choices=ROUTINES)
    parser.add_argument("--cells", default="", help="only cells whose name contains this text")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each cell")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which no cell begins"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    print(
        f"{arguments.routine} on {machine_name()}; last column: time relative to ours", flush=True
    )
    routine = importlib.import_module(f"benchmarks.{arguments.routine}")
    path = arguments.output or results_path(arguments.routine)
    measured = routine.run(arguments.cells, arguments.seconds)
    for rows in so_far(measured, arguments.limit):
        if not arguments.no_write:
            write(arguments.routine, rows, path)
    if not arguments.no_write:
        print("rows are in", path)


if __name__ == "__main__":
    main()
