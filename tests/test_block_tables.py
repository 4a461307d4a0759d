"""Attention over block tables in one call, on each device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_kv import paged_kv
from wrapper_cases import (
    ON_CUDA,
    Case,
    assert_out,
    assert_state,
    int32,
    make_case,
    random_examples,
    workspace,
)

import fi_backend as fi
from fi_backend.errors import UnsupportedError

PAGE = 16
LONGEST = 300
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Table:
    """A cache and block table in which everything that must not be read is poison."""

    pair: tuple[torch.Tensor, torch.Tensor]  # [num_pages, num_kv_heads, page_size, head_dim]
    block_tables: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def nhd(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair[0].transpose(1, 2), self.pair[1].transpose(1, 2)


def tabled(case: Case, layout: str = "HND", page: int = PAGE) -> Table:
    kv = paged_kv(case.k, case.v, page, layout=layout)
    pair = (kv.k_cache.transpose(1, 2), kv.v_cache.transpose(1, 2))
    return Table(pair, kv.block_table[: len(case.k)], kv.kv_lens)


def decode(case: Case, table: Table, **options: Any) -> Any:
    """Call with the scale that Case.expected() has."""
    options = {"bmm1_scale": case.head_dim**-0.5, **options}
    lens = options.pop("seq_lens", table.seq_lens)
    return fi.trtllm_batch_decode_with_kv_cache(
        case.rows, table.pair, workspace(), table.block_tables, lens, LONGEST, **options
    )


def context(case: Case, table: Table, **options: Any) -> Any:
    arguments = {
        "max_q_len": max(len(q) for q in case.q),
        "max_kv_len": LONGEST,
        "bmm1_scale": case.head_dim**-0.5,
        "bmm2_scale": 1.0,
        "batch_size": len(case.q),
        "cum_seq_lens_q": case.qo_indptr,
        "cum_seq_lens_kv": case.kv_indptr,
        **options,
    }
    return fi.trtllm_batch_context_with_kv_cache(
        case.rows, table.pair, workspace(), table.block_tables, table.seq_lens, **arguments
    )


@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("window_left", [-1, 20])
def test_decode(heads: tuple[int, int], rows: int, window_left: int, device: str) -> None:
    case = make_case([rows] * 4, [LONGEST, 9, 33, rows], heads=heads, head_dim=128)
    options = {"q_len_per_req": rows, "window_left": window_left, "return_lse": True}
    ignored = {"backend": "trtllm-gen", "mask": torch.zeros(4, rows, 2, dtype=torch.uint16)}
    got = decode(case, tabled(case), **options, **ignored)
    assert_state(got, case.expected(causal=True, window_left=window_left))


def test_decode_of_requests_with_rows_of_their_own(device: str) -> None:
    """Padding rows behind the last request are left alone, in what the caller gave."""
    case = make_case([3, 1, 0, 5], [40, 1, 7, 90], head_dim=128)
    table, rows = tabled(case), torch.cat([case.rows, case.rows[:2]])
    out, lse = torch.full_like(rows, 7.0), torch.full(rows.shape[:2], 7.0)
    returned = fi.trtllm_batch_decode_with_kv_cache(
        rows,
        table.pair,
        workspace(),
        table.block_tables,
        table.seq_lens.view(torch.uint32),
        LONGEST,
        case.head_dim**-0.5,
        out=out,
        lse=lse,
        max_q_len=5,
        cum_seq_lens_q=case.qo_indptr,
    )
    assert returned is out
    assert_state((out[:9], lse[:9]), case.expected(causal=True))
    assert bool((out[9:] == 7.0).all())
    assert bool((lse[9:] == 7.0).all())


@pytest.mark.parametrize("causal", [True, False])
def test_context(causal: bool, device: str) -> None:
    case = make_case([40, 1, 100, 16], [LONGEST, 1, 100, 60], head_dim=128)
    got = context(case, tabled(case), causal=causal, return_lse=True)
    assert_state(got, case.expected(causal=causal))


def test_a_window_over_chunks_of_prompts(device: str) -> None:
    case = make_case([40, 1, 100], [LONGEST, 60, 100])
    got = context(case, tabled(case), window_left=30, return_lse=True)
    assert_state(got, case.expected(causal=True, window_left=30))


@pytest.mark.parametrize("layout", ["HND", "NHD", "interleaved"])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_layouts(layout: str, page: int, device: str) -> None:
    """Strides are those of the caller's tensors, and `kv_layout` names their dimensions alone."""
    case = make_case([1, 1, 1], [100, 5, 64], head_dim=128)
    table = tabled(case, layout, page)
    wanted, _ = case.expected()
    assert_out(decode(case, table), wanted)
    arguments = (workspace(), table.block_tables, table.seq_lens, LONGEST, case.head_dim**-0.5)
    assert_out(fi.xqa_batch_decode_with_kv_cache(case.rows, table.nhd, *arguments), wanted)
    one = torch.stack(table.pair, 1)
    assert_out(fi.trtllm_batch_decode_with_kv_cache(case.rows, one, *arguments), wanted)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("call", [decode, context])
