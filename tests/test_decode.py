"""Decode attention with FlashInfer's calls: values, on each device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wrapper_cases import (
    Case,
    assert_out,
    assert_state,
    decode_wrapper,
    default_dtype,
    int32,
    make_case,
    plan_decode,
    random_examples,
)

import fi_backend as fi
from fi_backend._arguments import alibi_slopes
from fi_backend.errors import UnsupportedError

F32 = torch.float32
BF16 = torch.bfloat16


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.usefixtures("device")
def test_layouts_and_page_sizes(kv_layout: str, form: str, page_size: int) -> None:
    case = make_case([1] * 5, [1, 33, 0, 16, 260])
    table = case.paged(page_size, kv_layout, form)
    wrapper = decode_wrapper(kv_layout=kv_layout)
    plan_decode(wrapper, case, table, page_size)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.usefixtures("device")
def test_page_dimension_may_be_left_out_for_one_token_pages(kv_layout: str) -> None:
    case = make_case([1, 1], [7, 3])
    table = case.paged(1, "NHD", "one")
    wrapper = decode_wrapper(kv_layout=kv_layout)
    plan_decode(wrapper, case, table, 1)
    assert_state(wrapper.run_return_lse(case.rows, table.cache.squeeze(2)), case.expected())
    pair = tuple(table.cache.squeeze(2).unbind(1))
    assert_state(wrapper.run_return_lse(case.rows, pair), case.expected())


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 0},
        {"window_left": 17},
        {"logits_soft_cap": 3.0},
        {"logits_soft_cap": 0.0},
        {"sm_scale": 0.3},
        {"window_left": 9, "logits_soft_cap": 5.0, "sm_scale": 0.2},
    ],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_options(options: dict[str, Any]) -> None:
    case = make_case([1] * 3, [40, 5, 18])
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4, **options)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(**options))


def test_alibi(device: str) -> None:
    """Six heads: the slopes of four, then two of the finer series."""
    case = make_case([1] * 3, [40, 5, 18], heads=(6, 2))
    slopes = alibi_slopes(6, torch.device(device))
    torch.testing.assert_close(
        slopes, 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0, 1.0, 3.0]), rtol=1e-6, atol=0
    )
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4, pos_encoding_mode="ALIBI")
    expected = case.expected(alibi_slopes=slopes)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


@pytest.mark.usefixtures("device")
def test_sinks_are_honoured() -> None:
    case = make_case([1] * 3, [40, 0, 18])
    table = case.paged(4)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    plain = wrapper.run(case.rows, table.cache)
    got = wrapper.run_return_lse(case.rows, table.cache, sinks=sinks)
    assert_state(got, case.expected(sinks=sinks))
    assert torch.equal(wrapper.run(case.rows, table.cache), plain)


@pytest.mark.parametrize(
    ("q_scale", "k_scale", "v_scale"),
    [
        (None, 0.5, 2.0),
        (2.0, torch.tensor(0.5), torch.tensor([3.0])),
        (0.5, torch.tensor([0.5, 2.0]), torch.tensor([2.0, 0.25])),
        (torch.tensor([2.0]), torch.tensor([0.5, 2.0]), None),
    ],
    ids=["floats", "tensors", "per head", "two tensors"],
)
@pytest.mark.usefixtures("device")
def test_scales(q_scale: Any, k_scale: Any, v_scale: Any) -> None:
    """Scales act on q, k and v, so lse feels those of q and k alone."""
    case = make_case([1] * 3, [40, 5, 18])
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    q_scale, k_scale, v_scale = (
        x.to(table.indptr.device) if isinstance(x, torch.Tensor) else x
        for x in (q_scale, k_scale, v_scale)
    )
    got = wrapper.run_return_lse(
        case.rows, table.cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale
    )

    def spread(scale: Any) -> torch.Tensor:
        return torch.as_tensor(1.0 if scale is None else scale).expand(2)[:, None]

    scaled = Case(
        [q.double() * (1.0 if q_scale is None else float(q_scale)) for q in case.q],
        [k.double() * spread(k_scale) for k in case.k],
        [v.double() * spread(v_scale) for v in case.v],
    )
    assert_state(got, scaled.expected(), 3e-5)


@pytest.mark.usefixtures("device")
def test_fp8_cache_and_output_dtype() -> None:
    case = make_case([1] * 3, [40, 5, 130], head_dim=128, dtype=BF16, kv_dtype=torch.float8_e4m3fn)
    table = case.paged(16)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 16, o_data_type=F32)
    out, lse = wrapper.run_return_lse(case.rows, table.cache, k_scale=0.5, v_scale=2.0)
    assert out.dtype == F32
    scaled = Case(case.q, [k.double() * 0.5 for k in case.k], [v.double() * 2.0 for v in case.v])
    assert_state((out, lse), scaled.expected(), 1e-2)


@pytest.mark.usefixtures("device")
def test_data_type_sets_q_and_kv() -> None:
    case = make_case([1, 1], [20, 300], head_dim=128, dtype=BF16)
    table = case.paged(16)
    wrapper = decode_wrapper()
    args = (table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    wrapper.plan(*args, data_type="bfloat16")
    got = wrapper.run_return_lse(case.rows, table.cache)
    assert got[0].dtype == BF16
    assert_state(got, case.expected())


@random_examples
@given(
    kv_lens=st.lists(st.integers(0, 90), min_size=0, max_size=9),
    page_size=st.sampled_from([1, 2, 7, 16]),
    group=st.sampled_from([1, 3, 5]),
    window_left=st.sampled_from([-1, -1, 0, 8]),
    split=st.sampled_from([None, 1, 3]),
)
@pytest.mark.usefixtures("device")
def test_random_batches(
    kv_lens: list[int], page_size: int, group: int, window_left: int, split: int | None
) -> None:
    case = make_case([1] * len(kv_lens), kv_lens, heads=(2 * group, 2)) if kv_lens else None
    wrapper = decode_wrapper()
    if case is None:
        empty = int32([])
        dtype = default_dtype()
        wrapper.plan(int32([0]), empty, empty, 4, 2, 64, page_size, q_data_type=dtype)
        cache = torch.zeros(1, 2, page_size, 2, 64, dtype=dtype)
        assert wrapper.run(torch.zeros(0, 4, 64, dtype=dtype), cache).shape == (0, 4, 64)
        return
    table = case.paged(page_size)
    plan_decode(wrapper, case, table, page_size, window_left=window_left, fixed_split_size=split)
    expected = case.expected(window_left=window_left)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


@pytest.mark.usefixtures("device")
def test_several_new_tokens_per_request_are_causal() -> None:
    case = make_case([3, 3], [3, 41])
    table = case.paged(16)
    wrapper = decode_wrapper(use_tensor_cores=True)
    plan_decode(wrapper, case, table, 16, q_len_per_req=3)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(causal=True))
    with pytest.raises(ValueError, match="q_len_per_req"):
        wrapper.run(case.rows[:4], table.cache)
    with pytest.warns(DeprecationWarning, match="plan"):
        wrapper.run(case.rows, table.cache, q_len_per_req=3)


def test_q_len_per_req_is_checked() -> None:
    case = make_case([2, 2], [1, 41])
    table = case.paged(16)
    with pytest.raises(ValueError, match="use_tensor_cores"):
        plan_decode(decode_wrapper(), case, table, 16, q_len_per_req=2)
    with pytest.raises(ValueError, match="empty KV range"):
        plan_decode(decode_wrapper(use_tensor_cores=True), case, table, 16, q_len_per_req=2)
    with pytest.raises(ValueError, match="prior plan"):
        fi.fast_decode_plan(
            decode_wrapper(use_tensor_cores=True),
            table.indptr,
            table.indices,
            table.last_page_len,
            *case.heads,
            16,
            q_len_per_req=2,
        )


@pytest.mark.parametrize(
    "split", [{"fixed_split_size": 8}, {"disable_split_kv": True}, {}], ids=str
)
def test_split_options_make_bits_independent_of_batch_mates(
    split: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the cuts follow the whole batch, and rounding with them: float32 shows it."""
    monkeypatch.setattr("fi_backend.planning.default_workers", lambda _: 3)
    case = make_case([1] * 3, [4000, 900, 2500])
    bits = []
    for one in (case, Case(case.q[:1], case.k[:1], case.v[:1])):
        table = one.paged(16)
        wrapper = decode_wrapper()
        plan_decode(wrapper, one, table, 16, **split)
        state = wrapper.run_return_lse(one.rows, table.cache)
        assert_state(state, one.expected())
        bits.append(torch.cat([x[0].flatten().float() for x in state]))
    if split or device == "cpu":
        assert torch.equal(*bits) == bool(split)


