"""What the attention backend of a running vLLM asks of CUDA, in a hundred steps and more.

    python -m e2e.step_calls
    python -m e2e.step_calls --backend FLASH_ATTN

Two engines one after the other: decode steps in full graphs, where a step calls build() alone, and
eager ones, where it calls each layer too; prompts in chunks beside decodes in both. A row counts
CUDA's calls, and torch's allocations, inside of the backend's functions. A call that waits, copies
or takes memory is `unwanted`; with any of them the exit status is 1. JSON goes to
benchmarks/results/<machine>/e2e_vllm_calls.json, after each engine. It needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.report import results_path
from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.engine import make_engine, release, run_batch, runner_of
from e2e.harness import ENVIRONMENT, Batch
from e2e.served import SAMPLER
from e2e.step_trace import host_parts
from e2e.throughput import record

__all__ = ["CallTrace", "is_clean", "main", "unwanted"]

_MARK = "attention backend"
_TOKENS = 128  # of an answer: more than a hundred steps
_ENGINE: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 29,
    "gpu_memory_utilization": 0.05,
    "enable_flashinfer_autotune": False,
    "async_scheduling": False,  # its thread copies tokens at any time
    "logprobs_mode": "raw_logprobs",
}
_MODES: dict[str, dict[str, Any]] = {
    "decode steps in graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 16, 32],
        },
    },
    "eager steps": {"enforce_eager": True},
}
_UNWANTED = ("Malloc", "Free", "MemAlloc", "Memcpy", "Memset", "Synchronize", "Query", "Event")


def unwanted(calls: Iterable[str]) -> list[str]:
    """Return those names of CUDA's functions that wait, copy or take memory."""
    return sorted(name for name in calls if any(part in name for part in _UNWANTED))


def is_clean(row: dict[str, Any]) -> bool:
    """Whether a row has steps and their launches, and nothing unwanted."""
    launches = any("Launch" in name for name in row["calls"])
    return row["steps"] >= 100 and launches and not row["unwanted"] and not row["allocations"]


class CallTrace:
    """Watches the backend's functions in an engine of this process while `run` is at work.

    Attributes:
        steps: calls of build().
        allocations: of torch, inside of the functions.
        calls: of CUDA, inside of them, by name.
    """

    def __init__(self, engine: Any) -> None:
        self._runner = runner_of(engine)
        self.steps = self.allocations = 0
        self.calls: Counter[str] = Counter()

    def watch(self, run: Callable[[], Any]) -> None:
        """Run, and count."""
        with ExitStack() as patches:
            for owner, name, part in host_parts(self._runner):
                watched = self._watched(getattr(owner, name), part)
                patches.enter_context(patch.object(owner, name, watched))
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            with profile(activities=activities, acc_events=True) as traced:
                run()
                torch.cuda.synchronize()
        on_host = [e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CPU]
        spans = [e.time_range for e in on_host if e.name == _MARK]
        calls = [e for e in on_host if e.name.startswith("cu")]
        self.calls.update(call.name for call in calls_inside(spans, calls))

    def _watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.steps += part == "build"
            before = _allocations()
            with record_function(_MARK):
                result = function(*args, **kwargs)
            self.allocations += _allocations() - before
            return result

        return watched


def _allocations() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def calls_inside(spans: Iterable[Any], calls: Iterable[Any]) -> list[Any]:
    """Return the calls that begin inside of a span; spans do not overlap."""
    ordered = sorted((span.start, span.end) for span in spans)
    begins = [begin for begin, _ in ordered]
    inside = []
    for call in calls:
        at = bisect_right(begins, call.time_range.start) - 1
        if at >= 0 and call.time_range.start < ordered[at][1]:
            inside.append(call)
    return inside


def trace(mode: str, backend: str) -> dict[str, Any]:
    """Start an engine, and return the row of what its steps call."""
    arguments = {**_ENGINE, **_MODES[mode]}
    task = {"model": str(FI_TINY), "dtype": "bfloat16", "backend": backend, "engine": arguments}
    engine = make_engine(task)
    batch = Batch(fi_tiny_prompts(), _TOKENS).describe()
    run_batch(engine, batch)  # what is loaded on first use
    found = CallTrace(engine)
    found.watch(partial(run_batch, engine, batch))
    row = {
        "cell": mode,
        "backend": backend,
        "steps": found.steps,
        "calls": dict(found.calls.most_common()),
        "unwanted": {name: found.calls[name] for name in unwanted(found.calls)},
        "allocations": found.allocations,
    }
    del engine, found
    release()
    return row


def main() -> None:
    """Parse the command line, trace, record the rows."""
    parser = argparse.ArgumentParser(prog="python -m e2e.step_calls", description=__doc__)
    parser.add_argument("--backend", default="flashinfer", help="as a user asks for it")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no NVIDIA GPU")
    os.environ.update(ENVIRONMENT | SAMPLER)
    path = arguments.output or results_path("e2e_vllm_calls")
    rows = []
    for mode in _MODES:
        rows.append(trace(mode, arguments.backend))
        record(rows, path, routine="e2e_vllm_calls")
        print(rows[-1], flush=True)
    sys.exit(int(not all(is_clean(row) for row in rows)))


if __name__ == "__main__":
    main()
