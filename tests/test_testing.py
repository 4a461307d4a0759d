"""bench_gpu_time: what it checks and prepares anywhere, and what it measures on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fi_backend import _cupti_spans, testing
from fi_backend.testing import bench_gpu_time


class Pair(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor


@pytest.mark.parametrize("name", ["dry_run_iters", "repeat_iters", "num_iters_within_graph"])
def test_counts_below_1_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        bench_gpu_time(lambda: None, **{name: 0})  # type: ignore[arg-type]


def test_a_cold_graph_needs_its_tensors() -> None:
    with pytest.raises(ValueError, match="input_args must hold the tensors"):
        bench_gpu_time(lambda: None, use_cuda_graph=True, input_args=(1, "x", [None]))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        bench_gpu_time(lambda: None)


def test_number_of_calls() -> None:
    assert testing._count(7, 100, 1) == 7
    assert testing._count(None, 100, 0.5) == 200
    assert testing._count(None, 100, 1000) == 1


def test_copies_take_turns_until_they_fill_the_cache() -> None:
    args, kwargs = (torch.ones(8), 3), {"cache": Pair(torch.zeros(4), torch.ones(4))}
    assert testing._num_bytes((args, kwargs)) == 64
    inputs = testing._inputs(args, kwargs, calls=10, l2_bytes=64)
    pointers = [(a[0].data_ptr(), k["cache"].v.data_ptr()) for a, k in inputs]
    assert len(set(pointers)) == 4
    assert pointers[4:8] == pointers[:4]
    assert inputs[0][0] is args
    copied_args, copied_kwargs = inputs[1]
    assert isinstance(copied_kwargs["cache"], Pair)
    assert copied_args[1] == 3
    torch.testing.assert_close(copied_kwargs["cache"].v, torch.ones(4))
    # No more copies than calls, and none where inputs may be warm.
    assert len({id(a) for a, _ in testing._inputs(args, kwargs, 2, 1 << 20)}) == 2
    assert len({id(a) for a, _ in testing._inputs(args, kwargs, 10, 0)}) == 1


def test_spans_of_rounds() -> None:
    work = [(7, 2_000_000, 3_000_000), (5, 1_000_000, 1_500_000), (9, 0, 9_000_000)]
    work += [(6, 4_000_000, 4_250_000)]
    assert _cupti_spans.spans({5: 0, 7: 0, 6: 1}, work, 2) == [2.0, 0.25]
    with pytest.raises(RuntimeError, match="no GPU work of 1 of 2 calls"):
        _cupti_spans.spans({5: 0}, work, 2)


class Kind(IntEnum):
    MEMCPY = 1
    MEMSET = 2
    RUNTIME = 3
    DRIVER = 4
    CONCURRENT_KERNEL = 5
    EXTERNAL_CORRELATION = 6


class FakeCupti(ModuleType):
    """Records a kernel for every `launch`, as CUPTI does, and delivers all at a flush."""

    ActivityKind = Kind
    ExternalCorrelationKind = SimpleNamespace(CUSTOM0=3)

    def __init__(self) -> None:
        super().__init__("cupti.cupti")
        self.enabled: set[int] = set()
        self.activity_enable = self.enabled.add
        self.activity_disable = self.enabled.remove
        self._records: list[SimpleNamespace] = []
        self._pushed: list[int] = []
        self._time = 0

    def activity_register_callbacks(self, requested: Callable, completed: Callable) -> None:
        assert requested()[0] > 0
        self._completed = completed

    def activity_push_external_correlation_id(self, kind: int, at: int) -> None:
        self._pushed.append(at)

    def activity_pop_external_correlation_id(self, kind: int) -> None:
        self._pushed.pop()

    def launch(self, nanoseconds: int) -> None:
        assert Kind.CONCURRENT_KERNEL in self.enabled
        correlation = len(self._records)
        record = {"correlation_id": correlation, "start": self._time}
        self._time += nanoseconds
        self._records.append(SimpleNamespace(kind=Kind.CONCURRENT_KERNEL, end=self._time, **record))
        for at in self._pushed:
            record = {"correlation_id": correlation, "external_id": at}
            self._records.append(SimpleNamespace(kind=Kind.EXTERNAL_CORRELATION, **record))

    def activity_flush_all(self, flag: int) -> None:
        self._completed(self._records)


def test_cupti_times_a_call_but_not_what_comes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cupti = FakeCupti()
    package = ModuleType("cupti")
    package.cupti = cupti  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupti", package)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        cupti.launch(1_000_000)
        cupti.launch(500_000)

    times = _cupti_spans.call_spans(call, lambda: cupti.launch(9_000_000), 3)
    assert times == [1.5, 1.5, 1.5]
    assert not cupti.enabled


def test_without_cupti_python_events_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti", None)
    monkeypatch.setattr(testing, "_event_times", lambda *args: [4.0])
    with pytest.warns(UserWarning, match="CUDA events, .*pip install cupti-python"):
        assert testing._times(lambda: None, None, 1, True) == [4.0]


@pytest.mark.gpu
@pytest.mark.parametrize("use_cuda_graph", [False, True])
@pytest.mark.parametrize("enable_cupti", [False, True])
def test_a_copy_takes_as_long_as_its_bytes(use_cuda_graph: bool, enable_cupti: bool) -> None:
    """Of 256 MB, far from a launch's latency: between 1 and 8 TB/s, and alike from call to call."""
    if enable_cupti:
        pytest.importorskip("cupti.cupti", reason="needs cupti-python", exc_type=ImportError)
    source = torch.ones(1 << 27, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(source)
    times = bench_gpu_time(
        lambda source, out: out.copy_(source),
        repeat_iters=20,
        enable_cupti=enable_cupti,
        use_cuda_graph=use_cuda_graph,
        input_args=(source, out),
    )
    assert len(times) == 20
    assert 2 * source.numel() / 8e9 < median(times) < 2 * source.numel() / 1e9


@pytest.mark.gpu
def test_a_cold_call_takes_longer_than_a_warm_one() -> None:
    x = torch.ones(4 << 20, dtype=torch.uint8, device="cuda")
    out = torch.empty((), dtype=torch.uint8, device="cuda")

    def call(x: torch.Tensor, out: torch.Tensor) -> None:
        torch.amax(x, 0, out=out)

    options = {"use_cuda_graph": True, "num_iters_within_graph": 40, "input_args": (x, out)}
    cold, warm = (
        median(bench_gpu_time(call, repeat_iters=10, cold_l2_cache=c, **options))  # type: ignore[arg-type]
        for c in (True, False)
    )
    assert warm < cold
