"""The device planner writes, byte for byte, what the host planner writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_modules import plan_spec
from hypothesis import given, settings
from sync_debug import nothing_waits

from fi_backend.kernels import device_plan as planner
from tests.kernels.attention_cuda_case import planner_target
from tests.kernels.plan_step import HEADER, Step, steps, without_rows

pytestmark = pytest.mark.gpu

Plan = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def plan(cuda_module: Any) -> Plan:
    """Return a function that launches a step's plan into a poisoned buffer."""
    module = cuda_module(plan_spec, ())

    def launch(
        step: Step,
        lengths: dict[str, torch.Tensor] | None = None,
        buffer: torch.Tensor | None = None,
        enable_pdl: bool = False,
    ) -> torch.Tensor:
        tensors = on_device(step) if lengths is None else lengths
        out = step.buffer().cuda() if buffer is None else buffer
        g = step.geometry()
        same_types = g.pop("q_dtype") == g.pop("kv_dtype")
        kernels = True, True  # for sm_90a, and for both lines
        module.device_plan(out, *tensors.values(), *g.values(), same_types, *kernels, enable_pdl)
        return out

    return launch


def on_device(step: Step) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in step.lengths().items()}


def make_step(qo_lens: Any, kv_lens: Any, *, group_size: int = 4, **changes: Any) -> Step:
    options: dict[str, Any] = dict(
        num_kv_heads=8, causal=True, window_left=-1, num_workers=132, split=0, many_rows_only=False
    )
    lens = tuple(map(int, qo_lens)), tuple(map(int, kv_lens))
    return Step(*lens, group_size=group_size, target=planner_target(), **(options | changes))


@given(steps(max_len=100_000, targets=("cuda",)))
@settings(deadline=None, max_examples=300)
def test_any_step(plan: Plan, step: Step) -> None:
    step = replace(step, target=planner_target())
    assert torch.equal(plan(step).cpu(), step.plan())


def adversarial() -> Iterator[tuple[str, tuple[Any, Any]]]:
    ones, zeros = [1] * 256, [0] * 256
    yield "none", ([], [])
    yield "all empty", (zeros, zeros)
    yield "rows without keys", (ones, zeros)
    yield "keys without rows", (zeros, ones)
    yield "one key each", (ones, ones)
    yield "one huge among tiny", (ones, [*ones[:100], 1_000_000, *ones[101:]])
    yield "one long prefill among tiny", ([1_000_000, *ones[1:]], [1_000_000, *ones[1:]])
    yield "longest lengths", (ones[:5], [2**31 - 1] * 5)
    for count in (31, 32, 33, 512, 513, 1023, 1024, 1025, 8192, 20_000):
        yield (
            f"{count} requests",
            (
                torch.randint(0, 3, (count,)) * torch.randint(0, 100, (count,)),
                torch.randn(count).mul(2).add(6).exp().clamp(max=10**6).long(),
            ),
        )


@pytest.mark.parametrize("lens", list(adversarial()), ids=lambda case: case[0])
def test_adversarial_lengths(plan: Plan, lens: Any) -> None:
    for group_size in (1, 4, 5, 16):
        for changes in (
            {},
            dict(window_left=1023),
            dict(causal=False, split=512),
            dict(split=-1),
            dict(many_rows_only=True, num_workers=1100),
        ):
            step = make_step(*lens[1], group_size=group_size, **changes)
            assert torch.equal(plan(step).cpu(), step.plan()), (group_size, changes)


def test_lengths_that_no_engine_means_are_empty(plan: Plan) -> None:
    lengths = {
        "qo_indptr": torch.tensor([-4, 2, 7, 3, 303, 304], dtype=torch.int32, device="cuda"),
        "kv_lens": torch.tensor([40, -1, 9, 400, 30], dtype=torch.int32, device="cuda"),
    }
    step = make_step((0, 5, 0, 300, 1), (40, 0, 9, 400, 30))
    made = without_rows(plan(step, lengths).cpu(), step.num_workers)
    assert torch.equal(made, without_rows(step.plan(), step.num_workers))


