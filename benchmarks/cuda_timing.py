"""Time GPU work with events: one call on a cold L2, one call inside a graph, and the host's share.

Functions that compete take turns, so that all see the same machine and the same clocks. Each
function only launches, on torch's current stream; none may wait for the GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fi_backend.testing import L2Flush

__all__ = ["capture", "cold_calls", "graphed_calls", "host_seconds", "sm_clock_mhz"]

Call = Callable[[], object]


def _elapsed(call: Call, before: Call | None = None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if before is not None:
        before()
    start.record()
    call()
    end.record()
    return start, end


def _take_turns(
    calls: dict[str, Call], before: Call | None, seconds: float, min_rounds: int
) -> dict[str, float]:
    """Call each in turn until `seconds` have passed; return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < deadline:
        events = {name: _elapsed(call, before) for name, call in calls.items()}
        torch.cuda.synchronize()
        rounds += 1
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e-3)
    return {name: statistics.median(values) for name, values in times.items()}


def cold_calls(
    calls: dict[str, Call], *, seconds: float = 0.5, min_rounds: int = 20
) -> dict[str, float]:
    """Time one call of each function on a cold and clean L2.

    Args:
        calls: the competing functions by name.
        seconds: how long to measure, all functions together.
        min_rounds: calls of each function at least.

    Returns:
        The median seconds of a call, the launch latency of its first kernel included.
    """
    for call in calls.values():
        call()
    return _take_turns(calls, L2Flush(), seconds, min_rounds)


def graphed_calls(
    calls: dict[str, Sequence[Call]], *, seconds: float = 0.5, min_rounds: int = 20
) -> dict[str, float]:
    """Time a call inside a graph, as engines replay it.

    Args:
        calls: for each competitor the calls of its graph, in order. For cold caches give 20 or more
            whose inputs are several times the L2 in all.
        seconds: how long to measure, all graphs together.
        min_rounds: replays of each graph at least.

    Returns:
        The median seconds of a replay over its number of calls.
    """
    graphs = {name: capture(sequence) for name, sequence in calls.items()}
    replays: dict[str, Call] = {name: graph.replay for name, graph in graphs.items()}
    for replay in replays.values():
        replay()
    times = _take_turns(replays, None, seconds, min_rounds)
    return {name: times[name] / len(calls[name]) for name in calls}


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return a graph of some calls, which run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, loads and allocates, which a capture must not
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def host_seconds(call: Call, *, rounds: int = 500, burst: int = 20) -> float:
    """Return the median seconds that the host spends in a call.

    The GPU is idle before every burst, so a launch never waits for room in the queue.
    """
    times = []
    for _ in range(max(1, rounds // burst)):
        torch.cuda.synchronize()
        for _ in range(burst):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def sm_clock_mhz() -> int | None:
    """Return the SM clock now, None where NVML is missing."""
    try:
        return int(torch.cuda.clock_rate())
    except (ImportError, RuntimeError):
        return None
