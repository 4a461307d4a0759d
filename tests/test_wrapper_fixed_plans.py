"""Wrappers with use_cuda_graph: what the first plan() fixes, and plans that a refusal leaves whole.

A captured graph follows the buffers alone, so that the same holds where nothing is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrapper_cases import (
    assert_out,
    assert_state,
    default_dtype,
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

pytestmark = pytest.mark.usefixtures("device")

F8 = torch.float8_e4m3fn
OTHER_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"window_left": 7}, "window_left is fixed at -1 by the first plan.*; got 7. Make another"),
    ({"logits_soft_cap": 30.0}, "logits_soft_cap is fixed at 0.0 .*; got 30.0"),
    ({"sm_scale": 0.5}, "sm_scale is fixed at 0.125 .*; got 0.5"),
    ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode is fixed at NONE .*; got ALIBI"),
    ({"kv_data_type": F8}, "kv_data_type is fixed at .*; got torch.float8_e4m3fn"),
    ({"o_data_type": torch.float16}, "o_data_type is fixed at .*; got torch.float16"),
    ({"fixed_split_size": 4}, "fixed_split_size is fixed at None .*; got 4"),
    ({"disable_split_kv": True}, "disable_split_kv is fixed at False .*; got True"),
]


def ragged_wrapper() -> fi.BatchPrefillWithRaggedKVCacheWrapper:
    return fi.BatchPrefillWithRaggedKVCacheWrapper(
        workspace(), use_cuda_graph=True, qo_indptr_buf=int32([0] * 3), kv_indptr_buf=int32([0] * 3)
    )


@pytest.mark.parametrize(("change", "message"), OTHER_ARGUMENTS, ids=str)
def test_a_decode_plan_keeps_the_arguments_of_the_first(
    change: dict[str, Any], message: str
) -> None:
    wrapper, _ = graph_decode_wrapper(2, 20)
    first, other = make_case([1, 1], [33, 5]), make_case([1, 1], [6, 40])
    table = first.paged(4)
    plan_decode(wrapper, first, table, 4)
    with pytest.raises(ValueError, match=message):
        plan_decode(wrapper, other, other.paged(4), 4, **change)
    assert_state(wrapper.run_return_lse(first.rows, table.cache), first.expected())


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "message"),
    [
        ((8, 2), 64, 4, "num_qo_heads is fixed at 4 .*; got 8"),
        ((4, 4), 64, 4, "num_kv_heads is fixed at 2 .*; got 4"),
        ((4, 2), 128, 4, "head_dim_qk is fixed at 64 .*; got 128"),
        ((4, 2), 64, 8, "page_size is fixed at 4 .*; got 8"),
    ],
)
def test_a_decode_plan_keeps_the_geometry_of_the_first(
    heads: tuple[int, int], head_dim: int, page_size: int, message: str
) -> None:
    wrapper, _ = graph_decode_wrapper(2, 20)
    first = make_case([1, 1], [33, 5])
    plan_decode(wrapper, first, first.paged(4), 4)
    other = make_case([1, 1], [20, 3], heads=heads, head_dim=head_dim)
    with pytest.raises(ValueError, match=message):
        plan_decode(wrapper, other, other.paged(page_size), page_size)


@pytest.mark.parametrize(("change", "message"), [*OTHER_ARGUMENTS, ({"causal": True}, "causal is")])
def test_prefill_plans_keep_the_arguments_of_the_first(
    change: dict[str, Any], message: str
) -> None:
    case = make_case([3, 2], [33, 5])
    paged = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(2, 20))
    plan_prefill(paged, case, case.paged(4), 4)
    with pytest.raises(ValueError, match=message):
        plan_prefill(paged, case, case.paged(4), 4, **change)
    ragged = ragged_wrapper()
    arguments = (case.qo_indptr, case.kv_indptr, *case.heads)
    ragged.plan(*arguments, q_data_type=default_dtype())
    with pytest.raises(ValueError, match=message):
        ragged.plan(*arguments, **{"q_data_type": default_dtype(), **change})


def test_a_mask_is_planned_always_or_never() -> None:
    """A captured run reads the mask's buffer, whatever later plans say."""
    masks = {"custom_mask_buf": torch.zeros(64).byte(), "mask_indptr_buf": int32([0] * 3)}
    wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(2, 20), **masks)
    case = make_case([3, 2], [33, 5])
    mask = torch.ones(3 * 33 + 2 * 5, dtype=torch.bool)
    plan_prefill(wrapper, case, case.paged(4), 4, custom_mask=mask)
    with pytest.raises(ValueError, match=r"custom_mask is fixed at a mask .*; got None"):
        plan_prefill(wrapper, case, case.paged(4), 4)