def test_garbage_terminates(plan: Plan) -> None:
    """Whatever memory holds: no fault, and places inside the batch."""
    info = torch.iinfo(torch.int32)
    for _ in range(20):
        lengths = {
            "qo_indptr": torch.randint(info.min, info.max, (301,), dtype=torch.int32).cuda(),
            "kv_lens": torch.randint(info.min, info.max, (300,), dtype=torch.int32).cuda(),
        }
        step = make_step([0] * 300, [0] * 300)
        buffer = plan(step, lengths).cpu()
        requests = buffer[HEADER + 4 * 301 :][: 8 * 133].view(-1, 4)[:, 0]
        assert requests.min() >= 0
        assert requests.max() <= 300


def test_a_graph_replays_with_other_lengths(plan: Plan) -> None:
    """Same launch, new values: longer, shorter, and with padding in place of requests."""
    steps_of_the_graph = [
        make_step(torch.randint(1, 3, (256,)), torch.randint(1, 9000, (256,))),
        make_step([1] * 40 + [0] * 216, [70_000] * 40 + [0] * 216),
        make_step([900, 3] * 128, [1000, 50] * 128),
        make_step([0] * 256, [0] * 256),
    ]
    lengths = on_device(steps_of_the_graph[0])
    buffer = steps_of_the_graph[0].buffer().cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # As dependents, each overwriting what the one before wrote.
        for _ in range(3):
            plan(steps_of_the_graph[0], lengths, buffer, enable_pdl=True)
    for step in steps_of_the_graph:
        for name, tensor in on_device(step).items():
            lengths[name].copy_(tensor)
        buffer.fill_(-7)
        graph.replay()
        assert torch.equal(buffer.cpu(), step.plan())


def test_nothing_waits_or_allocates() -> None:
    """Through the public loader; torch raises where a call would wait for the GPU."""
    step = make_step([1] * 300, range(300))
    lengths, buffer = on_device(step), step.buffer().cuda()
    arguments = dict(plan_buffer=buffer, **lengths, **step.geometry(), enable_pdl=True)
    planner.device_plan(**arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with nothing_waits():
        for _ in range(100):
            planner.device_plan(**arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(buffer.cpu(), step.plan())


def test_launches_on_the_current_stream(plan: Plan) -> None:
    step = make_step([1] * 64, range(64))
    lengths, buffer = on_device(step), step.buffer().cuda()
    late = {name: torch.zeros_like(tensor) for name, tensor in lengths.items()}
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read the zeros
        for name, tensor in lengths.items():
            late[name].copy_(tensor)
        plan(step, late, buffer)
    side.synchronize()
    assert torch.equal(buffer.cpu(), step.plan())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, "num_workers from 1 to 16383, got"),
        ({"qo_indptr": torch.zeros(2, dtype=torch.int32)}, r"shape must be \[3\], got \[2\]"),
        ({"kv_lens": torch.zeros(2)}, "kv_lens: dtype must be int32, got float32"),
        ({"kv_lens": "host"}, "kv_lens: must be on device cuda:0, got cpu"),
        ({"num_qo_heads": 7}, "multiple of num_kv_heads, got 7 and 2"),
        ({"window_left": -2}, "window_left and split must be"),
        ({"plan_buffer": torch.zeros(8, dtype=torch.int32)}, "size it with plan_buffer_ints"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    step = make_step((1, 1), (4, 4), num_kv_heads=2, num_workers=2)
    arguments = dict(plan_buffer=step.buffer().cuda(), **on_device(step), **step.geometry())
    changed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    if change == {"kv_lens": "host"}:
        changed = {"kv_lens": step.lengths()["kv_lens"]}
    with pytest.raises((ValueError, TypeError), match=message):
        planner.device_plan(**(arguments | changed), enable_pdl=False)
