"""CUDA graphs of the FlashInfer-shaped wrappers: what is captured follows every later plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wrapper_cases import (
    ON_CUDA,
    Case,
    PagedTable,
    assert_state,
    decode_wrapper,
    graph_decode_wrapper,
    int32,
    make_case,
    plan_decode,
    plan_prefill,
    prefill_buffers,
    prefill_wrapper,
)

pytestmark = ON_CUDA

HEADS = (8, 2)
PAGE_SIZE = 16
POOL_PAGES = 300
Pool = tuple[torch.Tensor, torch.Tensor]


def make_pool() -> Pool:
    """K and V at addresses that a graph can keep."""
    shape = (POOL_PAGES, PAGE_SIZE, HEADS[1], 64)
    return torch.empty(shape).bfloat16(), torch.empty(shape).bfloat16()


def lay_into(pool: Pool, table: PagedTable) -> None:
    """Replace what the pool holds by a step's cache; all else is NaN."""
    for into, cache in zip(pool, table.cache, strict=True):
        into.fill_(float("nan"))
        into[: cache.shape[0]] = cache


def assert_same_bits(got: Any, expected: Any) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


# A full step, the one captured; then other lengths, padding requests, nothing at all, long ones.
DECODE_STEPS = ([300, 5, 64, 17], [1, 800, 0, 31], [40, 7, 0, 0], [0] * 4, [2000, 1999, 3, 16])


def decode_case(kv_lens: list[int]) -> Case:
    return make_case([1] * len(kv_lens), kv_lens, heads=HEADS)


@pytest.mark.parametrize("metadata", ["cuda", "cpu"])
def test_a_captured_decode_follows_every_plan(metadata: str) -> None:
    wrapper, _ = graph_decode_wrapper(4, POOL_PAGES)
    pool = make_pool()
    q = torch.empty(4, HEADS[0], 64, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(4, HEADS[0])

    def load(kv_lens: list[int]) -> tuple[Case, PagedTable]:
        case = decode_case(kv_lens)
        table = case.paged(PAGE_SIZE).to(metadata)
        lay_into(pool, table)
        q.copy_(case.rows)
        plan_decode(wrapper, case, table, PAGE_SIZE)
        return case, table

    load(DECODE_STEPS[0])
    wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
    for kv_lens in DECODE_STEPS:
        case, table = load(kv_lens)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        assert_state((out, lse), case.expected())
        eager = decode_wrapper()
        plan_decode(eager, case, table, PAGE_SIZE)
        assert_same_bits((out, lse), eager.run_return_lse(q, pool))


def test_a_captured_plan_reads_its_tables_anew() -> None:
    """plan() on tensors of the GPU is launches alone, so a graph holds it together with run()."""
    wrapper, _ = graph_decode_wrapper(4, POOL_PAGES)
    pool = make_pool()
    tables = PagedTable(pool, int32([0] * 5), int32([0] * POOL_PAGES), int32([0] * 4))
    q = torch.empty(4, HEADS[0], 64, dtype=torch.bfloat16)

    def load(kv_lens: list[int]) -> Case:
        case = decode_case(kv_lens)
        table = case.paged(PAGE_SIZE)
        lay_into(pool, table)
        q.copy_(case.rows)
        tables.indptr.copy_(table.indptr)
        tables.indices[: len(table.indices)] = table.indices
        tables.last_page_len.copy_(table.last_page_len)
        return case

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan_decode(wrapper, case, tables, PAGE_SIZE)
        return wrapper.run_return_lse(q, pool)

    case = load(DECODE_STEPS[0])
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = step()
    for kv_lens in DECODE_STEPS:
        case = load(kv_lens)
        graph.replay()
        assert_state(state, case.expected())


def test_host_tables_are_refused_inside_a_capture() -> None:
    wrapper, _ = graph_decode_wrapper(4, POOL_PAGES)
    case = decode_case(DECODE_STEPS[0])
    table = case.paged(PAGE_SIZE)
    plan_decode(wrapper, case, table, PAGE_SIZE)
    counter, host_table = torch.zeros(1), table.to("cpu")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        counter.add_(1)  # torch warns of graphs without a launch
        with pytest.raises(RuntimeError, match="indptr is on the host, and a CUDA graph cannot"):
            plan_decode(wrapper, case, host_table, PAGE_SIZE)


# (qo_lens, kv_lens): the step captured has the most rows.
PREFILL_STEPS = (
    ([6, 70, 1], [33, 70, 200]),
    ([1, 1, 1], [60, 0, 9]),
    ([70, 0, 0], [130, 0, 0]),
    ([0, 0, 0], [0, 0, 0]),
    ([3, 60, 14], [300, 900, 15]),
)
MAX_ROWS = 77


@pytest.mark.parametrize("metadata", ["cuda", "cpu"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "custom mask"])
def test_a_captured_prefill_follows_every_plan(is_masked: bool, metadata: str) -> None:
    """Rows past those of a step are NaN in q, and are not written in out and lse."""
    mask_buffers = {
        "custom_mask_buf": torch.zeros(1 << 14, dtype=torch.uint8),
        "mask_indptr_buf": int32([0] * 4),
    }
    wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(3, POOL_PAGES), **mask_buffers)
    pool = make_pool()
    q = torch.empty(MAX_ROWS, HEADS[0], 64, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(MAX_ROWS, HEADS[0])

    def load(qo_lens: list[int], kv_lens: list[int]) -> tuple[Case, PagedTable, dict[str, Any]]:
        case = make_case(qo_lens, kv_lens, heads=HEADS)
        table = case.paged(PAGE_SIZE).to(metadata)
        lay_into(pool, table)
        q.fill_(float("nan"))
        q[: sum(qo_lens)] = case.rows
        masks = [torch.rand(*lens) < 0.5 for lens in zip(qo_lens, kv_lens, strict=True)]
        plan_prefill(wrapper, case, table, PAGE_SIZE, **plan_options(masks))
        return case, table, {"custom_mask": masks} if is_masked else {"causal": True}

    def plan_options(masks: list[torch.Tensor]) -> dict[str, Any]:
        if not is_masked:
            return {"causal": True}
        return {"custom_mask": torch.cat([mask.flatten() for mask in masks])}

    load(*PREFILL_STEPS[0])
    wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
    for qo_lens, kv_lens in PREFILL_STEPS:
        rows = sum(qo_lens)
        case, table, meaning = load(qo_lens, kv_lens)
        out.fill_(7.0)
        lse.fill_(7.0)
        graph.replay()
        assert_state((out[:rows], lse[:rows]), case.expected(**meaning))
        assert (out[rows:] == 7.0).all()
        assert (lse[rows:] == 7.0).all()
        eager = prefill_wrapper()
        masks = meaning.get("custom_mask", [])
        plan_prefill(eager, case, table, PAGE_SIZE, **plan_options(masks))
        assert_same_bits((out[:rows], lse[:rows]), eager.run_return_lse(q[:rows], pool))
