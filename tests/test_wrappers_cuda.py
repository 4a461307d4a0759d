"""The FlashInfer-shaped wrappers on a GPU: nothing waits, one compiled graph, sure bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sync_debug import nothing_waits
from wrapper_cases import (
    ON_CUDA,
    Case,
    assert_state,
    decode_wrapper,
    graph_decode_wrapper,
    int32,
    make_case,
    plan_decode,
    plan_prefill,
    prefill_buffers,
    prefill_wrapper,
    workspace,
)

import fi_backend as fi

pytestmark = ON_CUDA

HEADS = (8, 2)
PAGE_SIZE = 16
Pool = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[], Any]


def decode_case() -> Case:
    return make_case([1] * 4, [300, 5, 0, 17], heads=HEADS)


def decode_steps(metadata: str) -> Iterator[Step]:
    case = decode_case()
    table = case.paged(PAGE_SIZE).to(metadata)
    lens, indptr_on_host = int32([len(k) for k in case.k]).to(metadata), table.indptr.cpu()
    arguments = (table.indptr, table.indices, table.last_page_len, *case.heads, PAGE_SIZE)
    dtype = case.rows.dtype

    def make_step(wrapper: fi.BatchDecodeWithPagedKVCacheWrapper) -> Step:
        def step() -> Any:
            wrapper.plan(*arguments, q_data_type=dtype, seq_lens=lens)
            wrapper.run(case.rows, table.cache)
            fi.fast_decode_plan(
                wrapper, *arguments, q_data_type=dtype, global_override_indptr_cpu=indptr_on_host
            )
            return wrapper.run_return_lse(case.rows, table.cache)

        return step

    yield make_step(decode_wrapper())
    yield make_step(graph_decode_wrapper(4, 40)[0])


def prefill_steps(metadata: str) -> Iterator[Step]:
    case = make_case([6, 70, 1], [33, 70, 200], heads=HEADS)
    table = case.paged(PAGE_SIZE).to(metadata)
    mask = torch.rand(sum(len(q) * len(k) for q, k in zip(case.q, case.k, strict=True))) < 0.5
    rows, dtype = case.rows, case.rows.dtype
    qo_indptr = case.qo_indptr.to(metadata)
    csr = (qo_indptr, table.indptr, table.indices, table.last_page_len)

    def make_step(wrapper: fi.BatchPrefillWithPagedKVCacheWrapper, **options: Any) -> Step:
        def step() -> Any:
            wrapper.plan(*csr, *case.heads, PAGE_SIZE, q_data_type=dtype, **options)
            return wrapper.run_return_lse(rows, table.cache)

        return step

    masks = {
        "custom_mask_buf": torch.zeros(1 << 12, dtype=torch.uint8),
        "mask_indptr_buf": int32([0] * 4),
    }
    for options in ({"causal": True, "pos_encoding_mode": "ALIBI"}, {"custom_mask": mask}):
        yield make_step(prefill_wrapper(), **options)
        wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(3, 40), **masks)
        yield make_step(wrapper, **options)
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    kv_indptr, (k, v) = case.kv_indptr.to(metadata), case.ragged()

    def ragged_step() -> Any:
        ragged.plan(qo_indptr, kv_indptr, *case.heads, q_data_type=dtype, custom_mask=mask)
        return ragged.run_return_lse(rows, k, v)

    yield ragged_step
    mixed, lens = fi.BatchAttention(), int32([len(k) for k in case.k]).to(metadata)

    def mixed_step() -> Any:
        mixed.plan(
            qo_indptr, table.indptr, table.indices, lens, *case.heads, 64, PAGE_SIZE, causal=True
        )
        return mixed.run(rows, table.cache)

    yield mixed_step
    cascade = fi.MultiLevelCascadeAttentionWrapper(2, workspace())

    def cascade_step() -> Any:
        levels = ([tensor] * 2 for tensor in csr)
        cascade.plan(*levels, *case.heads, PAGE_SIZE, q_data_type=dtype)
        return cascade.run(rows, table.cache)

    yield cascade_step
    yield lambda: fi.single_prefill_with_kv_cache(
        case.q[1], case.k[1], case.v[1], custom_mask=mask[: 70 * 70].view(70, 70)
    )
    yield lambda: fi.single_decode_with_kv_cache(case.q[2][0], case.k[2], case.v[2])


@pytest.mark.parametrize("metadata", ["cuda", "cpu"])
@pytest.mark.parametrize("steps", [decode_steps, prefill_steps])
def test_no_step_waits_for_the_device(
    steps: Callable[[str], Iterator[Step]], metadata: str
) -> None:
    for step in steps(metadata):
        expected = step()
        with nothing_waits():
            got = step()
        assert torch.equal(*(x[0] if isinstance(x, tuple) else x for x in (got, expected)))


def test_run_allocates_nothing_that_it_is_given() -> None:
    case = decode_case()
    table, wrapper = case.paged(PAGE_SIZE), decode_wrapper()
    plan_decode(wrapper, case, table, PAGE_SIZE)
    q, scale = case.rows, torch.ones(HEADS[1])
    out, lse = wrapper.run_return_lse(q, table.cache)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    wrapper.run(q, table.cache, out=out, lse=lse, return_lse=True, k_scale=scale, v_scale=scale)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("options", [{}, {"k_scale": 2.0}, {"return_lse": True}], ids=str)
def test_a_compiled_decode_step_is_one_graph(options: dict[str, Any]) -> None:
    case = decode_case()
    table, wrapper = case.paged(PAGE_SIZE), decode_wrapper()
    plan_decode(wrapper, case, table, PAGE_SIZE)

    def step(q: torch.Tensor, cache: Pool) -> Any:
        return wrapper.run(q * 2, cache, sinks=sinks, **options)

    sinks = torch.ones(HEADS[0])
    expected = step(case.rows, table.cache)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(case.rows, table.cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert expected[0].any()


def test_bits_do_not_depend_on_what_else_runs() -> None:
    """100 steps of cut and merged work beside a stream that keeps the GPU busy unevenly."""
    case = make_case([1, 1, 70, 1, 5], [4000, 900, 2500, 17, 300], heads=HEADS)
    table = case.paged(PAGE_SIZE)
    wrapper = prefill_wrapper()
    q, disturbance = case.rows, torch.randn(2048, 2048).bfloat16()
    plan_prefill(wrapper, case, table, PAGE_SIZE, causal=True)
    first = wrapper.run_return_lse(q, table.cache)
    assert_state(first, case.expected(causal=True))
    other, different = torch.cuda.Stream(), torch.zeros(1, dtype=torch.int64)
    other.wait_stream(torch.cuda.current_stream())
    for repeat in range(100):
        with torch.cuda.stream(other):
            for _ in range(repeat % 4):
                disturbance @ disturbance
        plan_prefill(wrapper, case, table, PAGE_SIZE, causal=True)
        for got, expected in zip(wrapper.run_return_lse(q, table.cache), first, strict=True):
            different += (got != expected).sum()
    assert different.item() == 0


@pytest.mark.parametrize("window_left", [0, 40])
def test_pages_left_of_a_window_are_not_read(window_left: int) -> None:
    """They are NaN, and their slots hold 2**31 - 1."""
    qo_lens, kv_lens = [1, 3, 70, 1], [500, 90, 300, 10]
    case = make_case(qo_lens, kv_lens, heads=HEADS)
    lens = zip(qo_lens, kv_lens, strict=True)
    table = case.paged(
        PAGE_SIZE, unreadable=[max(0, kv_len - qo_len - window_left) for qo_len, kv_len in lens]
    )
    wrapper = prefill_wrapper()
    options = {"causal": True, "window_left": window_left}
    plan_prefill(wrapper, case, table, PAGE_SIZE, **options)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(**options))


def test_a_cache_of_more_than_two_to_the_32_elements() -> None:
    """Every other page lies behind 8 GB of cache."""
    case = make_case([1, 70, 2], [300, 100, 40], heads=(8, 8), head_dim=128)
    table = case.paged(PAGE_SIZE, form="one")
    near = table.cache
    far = torch.empty(2**32 // near[0].numel() + near.shape[0], *near.shape[1:], dtype=near.dtype)
    place = torch.arange(near.shape[0], dtype=torch.int32)
    place[1::2] += far.shape[0] - near.shape[0]
    for page, at in zip(near, place.tolist(), strict=True):
        far[at] = page
    used = int(table.indptr[-1])
    table.indices[:used] = place[table.indices[:used].long()]
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, PAGE_SIZE, causal=True)
    assert_state(wrapper.run_return_lse(case.rows, far), case.expected(causal=True))
