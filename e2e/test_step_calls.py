"""What CallTrace counts of a backend's calls: engine and CUDA are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from e2e import step_calls
from e2e.step_calls import CallTrace, is_clean, unwanted

STEPS, LAYERS = 3, 2


class Backend:
    """Its functions call what they are told; `taken` counts torch's allocations."""

    def __init__(self) -> None:
        self.in_build = self.in_forward = ("cudaLaunchKernel",)
        self.taken = 0

    def build(self) -> None:
        call(*self.in_build)

    def forward(self) -> None:
        call(*self.in_forward)
        self.taken += "takes" in self.in_forward


def call(*names: str) -> None:
    for name in names:
        with record_function(name):
            torch.ones(1)


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def trace(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Callable[[], CallTrace]:
    parts = [(backend, "build", "build"), (backend, "forward", "layers")]
    monkeypatch.setattr(step_calls, "runner_of", lambda _: None)
    monkeypatch.setattr(step_calls, "host_parts", lambda _: parts)
    only_cpu = partial(torch.profiler.profile, activities=[ProfilerActivity.CPU])
    monkeypatch.setattr(step_calls, "profile", lambda activities, **more: only_cpu(**more))
    monkeypatch.setattr(step_calls, "_allocations", lambda: backend.taken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def steps() -> None:
        for _ in range(STEPS):
            backend.build()
            call("cudaStreamSynchronize")  # the engine's own
            for _ in range(LAYERS):
                backend.forward()

    def run() -> CallTrace:
        found = CallTrace(SimpleNamespace())
        found.watch(steps)
        return found

    return run


def test_calls_of_the_backend_are_counted_and_no_others(trace: Callable[[], CallTrace]) -> None:
    found = trace()
    assert found.steps == STEPS
    assert found.allocations == 0
    assert found.calls == {"cudaLaunchKernel": STEPS * (1 + LAYERS)}


def test_what_waits_copies_or_takes_memory_is_found(
    backend: Backend, trace: Callable[[], CallTrace]
) -> None:
    backend.in_build = ("cudaLaunchKernel", "cudaMemcpyAsync")
    backend.in_forward = ("cuLaunchKernelEx", "takes")
    found = trace()
    assert unwanted(found.calls) == ["cudaMemcpyAsync"]
    assert found.calls["cudaMemcpyAsync"] == STEPS
    assert found.calls["cuLaunchKernelEx"] == found.allocations == STEPS * LAYERS
    assert vars(backend).keys() == Backend().__dict__.keys()  # nothing is left patched


@pytest.mark.parametrize(
    ("change", "clean"),
    [
        ({}, True),
        ({"steps": 99}, False),
        ({"calls": {}}, False),
        ({"unwanted": {"cudaFree": 1}}, False),
        ({"allocations": 1}, False),
    ],
)
def test_a_row_without_launches_proves_nothing(change: dict[str, Any], clean: bool) -> None:
    row = {"steps": 120, "calls": {"cudaLaunchKernel": 240}, "unwanted": {}, "allocations": 0}
    assert is_clean(row | change) is clean
