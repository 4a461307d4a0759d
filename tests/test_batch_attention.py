"""BatchAttention over mixed batches, and the wrapper that takes attention sinks, on each device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wrapper_cases import (
    Case,
    PagedTable,
    assert_state,
    default_dtype,
    int32,
    make_case,
    random_examples,
    workspace,
)

import fi_backend as fi
from fi_backend.errors import UnsupportedError

F32 = torch.float32
BF16 = torch.bfloat16


def plan(
    attention: fi.BatchAttention, case: Case, table: PagedTable, page_size: int, **options: Any
) -> None:
    options = {"q_data_type": case.q[0].dtype, "kv_data_type": case.k[0].dtype, **options}
    attention.plan(
        case.qo_indptr,
        table.indptr,
        table.indices,
        int32([len(k) for k in case.k]),
        *case.heads,
        case.v[0].shape[2],
        page_size,
        **options,
    )


@pytest.mark.parametrize(("kv_layout", "form"), [("NHD", "one"), ("HND", "pair")])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "sm_scale": 0.3, "logits_soft_cap": 4.0}],
    ids=str,
)
def test_mixed_batches(kv_layout: str, form: str, options: dict[str, Any], device: str) -> None:
    case = make_case([1, 40, 1, 0, 3], [300, 40, 9, 5, 1])
    table = case.paged(16, kv_layout, form)
    attention = fi.BatchAttention(kv_layout, device)
    plan(attention, case, table, 16, **options)
    assert_state(attention.run(case.rows, table.cache), case.expected(**options))


@random_examples
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), min_size=1, max_size=8),
    group=st.sampled_from([1, 7]),
    causal=st.booleans(),
)
def test_random_batches(lens: list[tuple[int, int]], group: int, causal: bool, device: str) -> None:
    case = make_case([n for n, _ in lens], [n for _, n in lens], heads=(group, 1))
    table = case.paged(8)
    attention = fi.BatchAttention(device=device)
    plan(attention, case, table, 8, causal=causal)
    assert_state(attention.run(case.rows, table.cache), case.expected(causal=causal))


def test_outputs_and_scales(device: str) -> None:
    case = make_case([1, 9], [70, 20], head_dim=128, dtype=BF16)
    table = case.paged(16)
    attention = fi.BatchAttention(device=device)
    plan(attention, case, table, 16, causal=True, logits_soft_cap=9.0)
    out, lse = torch.zeros_like(case.rows), torch.zeros(10, 4)
    scales = {"k_scale": torch.tensor(2.0), "v_scale": torch.tensor([0.5])}
    got = attention.run(case.rows, table.cache, out, lse, logits_soft_cap=9.0, **scales)
    assert got[0] is out
    assert got[1] is lse
    wanted = case.expected(causal=True, logits_soft_cap=9.0, sm_scale=2 / 128**0.5)
    assert_state(got, (0.5 * wanted[0], wanted[1]))


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="device must be cpu or cuda; got meta"):
        fi.BatchAttention(device="meta")
    attention = fi.BatchAttention(device="cpu")
    case = make_case([1, 9], [70, 20])
    table = case.paged(16)
    with pytest.raises(RuntimeError, match="call plan"):
        attention.run(case.rows, table.cache)
    with pytest.raises(UnsupportedError, match="use_profiler is not supported"):
        plan(attention, case, table, 16, use_profiler=True)
    wrong = PagedTable(table.cache, table.indptr[:-1], table.indices, table.last_page_len)
    with pytest.raises(ValueError, match=r"kv_indptr must have shape \[3\]"):
        plan(attention, case, wrong, 16)
    with pytest.raises(ValueError, match=r"kv_len_arr\[0\] must lie between 0 and 40"):
        plan(attention, case, table, 8)
    plan(attention, case, table, 16)
    with pytest.raises(ValueError, match="logits_soft_cap must be what plan"):
        attention.run(case.rows, table.cache, logits_soft_cap=3.0)
    with pytest.raises(ValueError, match=r"logits_soft_cap must be what plan.*; got nan"):
        attention.run(case.rows, table.cache, logits_soft_cap=float("nan"))
    with pytest.raises(ValueError, match=r"does not match qo_indptr\[-1\] \(10\)"):
        attention.run(case.rows[:-1], table.cache)
    with pytest.raises(TypeError, match=r"q must have dtype torch\.float32"):
        attention.run(case.rows.bfloat16(), table.cache)
    with pytest.raises(UnsupportedError, match="profiler_buffer is not supported"):
        attention.run(case.rows, table.cache, profiler_buffer=torch.ones(1))


def sink_wrapper(**kwargs: Any) -> fi.BatchAttentionWithAttentionSinkWrapper:
    dtype = default_dtype()
    given_kwargs = {"q_data_type": dtype, "kv_data_type": dtype, "head_dim_qk": 64}
    given_kwargs["head_dim_vo"] = 64
    return fi.BatchAttentionWithAttentionSinkWrapper(workspace(), **{**given_kwargs, **kwargs})


@pytest.mark.parametrize("window_left", [-1, 13])
@pytest.mark.usefixtures("device")
def test_sink_wrapper(window_left: int) -> None:
    """run(q, cache, sink, sm_scale) as engines call it; the scale of run() counts."""
    case = make_case([1, 40, 0], [300, 40, 9])
    table = case.paged(16)
    wrapper = sink_wrapper(window_left=window_left)
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    options = {"causal": True, "window_left": window_left}
    wrapper.plan(*args, q_data_type=case.rows.dtype, **options)
    sink = torch.tensor([-2.0, 0.0, 1.0, 4.0])
    expected = case.expected(sm_scale=0.2, sinks=sink, **options)
    got = wrapper.run(case.rows, table.cache, sink, 0.2, return_lse=True)
    assert_state(got, expected)
    by_name = wrapper.run(case.rows, table.cache, sinks=sink)
    assert torch.equal(by_name, wrapper.run(case.rows, table.cache, sink, 1 / 8))
    plain = case.expected(sm_scale=0.2, **options)[0]
    assert (got[0] - plain).abs().max() > 0.1, "sinks this large must show"


def test_sink_wrapper_keeps_few_layers() -> None:
    case = make_case([1, 40], [300, 40])
    table = case.paged(16)
    wrapper = sink_wrapper()
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    wrapper.plan(*args, q_data_type=F32)
    sink = torch.zeros(4)
    first = wrapper.run(case.rows, table.cache, sink, 0.1)
    for step in range(20):
        wrapper.run(case.rows, table.cache, sink, 0.2 + step / 64)
    assert len(wrapper._layers) <= 8
    assert torch.equal(wrapper.run(case.rows, table.cache, sink, 0.1), first)


def test_sink_wrapper_refuses() -> None:
    case = make_case([1, 40], [300, 40])
    table = case.paged(16)
    wrapper = sink_wrapper()
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    with pytest.raises(ValueError, match=r"window_left of plan.* must be .* -1; got 4"):
        wrapper.plan(*args, q_data_type=F32, window_left=4)
    with pytest.raises(ValueError, match=r"q_data_type of plan.*float32; got torch\.float16"):
        wrapper.plan(*args)
    wrapper.plan(*args, q_data_type=F32)
    with pytest.raises(ValueError, match=r"sink must be a float32 tensor \[num_qo_heads\]"):
        wrapper.run(case.rows, table.cache)
    sink = torch.zeros(4)
    with pytest.raises(TypeError, match="3 extra arguments"):
        wrapper.run(case.rows, table.cache, sink, 0.2, 1.0)
    with pytest.raises(TypeError, match="sinks=a tensor"):
        wrapper.run(case.rows, table.cache, sink, sinks=sink)
    with pytest.raises(ValueError, match=r"sinks must have shape \[4\]"):
        wrapper.run(case.rows, table.cache, sink[:3])
