"""Time one small kernel against its peers: alone on a cold L2, and inside a CUDA graph."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle, islice
from typing import Any, TypeVar

from benchmarks.cuda_timing import cold_calls, graphed_calls
from benchmarks.report import Row, print_row

__all__ = [
    "CALLS_PER_GRAPH",
    "Call",
    "importable",
    "inputs_of_a_graph",
    "time_cell",
    "time_cells",
]

Call = Callable[[], object]
Cell = TypeVar("Cell")
Backend = TypeVar("Backend")
Input = TypeVar("Input")

CALLS_PER_GRAPH = 20
# Many times an L2: inputs that come round again after as much are cold.
MAX_INPUT_BYTES = 1 << 30
OURS = "fi_backend"


def time_cells(
    cells: Iterable[Cell],
    backends: Mapping[str, Backend],
    run_cell: Callable[[Cell, dict[str, Backend]], list[Row]],
) -> list[Row]:
    """Run every cell with ours alone, then with all; return the last rows of each cell.

    Ours come first because a peer may take a minute to import and compile, or be missing: rows of
    ours are there all the same.

    Args:
        cells: what to run.
        backends: by name; the first word of a peer's name is its package.
        run_cell: times one cell with some of the backends, prints and returns their rows.
    """
    cells = list(cells)
    ours = {name: make for name, make in backends.items() if _package(name) == OURS}
    rows = [row for cell in cells for row in run_cell(cell, ours)]
    missing = {package for package in map(_package, backends) if not _imports(package)}
    here = {name: make for name, make in backends.items() if _package(name) not in missing}
    if here.keys() == ours.keys():
        return rows
    return [row for cell in cells for row in run_cell(cell, here)]


def _package(backend: str) -> str:
    return backend.partition(" ")[0]


def _imports(package: str) -> bool:
    """Import a package; say how long it took, or why it cannot be."""
    start = time.perf_counter()
    try:
        importlib.import_module(package)
    except ImportError as error:
        print(f"{package} is not measured: {error}", flush=True)
        return False
    if package != OURS:
        print(f"{package} imported in {time.perf_counter() - start:.1f} s", flush=True)
    return True


def inputs_of_a_graph(make: Callable[[], Input], num_bytes: int) -> list[Input]:
    """Make the inputs of a graph's calls, of which as many differ as MAX_INPUT_BYTES hold.

    Args:
        make: draws the input of one call.
        num_bytes: what one call moves.
    """
    distinct = min(CALLS_PER_GRAPH, MAX_INPUT_BYTES // num_bytes + 1)
    return list(islice(cycle([make() for _ in range(distinct)]), CALLS_PER_GRAPH))


def importable(
    backends: Mapping[str, Callable[..., Call]], inputs: Iterable[tuple[Any, ...]]
) -> dict[str, list[Call]]:
    """Make each backend's call on each input; leave out those that raise ImportError."""
    inputs = list(inputs)
    calls = {}
    for name, make in backends.items():
        try:
            calls[name] = [make(*arguments) for arguments in inputs]
        except ImportError:
            continue
    return calls


def time_cell(
    name: str,
    num_bytes: int,
    calls: dict[str, list[Call]],
    errors: dict[str, float],
    seconds: float,
) -> list[Row]:
    """Time the first call of each backend, and a graph of all; print and return their rows.

    Args:
        name: the cell's name; rows of the graph add "in a graph".
        num_bytes: what one call must move.
        calls: CALLS_PER_GRAPH calls of each backend, ours being "fi_backend".
        errors: each backend's error.
        seconds: for each of the two timings.
    """
    alone = {backend: sequence[0] for backend, sequence in calls.items()}
    timings = {
        name: cold_calls(alone, seconds=seconds),
        f"{name} in a graph": graphed_calls(dict(calls), seconds=seconds),
    }
    rows = []
    for cell, times in timings.items():
        for backend, taken in times.items():
            rate = num_bytes / taken * 1e-9
            rows.append(Row(cell, backend, taken * 1e6, "gbs", rate, errors[backend]))
            print_row(rows[-1], times["fi_backend"] * 1e6)
    return rows
