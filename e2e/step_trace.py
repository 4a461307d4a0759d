"""Where an engine's steps spend their time: GPU kernels, gaps between them, the host's part."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from e2e.engine import builders_of, runner_of

__all__ = ["StepTrace", "busy_us", "host_parts", "render"]

_KINDS = ("prefill", "decode")
_WARM_STEPS = 4  # of a kind, before any is looked at
_Interval = tuple[float, float]


class StepTrace:
    """Watches the steps of an engine in this process, from construction to `summary`.

    A step is "decode" if every request has one token in it, else "prefill", decodes beside prompts
    included. `num_profiled` consecutive steps of each kind are profiled on the GPU; profiling slows
    the host, so the host's times are those of the other steps.
    """

    def __init__(self, engine: Any, num_profiled: int = 12) -> None:
        self._num_profiled = num_profiled
        self._runner = runner_of(engine)
        self._profile: profile | None = None
        self._profiled = 0  # steps since it began
        self._kind = ""
        self._in_row = 0  # steps of this kind, one after the other
        self._entered = 0.0
        self._host_us: dict[str, float] = defaultdict(float)  # of the step under way
        self._steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
        self._gpu: dict[str, dict[str, Any]] = {}
        self._patches = ExitStack()
        self._replace(self._runner, "execute_model", self._watch(self._runner.execute_model))
        for owner, name, part in host_parts(self._runner):
            self._replace(owner, name, self._timed(part, getattr(owner, name)))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return for each kind of step: times per step in us, and its kernels by name."""
        self._stop()
        self._patches.close()
        found: dict[str, dict[str, Any]] = {}
        for kind, steps in self._steps.items():
            of_kind = dict(self._gpu.get(kind, {}))
            if steps:
                of_kind["steps"] = len(steps)
                of_kind |= {name: median(step[name] for step in steps) for name in steps[0]}
            if of_kind:
                found[kind] = of_kind
        return found

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._patches.enter_context(patch.object(owner, name, function))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._host_us[part] += 1e6 * (time.perf_counter() - begin)

        return timed

    def _watch(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        def watched(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = scheduled.num_scheduled_tokens.values()
            if tokens:
                self._next_step("decode" if max(tokens) == 1 else "prefill")
            return execute(scheduled, *args, **kwargs)

        return watched

    def _next_step(self, kind: str) -> None:
        """A step of `kind` begins, and with it the one before ends."""
        if self._profile is None and self._in_row > _WARM_STEPS:
            period = 1e6 * (time.perf_counter() - self._entered)
            host = {part: self._host_us[part] for part in ("build", "layers")}
            self._steps[self._kind].append({"step_us": period, **host})
        if kind != self._kind or self._profiled == self._num_profiled:
            self._stop()
            self._kind, self._in_row = kind, 0
        self._in_row += 1
        if self._in_row == _WARM_STEPS and kind not in self._gpu and torch.cuda.is_available():
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        self._profiled += self._profile is not None
        self._host_us.clear()
        self._entered = time.perf_counter()

    def _stop(self) -> None:
        if self._profile is None:
            return
        torch.cuda.synchronize()
        self._profile.stop()
        steps, self._profiled = self._profiled, 0
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [event for event in self._profile.events() if event.device_type == on_gpu]
        self._profile = None
        counts: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for event in events:
            counts[event.name] += 1
            times[event.name] += event.time_range.end - event.time_range.start
        intervals = [(event.time_range.start, event.time_range.end) for event in events]
        self._gpu[self._kind] = {
            "profiled": steps,
            "gpu_us": (max(e for _, e in intervals) - min(b for b, _ in intervals)) / steps,
            "busy_us": busy_us(intervals) / steps,
            "kernels": {
                name: {"times": counts[name] / steps, "us": us / steps}
                for name, us in times.most_common()
            },
        }


def host_parts(runner: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield what a runner calls of its attention backend: an object, a method, and its part.

    The part is "build", once a step and group of layers, or "layers".
    """
    for builder in builders_of(runner):
        yield builder, "build", "build"
    for layer in runner.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        for name in ("forward", "do_kv_cache_update"):
            if hasattr(impl, name):
                yield impl, name, "layers"


def busy_us(intervals: Iterable[_Interval]) -> float:
    """Return how long at least one of the intervals (begin, end) lasts; they may overlap."""
    busy, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def render(name: str, summary: dict[str, dict[str, Any]], num_kernels: int = 8) -> str:
    """Return a few lines for people: of each kind of step, and of its longest kernels."""
    lines = []
    for kind, found in summary.items():
        parts = []
        if "steps" in found:
            parts.append(f"{found['step_us']:.0f} us a step")
            parts.append(f"host: build {found['build']:.0f}, layers {found['layers']:.0f}")
        if "kernels" in found:
            idle = found["gpu_us"] - found["busy_us"]
            parts.append(f"GPU busy {found['busy_us']:.0f}, idle {idle:.0f}")
        lines.append(f"  {name} {kind}: {'; '.join(parts)}")
        for kernel, of_kernel in list(found.get("kernels", {}).items())[:num_kernels]:
            plain = kernel.removeprefix("void ").replace("at::native::", "")[:72]
            lines.append(f"    {of_kernel['us']:8.1f} us {of_kernel['times']:6.1f} x {plain}")
    return "\n".join(lines)
