"""Time GPU functions as FlashInfer's ``flashinfer.testing.bench_gpu_time`` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fi_backend._cupti_spans import call_spans

__all__ = ["L2Flush", "bench_gpu_time"]

Call = Callable[[], object]

_ESTIMATE_CALLS = 5
# As many times an L2 as the inputs between two uses of one copy must hold for it to be cold.
_COLD_L2_SIZES = 3


class L2Flush:
    """Fills a GPU's L2 by reading, so that a call finds nothing of its own there.

    A flush that writes would leave dirty lines, whose write-back slows the kernel that is timed.

    Args:
        num_bytes: how much is read; larger than any L2, and long enough to read (over 100 us) for
            the host to launch what follows.
    """

    def __init__(self, num_bytes: int = 512 << 20) -> None:
        self._buffer = torch.zeros(num_bytes // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        """Launch the read."""
        torch.amax(self._buffer, 0, out=self._sink)


def bench_gpu_time(
    fn: Callable[..., object],
    dry_run_iters: int | None = None,
    repeat_iters: int | None = None,
    dry_run_time_ms: float = 25,
    repeat_time_ms: float = 100,
    *,
    enable_cupti: bool = False,
    use_cuda_graph: bool = False,
    num_iters_within_graph: int = 10,
    input_args: Sequence[Any] = (),
    input_kwargs: Mapping[str, Any] | None = None,
    cold_l2_cache: bool = True,
) -> list[float]:
    """Time calls of a function that launches GPU work on the current stream.

    Args:
        fn: called as ``fn(*input_args, **input_kwargs)``.
        dry_run_iters: untimed calls before; None: as many as fill `dry_run_time_ms`.
        repeat_iters: timed calls; None: as many as fill `repeat_time_ms`.
        dry_run_time_ms: ms of untimed calls, where their number is not given.
        repeat_time_ms: ms of timed calls, where their number is not given.
        enable_cupti: take the times of kernels from CUPTI, which leaves out launch latency; needs
            the package cupti-python, else CUDA events are used and a warning says so.
        use_cuda_graph: time replays of a graph that holds `num_iters_within_graph` calls.
        num_iters_within_graph: calls a graph holds.
        input_args: positional arguments; lists, tuples and dicts may hold tensors.
        input_kwargs: keyword arguments.
        cold_l2_cache: let no call find its inputs in the L2: it is flushed before each timed call
            or replay, and the calls of a graph take copies of the tensors in turn, which must
            therefore be in `input_args` or `input_kwargs`.

    Returns:
        ms of each timed call; with `use_cuda_graph`, of each replay over its number of calls.

    Raises:
        RuntimeError: there is no GPU.
        ValueError: a count is below 1; or a graph is to be cold but no tensor is in the arguments.
    """
    for name, value in (
        ("dry_run_iters", dry_run_iters),
        ("repeat_iters", repeat_iters),
        ("num_iters_within_graph", num_iters_within_graph),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    kwargs = dict(input_kwargs or {})
    if use_cuda_graph and cold_l2_cache and not _num_bytes((input_args, kwargs)):
        raise ValueError(
            "input_args must hold the tensors of the call with use_cuda_graph and cold_l2_cache, "
            "since its copies take turns; got none. Pass them, or cold_l2_cache=False"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("bench_gpu_time needs an NVIDIA GPU; torch sees none")

    calls_per_round = num_iters_within_graph if use_cuda_graph else 1
    call: Call = partial(fn, *input_args, **kwargs)
    if use_cuda_graph:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size if cold_l2_cache else 0
        call = _graph(fn, _inputs(input_args, kwargs, calls_per_round, l2_bytes)).replay
    flush = L2Flush() if cold_l2_cache else None
    estimate = sum(_event_times(call, None, _ESTIMATE_CALLS)) / _ESTIMATE_CALLS
    for _ in range(_count(dry_run_iters, dry_run_time_ms, estimate)):
        call()
    rounds = _count(repeat_iters, repeat_time_ms, estimate)
    return [time / calls_per_round for time in _times(call, flush, rounds, enable_cupti)]


def _count(asked: int | None, time_ms: float, estimate_ms: float) -> int:
    return max(1, int(time_ms / max(estimate_ms, 1e-3))) if asked is None else asked


def _times(call: Call, before: Call | None, rounds: int, enable_cupti: bool) -> list[float]:
    if enable_cupti:
        try:
            return call_spans(call, before, rounds)
        except ImportError as error:
            warnings.warn(
                f"bench_gpu_time: timing with CUDA events, since CUPTI is not there ({error}); "
                "to have it, run: pip install cupti-python",
                stacklevel=3,
            )
    return _event_times(call, before, rounds)


def _event_times(call: Call, before: Call | None, rounds: int) -> list[float]:
    """Return the ms between an event before and one after each call."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(rounds)]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _graph(
    fn: Callable[..., object], inputs: Sequence[tuple[Sequence[Any], dict[str, Any]]]
) -> torch.cuda.CUDAGraph:
    """Capture a call on each of the inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, loads and allocates, which a capture must not
        for args, kwargs in inputs:
            fn(*args, **kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args, kwargs in inputs:
            fn(*args, **kwargs)
    return graph


def _inputs(
    args: Sequence[Any], kwargs: dict[str, Any], calls: int, l2_bytes: int
) -> list[tuple[Sequence[Any], dict[str, Any]]]:
    """Return the arguments of a graph's calls: the caller's, and as many copies as keep them cold.

    Args:
        args: the caller's positional arguments.
        kwargs: the caller's keyword arguments.
        calls: how many calls there are.
        l2_bytes: size of the L2; 0 where inputs may be warm.
    """
    size = _num_bytes((args, kwargs))
    distinct = min(calls, _COLD_L2_SIZES * l2_bytes // size + 1) if l2_bytes else 1
    copies = [(args, kwargs), *(_copy((args, kwargs)) for _ in range(distinct - 1))]
    return [copies[at % distinct] for at in range(calls)]


def _num_bytes(value: object) -> int:
    """Count the bytes of all tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return 0


def _copy(value: Any) -> Any:
    """Copy nested arguments, each tensor into memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copy(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
