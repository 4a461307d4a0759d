"""Merging attention states, and attention over shared prefixes, with FlashInfer's calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from wrapper_cases import Case, assert_state, int32, make_case, workspace

import fi_backend as fi
from fi_backend.errors import UnsupportedError

F32 = torch.float32
BF16 = torch.bfloat16


def merged(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge v [rows, states, heads, dim] and s [rows, states, heads] in float64."""
    v, s = v.double(), s.double()
    lse = torch.logsumexp(s * math.log(2), dim=1) / math.log(2)
    weights = torch.exp2(s - lse[:, None]).nan_to_num(0.0)
    values = torch.where(weights[..., None] > 0, v * weights[..., None], 0.0)
    return values.sum(1), lse


def states(rows: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states, some of them empty: those hold garbage values, which must not matter."""
    v, s = torch.randn(rows, count, 3, 64).to(dtype), torch.randn(rows, count, 3) * 4
    empty = torch.rand(rows, count, 3) < 0.3
    empty[0] = True
    return v.masked_fill(empty[..., None], math.nan), s.masked_fill(empty, -math.inf)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_merge_state(dtype: torch.dtype) -> None:
    v, s = states(9, 2, dtype)
    before = v.clone(), s.clone()
    got = fi.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert got[0].dtype == dtype
    assert_state(got, merged(v, s))
    assert torch.equal(before[0].nan_to_num(), v.nan_to_num())
    assert torch.equal(before[1], s)


@pytest.mark.parametrize("use_mask", [False, True])
def test_merge_state_in_place(use_mask: bool) -> None:
    v, s = states(9, 2, F32)
    mask = torch.rand(9) < 0.5 if use_mask else None
    ours_v, ours_s = v[:, 0].clone(), s[:, 0].clone()
    fi.merge_state_in_place(ours_v, ours_s, v[:, 1], s[:, 1], mask)
    rows = torch.ones(9, dtype=torch.bool) if mask is None else mask
    out, lse = merged(v, s)
    assert_state((ours_v[rows], ours_s[rows]), (out[rows], lse[rows]))
    assert torch.equal(ours_v[~rows].nan_to_num(7.0), v[:, 0][~rows].nan_to_num(7.0))
    assert torch.equal(ours_s[~rows], s[:, 0][~rows])


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_merge_states(count: int) -> None:
    v, s = states(9, count, F32)
    assert_state(fi.merge_states(v, s), merged(v, s))


def test_merges_are_torch_ops() -> None:
    """Compiled code calls them as one graph, and opcheck finds their schemas true."""
    v, s = torch.randn(5, 2, 3, 64), torch.randn(5, 2, 3)
    pair = (v[:, 0].clone(), s[:, 0].clone(), v[:, 1].clone(), s[:, 1].clone())
    ops = torch.ops.fi_backend
    torch.library.opcheck(ops.merge_state, (*pair, *(torch.empty_like(x) for x in pair[:2])))
    torch.library.opcheck(ops.merge_state_in_place, (*pair, torch.ones(5, dtype=torch.bool)))
    torch.library.opcheck(ops.merge_states, (v, s, *(torch.empty_like(x) for x in pair[:2])))

    def both(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = fi.merge_state(*states)
        fi.merge_state_in_place(out, lse, *states[2:])
        return out, lse

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*pair), both(*pair), strict=True):
        assert torch.equal(got, expected)


def test_merge_refuses() -> None:
    v, s = torch.zeros(5, 3, 64), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"s_a must have shape \[5, 3\]"):
        fi.merge_state(v, s[:4], v, s)
    with pytest.raises(TypeError, match=r"s_b must have dtype torch\.float32"):
        fi.merge_state(v, s, v, s.double())
    with pytest.raises(ValueError, match=r"v_b must be like v_a, torch\.float32 \[5, 3, 64\]"):
        fi.merge_state(v, s, v[..., :32], s)
    with pytest.raises(ValueError, match="v must have stride 1"):
        fi.merge_state_in_place(torch.zeros(5, 3, 64, 2)[..., 0], s, v, s)
    with pytest.raises(ValueError, match=r"mask must have shape \[5\]"):
        fi.merge_state_in_place(v, s, v, s, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"v must have shape \[\*, \*, \*, \*\]"):
        fi.merge_states(v, s)
    with pytest.raises(UnsupportedError, match="not supported yet by this version"):
        fi.merge_state(*(x.to("meta") for x in (v, s, v, s)))


def cascade_case(shared: int, own: list[int], qo_lens: list[int], **kwargs: Any) -> Case:
    """Requests whose keys start with the same `shared` tokens."""
    case = make_case(qo_lens, [shared + n for n in own], **kwargs)
    for k, v in zip(case.k, case.v, strict=True):
        k[:shared] = case.k[0][:shared]
        v[:shared] = case.v[0][:shared]
    return case


def levels(case: Case, shared: int) -> tuple[Case, Case]:
    """The shared prefix as one group of all rows, and each request's own keys."""
    prefix = Case([case.rows], [case.k[0][:shared]], [case.v[0][:shared]])
    own = Case(case.q, [k[shared:] for k in case.k], [v[shared:] for v in case.v])
    return prefix, own


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_multi_level_cascade(kv_layout: str, causal: bool) -> None:
    """Two levels give what attention over the whole sequences gives."""
    page_size, shared, qo_lens = 4, 22, [1, 9, 3]
    case = cascade_case(shared, [17, 9, 0 if not causal else 3], qo_lens)
    tables, caches = [], []
    for level in levels(case, shared):
        table = level.paged(page_size, kv_layout, "one")
        tables.append((level.qo_indptr, table, sum(len(c) for c in caches)))
        caches.append(table.cache)
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace(), kv_layout)
    wrapper.plan(
        [qo_indptr for qo_indptr, _, _ in tables],
        [table.indptr for _, table, _ in tables],
        [table.indices[: table.indptr[-1]] + first for _, table, first in tables],
        [table.last_page_len for _, table, _ in tables],
        *case.heads,
        page_size,
        causal=causal,
        sm_scale=0.2,
        logits_soft_cap=8.0,
        q_data_type="float32",
    )
    out = wrapper.run(case.rows, torch.cat(caches))
    expected = case.expected(causal=causal, sm_scale=0.2, logits_soft_cap=8.0)[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_multi_level_cascade_in_graph_mode() -> None:
    buffers: dict[str, list[torch.Tensor]] = {
        "qo_indptr_buf_arr": [torch.zeros(2).int(), torch.zeros(3).int()],
        "paged_kv_indptr_buf_arr": [torch.zeros(2).int(), torch.zeros(3).int()],
        "paged_kv_indices_buf_arr": [torch.zeros(9).int(), torch.zeros(9).int()],
        "paged_kv_last_page_len_buf_arr": [torch.zeros(1).int(), torch.zeros(2).int()],
    }
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace(), use_cuda_graph=True, **buffers)
    assert wrapper.is_cuda_graph_enabled
    case = cascade_case(6, [2, 5], [1, 1])
    prefix, own = (level.paged(1) for level in levels(case, 6))
    first = prefix.cache[0].shape[0]
    wrapper.plan(
        [int32([0, 2]), int32([0, 1, 2])],
        [prefix.indptr, own.indptr],
        [prefix.indices[:6], own.indices[:7] + first],
        [prefix.last_page_len, own.last_page_len],
        *case.heads,
        1,
        q_data_type="float32",
    )
    assert torch.equal(buffers["paged_kv_indices_buf_arr"][1][:7], own.indices[:7] + first)
    cache = tuple(torch.cat(both) for both in zip(prefix.cache, own.cache, strict=True))
    torch.testing.assert_close(
        wrapper.run(case.rows, cache).double(), case.expected()[0], atol=1e-5, rtol=1e-5
    )


