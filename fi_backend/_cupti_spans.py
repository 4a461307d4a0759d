"""How long the GPU works on a call, as CUPTI records it: no launch latency, no gaps before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["call_spans", "spans"]

_BUFFER_BYTES = 8 << 20
_FLUSH_FORCED = 1


def call_spans(
    call: Callable[[], object], before: Callable[[], object] | None, rounds: int
) -> list[float]:
    """Return for each of `rounds` calls the ms from the start of its first work to its last's end.

    Args:
        call: launches GPU work on the current stream.
        before: launched before each call; not part of its time.
        rounds: number of calls.

    Raises:
        ImportError: cupti-python is not installed.
        RuntimeError: CUPTI recorded no work of a call.
    """
    from cupti import cupti

    kind = cupti.ActivityKind
    work_kinds = (kind.CONCURRENT_KERNEL, kind.MEMCPY, kind.MEMSET)
    kinds = (*work_kinds, kind.EXTERNAL_CORRELATION, kind.RUNTIME, kind.DRIVER)
    call_of: dict[int, int] = {}  # by the id of an API call, the round it belongs to
    work: list[tuple[int, int, int]] = []  # id of the API call, start and end in ns

    def completed(activities: Iterable[Any]) -> None:
        for activity in activities:  # they are gone when this returns
            if activity.kind == kind.EXTERNAL_CORRELATION:
                call_of[activity.correlation_id] = activity.external_id
            elif activity.kind in work_kinds:
                work.append((activity.correlation_id, activity.start, activity.end))

    cupti.activity_register_callbacks(lambda: (_BUFFER_BYTES, 0), completed)
    for one in kinds:
        cupti.activity_enable(one)
    try:
        for at in range(rounds):
            if before is not None:
                before()
            cupti.activity_push_external_correlation_id(cupti.ExternalCorrelationKind.CUSTOM0, at)
            call()
            cupti.activity_pop_external_correlation_id(cupti.ExternalCorrelationKind.CUSTOM0)
        torch.cuda.synchronize()
        cupti.activity_flush_all(_FLUSH_FORCED)
    finally:
        for one in kinds:
            cupti.activity_disable(one)
    return spans(call_of, work, rounds)


def spans(
    call_of: dict[int, int], work: Iterable[tuple[int, int, int]], rounds: int
) -> list[float]:
    """Return the ms that each round's work takes; work of no round is left out.

    Args:
        call_of: round by id of the API call.
        work: id of the API call, start and end in ns, in any order.
        rounds: how many there are.

    Raises:
        RuntimeError: a round has no work.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for correlation, start, end in work:
        at = call_of.get(correlation)
        if at is not None:
            first[at] = min(start, first.get(at, start))
            last[at] = max(end, last.get(at, end))
    missing = [at for at in range(rounds) if at not in first]
    if missing:
        raise RuntimeError(
            f"CUPTI recorded no GPU work of {len(missing)} of {rounds} calls (first: call "
            f"{missing[0]}); is another profiler attached? Use enable_cupti=False"
        )
    return [(last[at] - first[at]) * 1e-6 for at in range(rounds)]