def test_without_graphs_any_plan_may_follow() -> None:
    wrapper = prefill_wrapper()
    for heads, options in (((4, 2), {}), ((8, 2), {"causal": True}), ((4, 2), {"window_left": 3})):
        case = make_case([3, 2], [33, 5], heads=heads)
        table = case.paged(4)
        plan_prefill(wrapper, case, table, 4, **options)
        expected = case.expected(**options)
        assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


def test_forward_may_replace_options_within_a_step() -> None:
    """Engines plan a step once and give each layer's options to forward()."""
    wrapper, _ = graph_decode_wrapper(2, 20)
    for kv_lens in ([33, 5], [4, 40]):
        case = make_case([1, 1], kv_lens)
        table = case.paged(4)
        plan_decode(wrapper, case, table, 4)
        for options in ({"window_left": 6}, {"logits_soft_cap": 4.0, "sm_scale": 0.25}):
            got = wrapper.forward_return_lse(case.rows, table.cache, **options)
            assert_state(got, case.expected(**options))


def test_forward_leaves_alone_what_a_graph_holds() -> None:
    """A captured run() reads its plan's buffer, whatever forward() is asked for between replays."""
    wrapper, _ = graph_decode_wrapper(2, 20)
    case = make_case([1, 1], [33, 5])
    table = case.paged(4)
    plan_decode(wrapper, case, table, 4)
    captured = wrapper._planned()[1]
    held = captured.buffer.clone()
    for window_left in (6, 6, -1, 6):
        got = wrapper.forward_return_lse(case.rows, table.cache, window_left=window_left)
        assert_state(got, case.expected(window_left=window_left))
        assert torch.equal(captured.buffer, held)
    plan_decode(wrapper, case, table, 4)
    assert wrapper._planned()[1].buffer.data_ptr() == captured.buffer.data_ptr()
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


def test_a_planned_wrapper_keeps_its_workspace() -> None:
    wrapper, _ = graph_decode_wrapper(2, 20)
    wrapper.reset_workspace_buffer(workspace(), workspace())
    case = make_case([1, 1], [33, 5])
    plan_decode(wrapper, case, case.paged(4), 4)
    with pytest.raises(
        RuntimeError, match=r"reset_workspace_buffer\(\) must come before the first"
    ):
        wrapper.reset_workspace_buffer(workspace(), workspace())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": int32(range(21))}, ValueError, "size of indices should be less than or equal"),
        ({"last_page_len": int32([1, 9])}, ValueError, r"last_page_len\[1\] = 9"),
        ({"indptr": int32([0, 1, 2, 3])}, ValueError, "last_page_len must have shape"),
        ({"num_qo_heads": 8}, ValueError, "num_qo_heads is fixed at 4"),
        ({"page_size": 1 << 30}, ValueError, "fewer than 2\\*\\*31 tokens; got 9 pages"),
    ],
    ids=str,
)
def test_a_refused_decode_plan_leaves_the_earlier_one(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    wrapper, buffers = graph_decode_wrapper(2, 20)
    case, other = make_case([1, 1], [33, 5]), make_case([1, 1], [6, 40])
    table = case.paged(4)
    plan_decode(wrapper, case, table, 4)
    before = [buffer.clone() for buffer in buffers]
    of_other = other.paged(4)
    num_qo_heads, num_kv_heads, head_dim = other.heads
    arguments = {
        "indptr": int32([0, 9, 12]).cpu(),
        "indices": of_other.indices.cpu(),
        "last_page_len": of_other.last_page_len.cpu(),
        "num_qo_heads": num_qo_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "page_size": 4,
        "q_data_type": default_dtype(),
        **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in change.items()},
    }
    with pytest.raises(error, match=message):
        wrapper.plan(**arguments)
    for buffer, was in zip(buffers, before, strict=True):
        assert torch.equal(buffer, was)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


