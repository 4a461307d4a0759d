"""Prefill attention over ragged keys and values, with FlashInfer's calls, on each device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wrapper_cases import (
    Case,
    assert_state,
    default_dtype,
    int32,
    make_case,
    random_examples,
    workspace,
)

import fi_backend as fi
from fi_backend._arguments import alibi_slopes
from fi_backend.errors import UnsupportedError

QO_LENS = [5, 1, 0, 70, 3]
KV_LENS = [37, 16, 9, 70, 0]


def make_wrapper(**kwargs: Any) -> fi.BatchPrefillWithRaggedKVCacheWrapper:
    return fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(), **kwargs)


def plan(wrapper: fi.BatchPrefillWithRaggedKVCacheWrapper, case: Case, **options: Any) -> None:
    options = {"q_data_type": case.q[0].dtype, "kv_data_type": case.k[0].dtype, **options}
    wrapper.plan(case.qo_indptr, case.kv_indptr, *case.heads, **options)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window_left": 4},
        {"causal": True, "logits_soft_cap": 3.0, "sm_scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_values(kv_layout: str, options: dict[str, Any]) -> None:
    case = make_case(QO_LENS, KV_LENS)
    wrapper = make_wrapper(kv_layout=kv_layout)
    plan(wrapper, case, **options)
    got = wrapper.run_return_lse(case.rows, *case.ragged(kv_layout))
    assert_state(got, case.expected(**options))


@pytest.mark.usefixtures("device")
def test_keys_before_and_after_the_requests_are_not_read() -> None:
    case = make_case([4, 2], [9, 5])
    poison = torch.full((3, 2, 64), float("nan"), dtype=default_dtype())
    k, v = (torch.cat((poison, x, poison)) for x in case.ragged())
    wrapper = make_wrapper()
    wrapper.plan(case.qo_indptr, case.kv_indptr + 3, *case.heads, q_data_type=default_dtype())
    assert_state(wrapper.run_return_lse(case.rows, k, v), case.expected())


@pytest.mark.usefixtures("device")
def test_tensors_may_be_slices_of_one_projection() -> None:
    case = make_case([6, 3], [6, 3])
    fused = torch.cat((case.rows, *case.ragged()), dim=1)
    q, k, v = fused.split([4, 2, 2], dim=1)
    assert not q.is_contiguous()
    wrapper = make_wrapper()
    plan(wrapper, case, causal=True)
    assert_state(wrapper.run_return_lse(q, k, v), case.expected(causal=True))


@pytest.mark.usefixtures("device")
def test_value_heads_may_differ_in_size() -> None:
    case = make_case(QO_LENS, KV_LENS, head_dim=64, head_dim_vo=32)
    wrapper = make_wrapper()
    plan(wrapper, case, head_dim_vo=32, causal=True)
    got = wrapper.run_return_lse(case.rows, *case.ragged())
    assert_state(got, case.expected(causal=True))


@pytest.mark.usefixtures("device")
def test_scales_act_on_q_k_and_v() -> None:
    case = make_case(QO_LENS, KV_LENS)
    wrapper = make_wrapper()
    plan(wrapper, case, causal=True, pos_encoding_mode="ALIBI")
    got = wrapper.run_return_lse(case.rows, *case.ragged(), q_scale=0.5, k_scale=3.0, v_scale=2.0)
    options = {
        "causal": True,
        "sm_scale": 1.5 / 8,
        "alibi_slopes": alibi_slopes(4, case.rows.device),
    }
    out, lse = case.expected(**options)
    assert_state(got, (2.0 * out, lse), 3e-5)


@pytest.mark.usefixtures("device")
def test_sinks_join_the_denominators() -> None:
    case = make_case(QO_LENS, KV_LENS)
    wrapper = make_wrapper()
    plan(wrapper, case, causal=True)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    got = wrapper.run_return_lse(case.rows, *case.ragged(), sinks=sinks)
    assert_state(got, case.expected(causal=True, sinks=sinks))


@pytest.mark.usefixtures("device")
def test_custom_mask_and_forward() -> None:
    case = make_case(QO_LENS, KV_LENS)
    masks = [torch.rand(len(q), len(k)) < 0.4 for q, k in zip(case.q, case.k, strict=True)]
    wrapper = make_wrapper()
    plan(wrapper, case, custom_mask=torch.cat([mask.flatten() for mask in masks]))
    expected = case.expected(custom_mask=masks)
    assert_state(wrapper.run_return_lse(case.rows, *case.ragged()), expected)
    plan(wrapper, case)
    options = {"causal": True, "window_left": 6, "sm_scale": 0.2}
    got = wrapper.forward_return_lse(case.rows, *case.ragged(), **options)
    assert_state(got, case.expected(**options))
    assert torch.equal(wrapper.forward(case.rows, *case.ragged(), **options), got[0])


@random_examples
@given(
    lens=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 150)), min_size=1, max_size=6),
    causal=st.booleans(),
    split=st.sampled_from([{}, {"fixed_split_size": 32}, {"disable_split_kv": True}]),
)
@pytest.mark.usefixtures("device")
def test_random_batches(lens: list[tuple[int, int]], causal: bool, split: dict[str, Any]) -> None:
    case = make_case([n for n, _ in lens], [n for _, n in lens])
    wrapper = make_wrapper()
    plan(wrapper, case, causal=causal, **split)
    got = wrapper.run_return_lse(case.rows, *case.ragged())
    assert_state(got, case.expected(causal=causal))


@pytest.mark.usefixtures("device")
def test_graph_mode() -> None:
    buffers = [torch.full((3,), -1, dtype=torch.int32) for _ in range(2)]
    wrapper = make_wrapper(use_cuda_graph=True, qo_indptr_buf=buffers[0], kv_indptr_buf=buffers[1])
    for lens in (([6, 2], [33, 5]), ([1, 1], [60, 0])):
        case = make_case(*lens)
        given_indptrs = (case.qo_indptr, case.kv_indptr)
        wrapper.plan(*given_indptrs, *case.heads, q_data_type=default_dtype())
        for buffer, source in zip(buffers, given_indptrs, strict=True):
            assert torch.equal(buffer, source)
            source.fill_(-7)  # run() must read the buffers, not what plan() was given
        assert_state(wrapper.run_return_lse(case.rows, *case.ragged()), case.expected())
    with pytest.raises(ValueError, match="batch size 1 mismatches"):
        plan(wrapper, make_case([1], [4]))


def test_graph_mode_fixes_sizes() -> None:
    buffers = [torch.full((3,), -1, dtype=torch.int32) for _ in range(2)]
    wrapper = make_wrapper(use_cuda_graph=True, qo_indptr_buf=buffers[0], kv_indptr_buf=buffers[1])
    plan(wrapper, make_case([6, 2], [33, 5]))
    with pytest.raises(ValueError, match="rows in qo_indptr 9"):
        plan(wrapper, make_case([8, 1], [4, 4]))
    with pytest.raises(ValueError, match=r"length of kv_indptr_buf \(2\) should be the same"):
        make_wrapper(use_cuda_graph=True, qo_indptr_buf=buffers[0], kv_indptr_buf=buffers[1][:2])


def test_refusals() -> None:
    case = make_case([3, 2], [3, 4])
    k, v = case.ragged()
    wrapper = make_wrapper()
    with pytest.raises(ValueError, match="kv_indptr must never decrease"):
        wrapper.plan(int32([0, 3, 5]), int32([0, 4, 3]), *case.heads)
    with pytest.raises(ValueError, match="v_indptr must agree with kv_indptr"):
        plan(wrapper, case, v_indptr=case.kv_indptr + 1)
    with pytest.raises(ValueError, match="o_indptr must agree with qo_indptr"):
        plan(wrapper, case, o_indptr=case.qo_indptr[:-1])
    with pytest.raises(UnsupportedError, match="max_item_len_ptr is not supported"):
        plan(wrapper, case, max_item_len_ptr=int32([1, 1]))
    plan(wrapper, case, v_indptr=case.kv_indptr, o_indptr=case.qo_indptr)
    with pytest.raises(ValueError, match=r"k must have at least kv_indptr\[-1\] = 7 tokens; got 6"):
        wrapper.run(case.rows, k[:-1], v)
    with pytest.raises(ValueError, match="v must have at least"):
        wrapper.run(case.rows, k, v[:-1])
    with pytest.raises(ValueError, match=r"does not match qo_indptr\[-1\] \(5\)"):
        wrapper.run(case.rows[:-1], k, v)
    with pytest.raises(ValueError, match=r"dtype of v .* does not match the kv_data_type"):
        wrapper.run(case.rows, k, v.bfloat16())
    with pytest.raises(UnsupportedError, match="o_scale is not supported"):
        wrapper.run(case.rows, k, v, o_scale=2.0)
    with pytest.raises(ValueError, match="k must have shape"):
        wrapper.run(case.rows, k[None], v)
