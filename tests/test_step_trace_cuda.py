"""100 steps of an engine on a GPU: what they launch, and what they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from sync_debug import nothing_waits
from test_attention import make_case
from test_attention_cuda import SPEC, to_gpu
from torch.profiler import ProfilerActivity, profile

import fi_backend
from fi_backend import PagedAttention, PagedBatch, Workspace, append_to_cache

pytestmark = pytest.mark.gpu

STEPS, LAYERS = 100, 2
# Calls of CUDA that wait, allocate or move memory.
UNWANTED = ("Malloc", "Free", "MemAlloc", "Memcpy", "Memset", "Synchronize", "Query", "Event")


def trace(run: Callable[[], None]) -> tuple[Counter[str], Counter[str]]:
    """Count what `run` does on the GPU, and its calls of CUDA, by name."""
    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True
    ) as traced:
        run()
        torch.cuda.synchronize()
    events = traced.events()
    on_gpu = torch.autograd.DeviceType.CUDA
    done = Counter(event.name for event in events if event.device_type == on_gpu)
    called = Counter(e.name for e in events if e.name.startswith("cu") and e.name not in done)
    return done, called


def test_steps_launch_our_kernels_and_do_nothing_else() -> None:
    q, kv, batch = to_gpu(make_case(SPEC))
    workspace, layer = Workspace("cuda"), PagedAttention(SPEC, "cuda")
    out = torch.empty_like(q)
    new = torch.zeros(len(q), SPEC.num_kv_heads, SPEC.head_dim_qk, dtype=q.dtype, device="cuda")
    slots = torch.full((len(q),), -1, device="cuda")
    first = fi_backend.plan(SPEC, batch, workspace)

    def step() -> None:
        plan = fi_backend.plan(SPEC, batch, workspace, into=first)
        for _ in range(LAYERS):
            append_to_cache(new, new, kv, slots)
            layer.run(plan, q, kv, out=out)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    step()
    once, calls_of_one = trace(step)
    memory = torch.cuda.memory_stats()["allocation.all.allocated"]
    with nothing_waits():
        steps()
    done, calls = trace(steps)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == memory
    assert done == Counter({name: STEPS * count for name, count in once.items()})
    assert not [name for name in done if "fi::" not in name]
    assert sum(count for name, count in once.items() if "device_plan" in name) == 1
    assert sum(count for name, count in once.items() if "append" in name) == LAYERS
    # What the profiler itself calls does not grow with the steps.
    grown = [name for name, count in calls.items() if count > calls_of_one[name]]
    assert [name for name in grown if "Launch" in name]
    assert not [name for name in grown if any(part in name for part in UNWANTED)]


def test_a_promise_of_few_rows_saves_the_launch_for_many() -> None:
    requests, pages = 40, 3
    rows = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
    table = torch.arange(requests * pages, dtype=torch.int32, device="cuda").view(requests, pages)
    kv_lens = torch.full((requests,), pages * SPEC.page_size, dtype=torch.int32, device="cuda")
    shape = (requests * pages, SPEC.page_size, SPEC.num_kv_heads, SPEC.head_dim_qk)
    kv = (
        torch.randn(shape, dtype=SPEC.q_dtype, device="cuda"),
        torch.randn(shape, dtype=SPEC.q_dtype, device="cuda"),
    )
    q = torch.randn(
        requests, SPEC.num_qo_heads, SPEC.head_dim_qk, dtype=SPEC.q_dtype, device="cuda"
    )
    layer, outs, launched = PagedAttention(SPEC, "cuda"), [], []
    for max_qo_len in (None, 1):
        batch = PagedBatch(rows, kv_lens, block_table=table, max_qo_len=max_qo_len)
        plan = fi_backend.plan(SPEC, batch, Workspace("cuda"))
        outs.append(layer.run(plan, q, kv))
        done, _ = trace(lambda plan=plan: layer.run(plan, q, kv))  # type: ignore[misc]
        launched.append(sum(count for name, count in done.items() if "rows" in name))
    assert torch.equal(*outs)
    assert launched == [2, 1]
