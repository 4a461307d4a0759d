"""What StepTrace makes of an engine's steps; the engine and the GPU are stand-ins."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e2e import step_trace
from e2e.step_trace import StepTrace, busy_us, render

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


class FakeProfile:
    """Two overlapping kernels a step; a step is 10 us."""

    steps = 0

    def __init__(self, activities: Any) -> None:
        self._first = FakeProfile.steps

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def events(self) -> list[Any]:
        def event(name: str, kind: Any, begin: float, end: float) -> Any:
            span = SimpleNamespace(start=begin, end=end)
            return SimpleNamespace(name=name, device_type=kind, time_range=span)

        starts = [10.0 * step for step in range(self._first, FakeProfile.steps)]
        return [
            event(name, kind, at + begin, at + end)
            for at in starts
            for name, kind, begin, end in (
                ("void gemm<float>", CUDA, 0.0, 5.0),
                ("attention", CUDA, 4.0, 6.0),
                ("cudaLaunchKernel", CPU, 0.0, 9.0),
            )
        ]


class Builder:
    def build(self) -> None:
        time.sleep(0.001)


class Impl:
    def forward(self) -> str:
        return "done"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its runner builds once a step and runs one layer."""
    builder, impl = Builder(), Impl()

    def execute(scheduled: Any) -> str:
        FakeProfile.steps += 1
        builder.build()
        return impl.forward()

    group = SimpleNamespace(get_metadata_builder=lambda _: builder)
    layers = {"layer": SimpleNamespace(impl=impl), "other": SimpleNamespace()}
    runner = SimpleNamespace(
        execute_model=execute,
        attn_groups=[[group]],
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    worker = SimpleNamespace(model_runner=runner)
    core = SimpleNamespace(
        model_executor=SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
    )
    outer = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    monkeypatch.setattr(step_trace, "profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return SimpleNamespace(llm_engine=outer, runner=runner, builder=builder, impl=impl)


def run_steps(engine: Any, count: int, tokens: dict[str, int]) -> None:
    for _ in range(count):
        scheduled = SimpleNamespace(num_scheduled_tokens=tokens)
        assert engine.runner.execute_model(scheduled) == "done"


def test_each_kind_of_step_is_profiled_once_and_timed_apart(engine: Any) -> None:
    trace = StepTrace(engine, num_profiled=5)
    run_steps(engine, 30, {"a": 8, "b": 1})
    run_steps(engine, 1, {})  # no tokens: not a step
    run_steps(engine, 30, {"a": 1, "b": 1})
    found = trace.summary()
    assert set(found) == {"prefill", "decode"}
    for of_kind in found.values():
        assert of_kind["profiled"] == 5
        assert of_kind["busy_us"] == pytest.approx(6.0)
        assert of_kind["gpu_us"] == pytest.approx((4 * 10 + 6) / 5)
        assert list(of_kind["kernels"]) == ["void gemm<float>", "attention"]
        assert of_kind["kernels"]["attention"] == {"times": 1.0, "us": pytest.approx(2.0)}
        assert 10 < of_kind["steps"] < 25  # neither profiled nor warming up
        assert of_kind["step_us"] >= of_kind["build"] > 1000
    text = render("ours", found)
    assert "ours decode" in text
    assert "GPU busy 6, idle 3" in text


def test_a_window_that_ends_early_counts_its_own_steps(engine: Any) -> None:
    trace = StepTrace(engine, num_profiled=50)
    run_steps(engine, 10, {"a": 9})
    run_steps(engine, 10, {"a": 1})
    found = trace.summary()
    assert found["prefill"]["profiled"] == found["decode"]["profiled"] == 7
    assert "steps" not in found["decode"]  # none ran without the profiler
    assert "GPU busy 6" in render("ours", found)


def test_the_engine_is_left_as_it_was(engine: Any) -> None:
    execute = engine.runner.execute_model
    trace = StepTrace(engine)
    assert "build" in vars(engine.builder)
    assert engine.runner.execute_model is not execute
    trace.summary()
    assert "build" not in vars(engine.builder)
    assert "forward" not in vars(engine.impl)
    assert engine.runner.execute_model is execute
    assert engine.impl.forward() == "done"


def test_busy_time_counts_overlaps_once() -> None:
    assert busy_us([]) == 0.0
    assert busy_us([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
