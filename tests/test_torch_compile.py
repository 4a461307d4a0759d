"""torch.compile sees attention as one op, through every wrapper, in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrapper_cases import decode_wrapper, make_case, plan_decode, workspace

import fi_backend as fi


def assert_compiles(function: Callable[..., Any], *args: Any) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"k_scale": 2.0}, {"sinks": torch.ones(4)}], ids=str)
def test_decode(options: dict[str, Any]) -> None:
    case = make_case([1, 1], [40, 20])
    table = case.paged(16)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 16)
    assert_compiles(lambda q, kv: wrapper.run(q * 2, kv, **options) + 1, case.rows, table.cache)
    assert_compiles(lambda q, kv: wrapper.run_return_lse(q, kv, **options), case.rows, table.cache)


@pytest.mark.parametrize("return_lse", [False, True])
def test_single_calls(return_lse: bool) -> None:
    q, k, v = (torch.randn(rows, heads, 64) for rows, heads in ((3, 4), (20, 2), (20, 2)))
    mask = torch.rand(3, 20) < 0.5
    options = {"return_lse": return_lse}
    prefill, decode = fi.single_prefill_with_kv_cache, fi.single_decode_with_kv_cache
    assert_compiles(lambda q, k, v: prefill(q * 2, k, v, causal=True, **options), q, k, v)
    assert_compiles(lambda q, k, v: prefill(q, k, v, custom_mask=mask, **options), q, k, v)
    assert_compiles(lambda q, k, v: decode(q[0], k, v, k_scale=2.0, **options), q, k, v)


def test_ragged_prefill_with_custom_mask() -> None:
    case = make_case([5, 2], [9, 30])
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    wrapper.plan(
        case.qo_indptr,
        case.kv_indptr,
        *case.heads,
        q_data_type="float32",
        custom_mask=torch.rand(105) < 0.5,
    )
    assert_compiles(lambda q, k, v: wrapper.run(q, k, v), case.rows, *case.ragged())


def test_cascade() -> None:
    case = make_case([2], [9])
    table = case.paged(4)
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace())
    wrapper.plan(
        [case.qo_indptr] * 2,
        [table.indptr] * 2,
        [table.indices] * 2,
        [table.last_page_len] * 2,
        *case.heads,
        4,
        q_data_type="float32",
    )
    assert_compiles(lambda q, kv: wrapper.run(q, kv), case.rows, table.cache)