def test_scales_of_an_fp8_cache_and_sinks(call: Any, on_device: bool, device: str) -> None:
    case = make_case([1, 1, 1], [70, 1, 17], dtype=BF16, kv_dtype=FP8)
    scales: list[Any] = [2.0 * case.head_dim**-0.5, 0.5]
    if on_device:
        scales = [torch.tensor([scale]) for scale in scales]
    sinks = torch.linspace(-1.0, 2.0, 4)
    table = tabled(case)
    out = call(case, table, bmm1_scale=scales[0], bmm2_scale=scales[1], sinks=sinks)
    wanted, _ = case.expected(causal=True, sm_scale=2.0 * case.head_dim**-0.5, sinks=sinks)
    assert_out(out, 0.5 * wanted)
    if on_device and call is decode:
        base_2 = scales[0] / torch.log(torch.tensor(2.0))
        options = {"bmm1_scale": 1.0, "bmm1_scale_log2": base_2, "bmm2_scale": scales[1]}
        assert_out(call(case, table, sinks=sinks, **options), 0.5 * wanted)


def test_ragged_drafts_of_xqa(device: str) -> None:
    case = make_case([3, 1, 2], [40, 90, 2])
    table = tabled(case)
    out = fi.xqa_batch_decode_with_kv_cache(
        case.rows,
        table.pair,
        workspace(),
        table.block_tables,
        table.seq_lens,
        LONGEST,
        bmm1_scale=case.head_dim**-0.5,
        kv_layout="HND",
        q_len_per_req=3,
        q_cu_seq_lens=case.qo_indptr,
    )
    assert_out(out, case.expected(causal=True)[0])


@random_examples
@given(lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), min_size=1, max_size=8))
def test_random_steps(lens: list[tuple[int, int]], device: str) -> None:
    case = make_case([n for n, _ in lens], [n + old for n, old in lens], heads=(7, 1))
    got = context(case, tabled(case, page=8), return_lse=True)
    assert_state(got, case.expected(causal=True))


def test_a_workspace_that_is_too_small_is_not_used(device: str) -> None:
    case = make_case([1], [LONGEST])
    table, buffer = tabled(case), torch.zeros(64, dtype=torch.int8)
    out = fi.trtllm_batch_decode_with_kv_cache(
        case.rows, table.pair, buffer, table.block_tables, table.seq_lens, LONGEST, 0.125
    )
    assert_out(out, case.expected()[0])
    assert not buffer.any()


def test_no_requests(device: str) -> None:
    case = make_case([1], [20])
    table = tabled(case)
    out = fi.trtllm_batch_decode_with_kv_cache(
        case.rows[:0], table.pair, workspace(), table.block_tables[:0], table.seq_lens[:0], 0
    )
    assert out.shape == (0, 4, 64)


