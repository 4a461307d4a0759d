"""Time functions that compete: one call each in turn, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def interleaved(
    functions: dict[str, Callable[[], object]], *, seconds: float, min_rounds: int = 5
) -> dict[str, list[float]]:
    """Call the functions in turn until `seconds` have passed; return each one's times in seconds.

    The first call of each warms up and is not counted. Between two calls of one function all
    others run, so caches hold no more of its data than in an engine that runs other layers.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < min_rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times