Damage = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda mask: mask[:-1], ValueError, "custom_mask must have 131 elements"),
        (lambda mask: mask.byte(), TypeError, "custom_mask must be a torch.Tensor of dtype"),
        (lambda mask: mask, ValueError, "size of custom_mask should be less than or equal"),
    ],
    ids=["size", "dtype", "no room"],
)
def test_a_refused_mask_leaves_the_earlier_plan(
    damage: Damage, error: type[Exception], message: str
) -> None:
    masks = {"custom_mask_buf": torch.zeros(15).byte(), "mask_indptr_buf": int32([0] * 3)}
    buffers = {**prefill_buffers(2, 20), **masks}
    wrapper = prefill_wrapper(use_cuda_graph=True, **buffers)
    case, other = make_case([3, 2], [33, 5]), make_case([3, 1], [37, 20])
    table = case.paged(4)
    mask = torch.rand(3 * 33 + 2 * 5) < 0.5
    plan_prefill(wrapper, case, table, 4, custom_mask=mask)
    before = [buffer.clone() for buffer in buffers.values()]
    with pytest.raises(error, match=message):
        plan_prefill(
            wrapper,
            other,
            other.paged(4).to("cpu"),
            4,
            custom_mask=damage(torch.ones(131, dtype=torch.bool)),
        )
    for buffer, was in zip(buffers.values(), before, strict=True):
        assert torch.equal(buffer, was)
    expected = case.expected(custom_mask=[mask[:99].view(3, 33), mask[99:].view(2, 5)])
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)


def test_a_refused_first_plan_fixes_nothing() -> None:
    wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(2, 16))
    small, long, tall = (
        make_case(*lens) for lens in (([3, 2], [33, 5]), ([3, 2], [33, 50]), ([9, 9], [20, 9]))
    )
    with pytest.raises(ValueError, match="paged_kv_indices should be less than or equal"):
        plan_prefill(wrapper, long, long.paged(4), 4, window_left=3)
    for case in (tall, small):
        table = case.paged(4)
        plan_prefill(wrapper, case, table, 4)
        assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


def test_a_cascade_refused_on_its_last_level_leaves_all_levels() -> None:
    sizes = {"qo_indptr": (2, 3), "paged_kv_indptr": (2, 3), "paged_kv_indices": (9, 9)}
    sizes["paged_kv_last_page_len"] = (1, 2)
    buffers = {
        f"{name}_buf_arr": [int32([0] * size) for size in of_level]
        for name, of_level in sizes.items()
    }
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2, workspace(), use_cuda_graph=True, **buffers)
    case = make_case([1, 1], [8, 8])
    cache = (torch.cat(case.k)[:, None], torch.cat(case.v)[:, None])
    # Both requests see the first request's first six tokens, and two of their own.
    shared, own = int32(range(6)), int32([6, 7, 14, 15])
    seen = make_case([1, 1], [8, 8])
    for name in ("k", "v"):
        both = getattr(case, name)
        getattr(seen, name)[:] = [torch.cat((both[0][:6], both[i][6:])) for i in range(2)]
    seen.q[:] = case.q

    def plan(num_shared: int, requests: int) -> None:
        wrapper.plan(
            [int32([0, 2]), int32([0, 1, 2, 2][: requests + 1])],
            [int32([0, num_shared]), int32([0, 2, 4, 4][: requests + 1])],
            [shared[:num_shared], own],
            [int32([1]), int32([1] * requests)],
            *case.heads,
            1,
            q_data_type=default_dtype(),
        )

    plan(6, 2)
    assert_out(wrapper.run(case.rows, cache), seen.expected()[0])
    with pytest.raises(ValueError, match="batch size 3 mismatches"):
        plan(2, 3)
    assert_out(wrapper.run(case.rows, cache), seen.expected()[0])