def test_refusals() -> None:
    case = make_case([1, 1], [20, 30])
    table = tabled(case)
    for options, message in (
        ({"o_scale": 2.0}, "o_scale is not supported"),
        ({"o_sf_scale": 1.0}, "o_sf_scale is not supported"),
        ({"mask": torch.zeros(1)}, "mask is not supported.*causally"),
        ({"skip_softmax_threshold_scale_factor": 1.0}, "skip_softmax_threshold_scale_factor"),
        ({"enable_block_sparse_attention": True}, "enable_block_sparse_attention"),
        ({"uses_shared_paged_kv_idx": False}, "uses_shared_paged_kv_idx must be True"),
        ({"backend": "fa2"}, "backend must be one of auto, trtllm-gen, xqa"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            decode(case, table, **options)
    with pytest.raises(UnsupportedError, match="window_left must be -1 without causal; got 3"):
        context(case, table, causal=False, window_left=3)
    for options, message in (
        ({"q_len_per_req": 2}, r"query must have 2 rows \(q_len_per_req\) for each of the 2"),
        ({"q_len_per_req": 0}, "q_len_per_req must be at least 1; got 0"),
        ({"max_q_len": 1}, "give max_q_len and cum_seq_lens_q, or neither"),
        ({"kv_layout": "LBHNC"}, "kv_layout must be one of"),
        ({"out": case.rows[:1]}, r"out must have shape \[2, 4, 64\]"),
        ({"seq_lens": int32([20])}, "query must have 1 rows"),
        ({"seq_lens": int32([20, 301])}, "seq_lens must be at most 300.*; got 301"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(case, table, **options)
    arguments = (table.block_tables, table.seq_lens, LONGEST)
    with pytest.raises(ValueError, match="workspace_buffer must be 16-byte aligned"):
        fi.trtllm_batch_decode_with_kv_cache(case.rows, table.pair, workspace()[1:], *arguments)
    with pytest.raises(TypeError, match=r"out must have dtype torch\.bfloat16, as out_dtype"):
        decode(case, table, out=case.rows.clone(), out_dtype=BF16)
    rows = case.rows.clone()
    assert decode(case, table, out=rows, out_dtype=str(rows.dtype).removeprefix("torch.")) is rows
    strided = table.block_tables.repeat_interleave(2, 1)[:, ::2]
    with pytest.raises(ValueError, match="block_tables must have stride 1"):
        decode(case, replace(table, block_tables=strided))
    with pytest.raises(ValueError, match="batch_size must be that of seq_lens, 2; got 3"):
        context(case, table, batch_size=3)
    with pytest.raises(ValueError, match=r"cum_seq_lens_kv must have shape \[3\]"):
        context(case, table, cum_seq_lens_kv=case.kv_indptr[:2])
    with pytest.raises(ValueError, match="max_qo_len"):
        context(make_case([3], [9]), tabled(make_case([3], [9])), max_q_len=2)


def test_torch_compile() -> None:
    case = make_case([2, 2], [20, 30])
    table, scratch = tabled(case), workspace()

    def step(q: torch.Tensor, lens: torch.Tensor) -> Any:
        arguments = (table.pair, scratch, table.block_tables, lens, LONGEST)
        return fi.trtllm_batch_decode_with_kv_cache(
            q * 2, *arguments, q_len_per_req=2, return_lse=True
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = (case.rows, table.seq_lens)
    torch.testing.assert_close(compiled(*arguments), step(*arguments), rtol=0, atol=0)


class TestOnGpu:
    pytestmark = ON_CUDA

    def test_a_graph_follows_lengths_and_pages(self, device: str) -> None:
        """One graph serves every step of its shapes: nothing is read by the host."""
        first, second = (
            make_case([1] * 3, lens, dtype=BF16) for lens in ([9, 70, 1], [290, 5, 33])
        )
        now, later = tabled(first), tabled(second)
        pages = max(now.pair[0].shape[0], later.pair[0].shape[0])
        cache = torch.zeros(pages, 2, 2, PAGE, 64, dtype=BF16)
        query, lens = first.rows.clone(), now.seq_lens.clone()
        table, scratch = torch.zeros(3, 24, dtype=torch.int32), workspace()

        def load(case: Case, step: Table) -> None:
            query.copy_(case.rows)
            lens.copy_(step.seq_lens)
            table[:, : step.block_tables.shape[1]] = step.block_tables
            for i in range(2):
                cache[: step.pair[i].shape[0], i] = step.pair[i]

        def attend() -> Any:
            arguments = (query, cache, scratch, table, lens, LONGEST, 0.125)
            return fi.trtllm_batch_decode_with_kv_cache(*arguments, return_lse=True)

        load(first, now)
        attend()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state = attend()
        for case, step in ((first, now), (second, later), (first, now)):
            load(case, step)
            graph.replay()
            assert_state(state, case.expected())