def test_multi_level_cascade_refuses() -> None:
    with pytest.raises(ValueError, match="num_levels must be at least 1; got 0"):
        fi.MultiLevelCascadeAttentionWrapper(0, workspace())
    with pytest.raises(ValueError, match="qo_indptr_buf_arr must hold a tensor for each of the 2"):
        fi.MultiLevelCascadeAttentionWrapper(2, workspace(), use_cuda_graph=True)
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace())
    qo, kv, ids, last = int32([0, 2]), int32([0, 1]), int32([0]), int32([1])
    arrays = ([qo, qo], [kv, kv], [ids, ids], [last, last])
    heads = (4, 2, 64, 1)
    with pytest.raises(ValueError, match="paged_kv_indices_arr must hold a tensor for each"):
        wrapper.plan(*arrays[:2], [ids], arrays[3], *heads)
    with pytest.raises(UnsupportedError, match="window_left must be -1 with more than one level"):
        wrapper.plan(*arrays, *heads, window_left=4)
    with pytest.raises(UnsupportedError, match="pos_encoding_mode must be 'NONE'"):
        wrapper.plan(*arrays, *heads, pos_encoding_mode="ALIBI")
    with pytest.raises(ValueError, match=r"same rows on every level; got last entries \[2, 3\]"):
        wrapper.plan([qo, int32([0, 3])], *arrays[1:], *heads)
    with pytest.raises(ValueError, match="int_workspace_buffers must hold a tensor for each"):
        wrapper.reset_workspace_buffer(workspace(), [workspace()])
    wrapper.reset_workspace_buffer(workspace(), [workspace()] * 2)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_decode_with_shared_prefix(kv_layout: str) -> None:
    case = cascade_case(21, [17, 0, 6], [1, 1, 1])
    prefix, own = levels(case, 21)
    table = own.paged(4, kv_layout, "one")
    wrapper = fi.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), kv_layout)
    wrapper.begin_forward(
        table.indptr, table.indices, table.last_page_len, *case.heads, 4, data_type=F32
    )
    out = wrapper.forward(case.rows, *prefix.ragged(kv_layout), table.cache)
    torch.testing.assert_close(out.double(), case.expected()[0], atol=1e-5, rtol=1e-5)
    wrapper.end_forward()


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_shared_prefix(causal: bool) -> None:
    case = cascade_case(21, [17, 4, 6], [5, 4, 1])
    prefix, own = levels(case, 21)
    table = own.paged(4)
    wrapper = fi.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace())
    with pytest.raises(RuntimeError, match="call begin_forward"):
        wrapper.forward(case.rows, *prefix.ragged(), table.cache)
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 4)
    with pytest.raises(ValueError, match="paged_kv_indptr must never decrease"):
        wrapper.begin_forward(args[0], -table.indptr, *args[2:])
    wrapper.begin_forward(*args)
    for sm_scale in (None, 0.3):
        out = wrapper.forward(
            case.rows, *prefix.ragged(), table.cache, causal=causal, sm_scale=sm_scale
        )
        expected = case.expected(causal=causal, sm_scale=sm_scale)[0]
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    wrapper.end_forward()
