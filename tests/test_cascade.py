"""Attention over shared prefixes, with FlashInfer's calls, on each device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wrapper_cases import Case, assert_out, default_dtype, int32, make_case, workspace

import fi_backend as fi
from fi_backend.errors import UnsupportedError


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
@pytest.mark.usefixtures("device")
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
        q_data_type=default_dtype(),
    )
    out = wrapper.run(case.rows, torch.cat(caches))
    assert_out(out, case.expected(causal=causal, sm_scale=0.2, logits_soft_cap=8.0)[0])


@pytest.mark.usefixtures("device")
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
        q_data_type=default_dtype(),
    )
    assert torch.equal(buffers["paged_kv_indices_buf_arr"][1][:7], own.indices[:7] + first)
    cache = tuple(torch.cat(both) for both in zip(prefix.cache, own.cache, strict=True))
    assert_out(wrapper.run(case.rows, cache), case.expected()[0])
    workspaces = [level._workspace for level in wrapper._levels]
    with pytest.raises(RuntimeError, match=r"must come before the first plan\(\)"):
        wrapper.reset_workspace_buffer(workspace(), [workspace()] * 2)
    assert [level._workspace for level in wrapper._levels] == workspaces  # of all levels or none


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
@pytest.mark.usefixtures("device")
def test_decode_with_shared_prefix(kv_layout: str) -> None:
    case = cascade_case(21, [17, 0, 6], [1, 1, 1])
    prefix, own = levels(case, 21)
    table = own.paged(4, kv_layout, "one")
    wrapper = fi.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), kv_layout)
    wrapper.begin_forward(
        table.indptr, table.indices, table.last_page_len, *case.heads, 4, data_type=case.rows.dtype
    )
    out = wrapper.forward(case.rows, *prefix.ragged(kv_layout), table.cache)
    assert_out(out, case.expected()[0])
    wrapper.end_forward()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("device")
def test_prefill_with_shared_prefix(causal: bool) -> None:
    case = cascade_case(21, [17, 4, 6], [5, 4, 1])
    prefix, own = levels(case, 21)
    table = own.paged(4)
    wrapper = fi.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace())
    with pytest.raises(RuntimeError, match="call begin_forward"):
        wrapper.forward(case.rows, *prefix.ragged(), table.cache)
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 4)
    with pytest.raises(ValueError, match="paged_kv_indptr must never decrease"):
        wrapper.begin_forward(args[0], -table.indptr.cpu(), *args[2:])
    tables = [tensor.clone() for tensor in args[:4]]
    wrapper.begin_forward(*tables, *args[4:])
    for tensor in tables:
        tensor.fill_(1)  # the next step's, before this one has run
    for sm_scale in (None, 0.3):
        out = wrapper.forward(
            case.rows, *prefix.ragged(), table.cache, causal=causal, sm_scale=sm_scale
        )
        assert_out(out, case.expected(causal=causal, sm_scale=sm_scale)[0])
    wrapper.end_forward()