@pytest.mark.usefixtures("device")
def test_forward_replaces_the_planned_options() -> None:
    case = make_case([1] * 3, [40, 5, 18])
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    got = wrapper.forward_return_lse(
        case.rows, table.cache, window_left=6, logits_soft_cap=4.0, sm_scale=0.25, v_scale=2.0
    )
    out, lse = case.expected(window_left=6, logits_soft_cap=4.0, sm_scale=0.25)
    assert_state(got, (2.0 * out, lse))
    # The defaults of forward() are options too.
    assert_state(
        (
            wrapper.forward(case.rows, table.cache),
            wrapper.run_return_lse(case.rows, table.cache)[1],
        ),
        case.expected(),
    )
    wrapper.end_forward()


@pytest.mark.usefixtures("device")
def test_out_and_lse_are_written_where_given() -> None:
    case = make_case([1, 1], [40, 5])
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    wide = torch.full((2, 4, 96), math.nan, dtype=case.rows.dtype)
    out, lse = wide[..., :64], torch.full((2, 4), math.nan)
    got = wrapper.run(case.rows, table.cache, out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    assert_state((out, lse), case.expected())
    assert torch.isnan(wide[..., 64:]).all()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window_left": 9}, {"logits_soft_cap": 3.0}, {"sm_scale": 0.4}, {"kv_len": 0}],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_single_decode(kv_layout: str, options: dict[str, Any]) -> None:
    options = dict(options)
    case = make_case([1], [options.pop("kv_len", 131)])
    k, v = case.ragged(kv_layout)
    q = case.q[0][0]
    out, lse = fi.single_decode_with_kv_cache(
        q, k, v, kv_layout=kv_layout, return_lse=True, **options
    )
    assert out.shape == q.shape
    assert_state((out[None], lse[None]), case.expected(**options))
    alone = fi.single_decode_with_kv_cache(q, k, v, kv_layout=kv_layout, **options)
    assert torch.equal(alone, out)


@pytest.mark.usefixtures("device")
def test_last_page_len_of_a_request_without_pages_does_not_count() -> None:
    case = make_case([1] * 3, [5, 0, 9])
    table = case.paged(4)
    table.last_page_len[1] = 3
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


@pytest.mark.usefixtures("device")
def test_single_decode_scales_and_positions() -> None:
    case = make_case([1], [50])
    args = (case.q[0][0], *case.ragged())
    out = fi.single_decode_with_kv_cache(*args, q_scale=0.5, k_scale=3.0, v_scale=2.0)
    assert_out(out, case.expected(sm_scale=1.5 / 8)[0][0] * 2.0, 3e-5)
    out = fi.single_decode_with_kv_cache(*args, pos_encoding_mode="ALIBI")
    assert_out(out, case.expected(alibi_slopes=alibi_slopes(4, case.rows.device))[0][0])


def test_single_decode_refuses() -> None:
    q, k = torch.zeros(4, 64), torch.zeros(9, 2, 64)
    with pytest.raises(ValueError, match=r"q must have shape \[\*, \*\]"):
        fi.single_decode_with_kv_cache(q[None], k, k)
    with pytest.raises(ValueError, match="v must have as many tokens and heads as k"):
        fi.single_decode_with_kv_cache(q, k, k[:-1])
    with pytest.raises(TypeError, match="v must have the dtype of k"):
        fi.single_decode_with_kv_cache(q, k, k.bfloat16())
    with pytest.raises(UnsupportedError, match="device must be cpu or cuda; got meta"):
        fi.single_decode_with_kv_cache(*(x.to("meta") for x in (q, k, k)))
