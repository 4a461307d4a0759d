"""Prefill attention over a paged cache, and of one request, with FlashInfer's calls.

Values are tested on each device, checks of arguments on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wrapper_cases import (
    assert_state,
    default_dtype,
    int32,
    make_case,
    pack_masks,
    plan_prefill,
    prefill_buffers,
    prefill_wrapper,
    random_examples,
)

import fi_backend as fi
from fi_backend._arguments import alibi_slopes
from fi_backend.errors import UnsupportedError

F32 = torch.float32
BF16 = torch.bfloat16
QO_LENS = [5, 1, 0, 70, 3]
KV_LENS = [37, 16, 9, 70, 1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("form", "page_size"), [("pair", 1), ("one", 5), ("pair", 16)])
@pytest.mark.usefixtures("device")
def test_layouts(causal: bool, kv_layout: str, form: str, page_size: int) -> None:
    """The last request has more rows than keys: its first rows see nothing when causal."""
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(page_size, kv_layout, form)
    wrapper = prefill_wrapper(kv_layout=kv_layout)
    plan_prefill(wrapper, case, table, page_size, causal=causal)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(causal=causal))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window_left": 4},
        {"causal": False, "window_left": 4},
        {"causal": True, "logits_soft_cap": 3.0},
        {"causal": True, "sm_scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_options(options: dict[str, Any]) -> None:
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(4)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, **options)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(**options))


@pytest.mark.usefixtures("device")
def test_alibi_and_sinks() -> None:
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(4)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, causal=True, pos_encoding_mode="ALIBI")
    expected = case.expected(causal=True, alibi_slopes=alibi_slopes(4, case.rows.device))
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)

    plan_prefill(wrapper, case, table, 4, causal=True)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    got = wrapper.run_return_lse(case.rows, table.cache, sinks=sinks)
    assert_state(got, case.expected(causal=True, sinks=sinks))


@pytest.mark.parametrize("on_host", [(), ("table",), ("mask",), ("table", "mask")], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("device")
def test_custom_mask_takes_the_place_of_causal(packed: bool, on_host: tuple[str, ...]) -> None:
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(4)
    masks = [torch.rand(len(q), len(k)) < 0.4 for q, k in zip(case.q, case.k, strict=True)]
    name = "packed_custom_mask" if packed else "custom_mask"
    mask = pack_masks(masks) if packed else torch.cat([mask.flatten() for mask in masks])
    wrapper = prefill_wrapper()
    metadata = (case.qo_indptr, table.indptr, table.indices, table.last_page_len)
    wrapper.plan(
        *(x.cpu() if "table" in on_host else x for x in metadata),
        *case.heads,
        4,
        causal=True,
        q_data_type=case.rows.dtype,
        **{name: mask.cpu() if "mask" in on_host else mask},
    )
    expected = case.expected(custom_mask=masks)
    assert torch.isinf(expected[1]).any(), "some row must see no key"
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


@pytest.mark.usefixtures("device")
def test_value_heads_may_differ_in_size() -> None:
    case = make_case(QO_LENS, KV_LENS, head_dim=64, head_dim_vo=32)
    table = case.paged(4)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, causal=True, head_dim_vo=32)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(causal=True))


@pytest.mark.usefixtures("device")
def test_bfloat16_scales_and_forward() -> None:
    case = make_case(QO_LENS, KV_LENS, head_dim=128, dtype=BF16)
    table = case.paged(16)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 16, causal=True)
    got = wrapper.run_return_lse(
        case.rows, table.cache, q_scale=0.5, k_scale=torch.tensor(4.0), v_scale=0.5
    )
    out, lse = case.expected(causal=True, sm_scale=2.0 / 128**0.5)
    assert_state(got, (0.5 * out, lse))
    options = {"window_left": 7, "logits_soft_cap": 4.0, "sm_scale": 0.1}
    got = wrapper.forward_return_lse(case.rows, table.cache, **options)
    assert_state(got, case.expected(**options))
    assert torch.equal(wrapper.forward(case.rows, table.cache, **options), got[0])


@random_examples
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 16]),
    group=st.sampled_from([1, 3]),
    causal=st.booleans(),
    window_left=st.sampled_from([-1, -1, 0, 11]),
    split=st.sampled_from([None, 1, 4]),
)
@pytest.mark.usefixtures("device")
def test_random_batches(
    lens: list[tuple[int, int]],
    page_size: int,
    group: int,
    causal: bool,
    window_left: int,
    split: int | None,
) -> None:
    case = make_case([n for n, _ in lens], [n for _, n in lens], heads=(2 * group, 2))
    table = case.paged(page_size)
    wrapper = prefill_wrapper()
    options = {"causal": causal, "window_left": window_left}
    plan_prefill(wrapper, case, table, page_size, fixed_split_size=split, **options)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected(**options))


@pytest.mark.usefixtures("device")
def test_graph_mode() -> None:
    buffers = prefill_buffers(2, 30)
    mask_buffers = {
        "custom_mask_buf": torch.zeros(100, dtype=torch.uint8),
        "mask_indptr_buf": torch.zeros(3, dtype=torch.int32),
    }
    wrapper = prefill_wrapper(use_cuda_graph=True, **buffers, **mask_buffers)
    assert wrapper.is_cuda_graph_enabled
    for qo_lens, kv_lens in (([6, 2], [33, 5]), ([1, 1], [60, 0])):
        case = make_case(qo_lens, kv_lens)
        table = case.paged(4)
        qo_indptr = case.qo_indptr
        masks = [torch.rand(len(q), len(k)) < 0.5 for q, k in zip(case.q, case.k, strict=True)]
        flat = torch.cat([mask.flatten() for mask in masks])
        plan_prefill(wrapper, case, table, 4, custom_mask=flat)
        given = (qo_indptr, table.indptr, table.indices, table.last_page_len)
        for buffer, source in zip(buffers.values(), given, strict=True):
            assert torch.equal(buffer[: len(source)], source)
        packed = pack_masks(masks)
        assert torch.equal(mask_buffers["custom_mask_buf"][: len(packed)], packed)
        for source in given:
            source.fill_(-7)  # run() must read the buffers, not what plan_prefill() was given
        expected = case.expected(custom_mask=masks)
        assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


def test_graph_mode_fixes_sizes() -> None:
    wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(2, 14))
    case = make_case([6, 2], [30, 5])
    plan_prefill(wrapper, case, case.paged(4), 4)
    three = make_case([1, 1, 1], [4, 4, 4])
    with pytest.raises(ValueError, match=r"batch size 3 mismatches .* initialization 2"):
        plan_prefill(wrapper, three, three.paged(4), 4)
    long = make_case([6, 2], [60, 5])
    with pytest.raises(ValueError, match="paged_kv_indices should be less than or equal"):
        plan_prefill(wrapper, long, long.paged(4), 4)
    tall = make_case([7, 2], [30, 5])
    with pytest.raises(ValueError, match=r"rows in qo_indptr 9 .* cannot exceed .* 8"):
        plan_prefill(wrapper, tall, tall.paged(4), 4)
    unmasked = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(2, 14))
    mask = torch.ones(190, dtype=torch.bool)
    with pytest.raises(ValueError, match="custom_mask_buf must be initialized"):
        plan_prefill(unmasked, case, case.paged(4), 4, custom_mask=mask)
    with pytest.raises(ValueError, match=r"qo_indptr_buf should be a torch\.Tensor"):
        prefill_wrapper(use_cuda_graph=True)
    wrong = {**prefill_buffers(2, 14), "paged_kv_last_page_len_buf": int32([0])}
    with pytest.raises(ValueError, match="length of paged_kv_last_page_len_buf should be 2"):
        prefill_wrapper(use_cuda_graph=True, **wrong)


@pytest.mark.usefixtures("device")
def test_workspace_size() -> None:
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(16)
    wrapper = prefill_wrapper()
    args = (case.qo_indptr, table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    float_bytes, int_bytes = wrapper.workspace_size(*args, q_data_type=default_dtype())
    wrapper.reset_workspace_buffer(
        torch.zeros(float_bytes, dtype=torch.uint8), torch.zeros(int_bytes, dtype=torch.uint8)
    )
    wrapper.plan(*args, q_data_type=default_dtype())
    used = wrapper._planned()[1]
    assert used.partials.data_ptr() == wrapper._workspace.partials(1).data_ptr()
    assert 4 * used.partials.numel() <= float_bytes
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qo_indptr": int32([1, 2, 3])}, ValueError, r"qo_indptr\[0\] must be 0; got 1"),
        ({"qo_indptr": int32([0, 3, 2])}, ValueError, r"qo_indptr must never decrease"),
        ({"qo_indptr": int32([0, 3])}, ValueError, r"qo_indptr must have shape \[3\]"),
        ({"paged_kv_indptr": int32([0, 3, 2])}, ValueError, "paged_kv_indptr must never decrease"),
        ({"paged_kv_indices": int32([0])}, ValueError, "paged_kv_indices must have at least"),
        ({"paged_kv_last_page_len": int32([5, 1])}, ValueError, r"paged_kv_last_page_len\[0\] = 5"),
        ({"custom_mask": torch.ones(9, dtype=torch.bool)}, ValueError, "must have 17 elements"),
        ({"custom_mask": torch.ones(17)}, TypeError, "custom_mask must be .* torch.bool; got"),
        ({"packed_custom_mask": torch.ones(2).byte()}, ValueError, "must have 3 bytes"),
        ({"seq_lens": int32([3, 3])}, ValueError, "seq_lens must agree with the key lengths"),
        ({"seq_lens_q": int32([3, 3])}, ValueError, "seq_lens_q must agree with qo_indptr"),
        ({"max_token_per_sequence": 2}, ValueError, "at least the longest length, 3; got 2"),
        ({"max_sequence_kv": 3}, ValueError, "at least the longest length, 4; got 3"),
        ({"prefix_len_ptr": int32([1, 1])}, UnsupportedError, "multi-item scoring"),
        ({"token_pos_in_items_len": 4}, UnsupportedError, "token_pos_in_items_len is not"),
        ({"block_tables": int32([[1], [1]])}, UnsupportedError, "block_tables is not supported"),
        ({"head_dim_vo": 20}, UnsupportedError, "head_dim_vo must be a multiple of 8"),
        ({"o_data_type": torch.float8_e4m3fn}, UnsupportedError, "o_dtype must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_plan_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "qo_indptr": int32([0, 3, 5]),
        "paged_kv_indptr": int32([0, 1, 2]),
        "paged_kv_indices": int32([0, 1]),
        "paged_kv_last_page_len": int32([3, 4]),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "page_size": 4,
        "q_data_type": F32,
    }
    with pytest.raises(error, match=message):
        prefill_wrapper().plan(**{**arguments, **change})


def test_run_refuses() -> None:
    case = make_case([3, 2], [3, 4])
    table = case.paged(4)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, window_left=9)
    with pytest.raises(ValueError, match=r"\(6\) does not match qo_indptr\[-1\] \(5\)"):
        wrapper.run(torch.zeros(6, 4, 64), table.cache)
    with pytest.raises(ValueError, match=r"does not match the q_data_type torch\.float32 spec"):
        wrapper.run(case.rows.bfloat16(), table.cache)
    with pytest.raises(ValueError, match="window_left must be what plan"):
        wrapper.run(case.rows, table.cache, window_left=-1)
    with pytest.raises(UnsupportedError, match="args is not supported"):
        wrapper.run(case.rows, table.cache, torch.ones(4))
    with pytest.raises(UnsupportedError, match="use_fp16_softmax is not supported; got True"):
        wrapper.run(case.rows, table.cache, use_fp16_softmax=True)
    assert wrapper.run(case.rows, table.cache, window_left=9, use_fp16_softmax=False).any()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("lens", [(7, 130), (130, 130), (9, 4), (3, 0)])
@pytest.mark.usefixtures("device")
def test_single_prefill(kv_layout: str, lens: tuple[int, int]) -> None:
    case = make_case([lens[0]], [lens[1]])
    k, v = case.ragged(kv_layout)
    for options in ({}, {"causal": True}, {"causal": True, "window_left": 5}):
        got = fi.single_prefill_with_kv_cache_return_lse(
            case.rows, k, v, kv_layout=kv_layout, **options
        )
        assert_state(got, case.expected(**options))


@pytest.mark.usefixtures("device")
def test_single_prefill_options() -> None:
    case = make_case([9], [50])
    args = (case.rows, *case.ragged())
    mask = torch.rand(9, 50) < 0.3
    expected = case.expected(custom_mask=[mask])
    for masked in ({"custom_mask": mask}, {"packed_custom_mask": pack_masks([mask])}):
        got = fi.single_prefill_with_kv_cache(*args, causal=True, return_lse=True, **masked)
        assert_state(got, expected)
    out, lse = fi.single_prefill_with_kv_cache_return_lse(
        *args, logits_soft_cap=4.0, k_scale=2.0, v_scale=0.5, pos_encoding_mode="ALIBI"
    )
    wanted = case.expected(
        logits_soft_cap=4.0, sm_scale=0.25, alibi_slopes=alibi_slopes(4, case.rows.device)
    )
    assert_state((out, lse), (0.5 * wanted[0], wanted[1]), 3e-5)


def test_single_prefill_refuses() -> None:
    q, k = torch.zeros(3, 4, 64), torch.zeros(9, 2, 64)
    with pytest.raises(UnsupportedError, match="scale_q is not supported; got a tensor"):
        fi.single_prefill_with_kv_cache(q, k, k, scale_q=torch.ones(4))
    with pytest.raises(UnsupportedError, match="kv_cache_sf is not supported"):
        fi.single_prefill_with_kv_cache(q, k, k, kv_cache_sf=(k, k))
    with pytest.raises(UnsupportedError, match="backend must be one of"):
        fi.single_prefill_with_kv_cache(q, k, k, backend="cudnn")
    with pytest.raises(ValueError, match="k must have shape"):
        fi.single_prefill_with_kv_cache(q, k[0], k)
    with pytest.raises(UnsupportedError, match="q_dtype must be one of"):
        fi.single_prefill_with_kv_cache(*(x.to(torch.float8_e4m3fn) for x in (q, k, k)))
