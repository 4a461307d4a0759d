"""Time one small kernel against its peers: alone on a cold L2, and inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.cuda_timing import cold_calls, graphed_calls
from benchmarks.report import Row, print_row

__all__ = ["CALLS_PER_GRAPH", "Call", "importable", "time_cell"]

Call = Callable[[], object]

CALLS_PER_GRAPH = 20


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
        for backend, time in times.items():
            rate = num_bytes / time * 1e-9
            rows.append(Row(cell, backend, time * 1e6, "gbs", rate, errors[backend]))
            print_row(rows[-1], times["fi_backend"] * 1e6)
    return rows
