"""Decode attention with FlashInfer's calls: plan/run contracts, fixed buffers and refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from wrapper_cases import (
    assert_state,
    decode_wrapper,
    default_dtype,
    graph_decode_wrapper,
    int32,
    make_case,
    plan_decode,
    workspace,
)

import fi_backend as fi
from fi_backend.errors import UnsupportedError

F32 = torch.float32
BF16 = torch.bfloat16


@pytest.mark.usefixtures("device")
def test_positional_options_are_deprecated() -> None:
    case = make_case([1, 1], [40, 5])
    table = case.paged(4)
    wrapper = decode_wrapper()
    args = (table.indptr, table.indices, table.last_page_len, *case.heads, 4)
    with pytest.warns(DeprecationWarning, match="by position"):
        wrapper.plan(*args, "NONE", 6, 4.0, default_dtype())
    expected = case.expected(window_left=6, logits_soft_cap=4.0)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), expected)
    with pytest.raises(TypeError, match="multiple values for argument 'window_left'"):
        wrapper.plan(*args, "NONE", 6, window_left=6)
    with pytest.raises(TypeError, match="at most 16"):
        wrapper.plan(*args, *([None] * 17))
    with pytest.raises(TypeError, match="windowleft"):
        wrapper.plan(*args, windowleft=3)


@pytest.mark.usefixtures("device")
def test_graph_mode_copies_into_its_buffers() -> None:
    wrapper, buffers = graph_decode_wrapper(2, 20)
    assert wrapper.is_cuda_graph_enabled
    assert wrapper.use_tensor_cores
    for kv_lens in ([33, 5], [60, 0]):
        case = make_case([1, 1], kv_lens)
        table = case.paged(4)
        plan_decode(wrapper, case, table, 4)
        given = (table.indptr, table.indices, table.last_page_len)
        for buffer, source in zip(buffers, given, strict=True):
            assert torch.equal(buffer[: len(source)], source)
            source.fill_(-7)  # run() must read the buffers, not what plan() was given
        assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


def test_graph_mode_fixes_sizes() -> None:
    wrapper, buffers = graph_decode_wrapper(2, 20)
    three = make_case([1] * 3, [4, 4, 4])
    with pytest.raises(ValueError, match=r"batch size 3 mismatches .* initialization 2"):
        plan_decode(wrapper, three, three.paged(4), 4)
    long = make_case([1, 1], [100, 4])
    with pytest.raises(ValueError, match="less than or equal to the allocated buffer"):
        plan_decode(wrapper, long, long.paged(4), 4)
    case = make_case([2, 2], [8, 8])
    plan_decode(wrapper, case, case.paged(4), 4, q_len_per_req=2)
    with pytest.raises(ValueError, match="frozen"):
        plan_decode(wrapper, case, case.paged(4), 4, q_len_per_req=3)
    with pytest.raises(ValueError, match=r"paged_kv_indptr_buffer .* cudagraph mode"):
        decode_wrapper(use_cuda_graph=True)
    with pytest.raises(ValueError, match=r"batch_size \+ 1"):
        fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), buffers[2], *buffers[1:])


@pytest.mark.usefixtures("device")
def test_fast_decode_plan_matches_plan() -> None:
    case = make_case([1, 1], [40, 5])
    table = case.paged(4)
    wrapper = decode_wrapper()
    args = (table.indptr, table.indices, table.last_page_len, *case.heads, 4)
    options = {"q_data_type": default_dtype()}
    fi.fast_decode_plan(wrapper, *args, **options, global_override_indptr_cpu=table.indptr.cpu())
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())
    on_host = (table.indptr.cpu(), *args[1:])
    with pytest.raises(ValueError, match="global_override_indptr_cpu must agree"):
        fi.fast_decode_plan(wrapper, *on_host, **options, global_override_indptr_cpu=on_host[0] + 1)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["plan", "begin_forward"])
def test_fast_decode_plan_in_the_place_of_a_method(name: str) -> None:
    """As engines do, so that it must not call what it replaces."""
    case = make_case([1, 1], [40, 5])
    table = case.paged(4)
    wrapper = decode_wrapper()
    setattr(wrapper, name, partial(fi.fast_decode_plan, wrapper))
    plan_it = getattr(wrapper, name)
    args = (table.indptr, table.indices, table.last_page_len, *case.heads, 4)
    plan_it(*args, q_data_type=default_dtype())
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


@pytest.mark.usefixtures("device")
def test_workspace_of_the_stated_size_is_used_and_enough() -> None:
    case = make_case([1] * 6, [400, 5, 0, 77, 800, 64])
    table = case.paged(16)
    wrapper = decode_wrapper()
    args = (table.indptr, table.indices, table.last_page_len, *case.heads, 16)
    float_bytes, int_bytes = wrapper.workspace_size(*args, q_data_type=default_dtype())
    assert float_bytes > 0
    assert int_bytes > 0
    exact = torch.zeros(float_bytes, dtype=torch.uint8)
    wrapper.reset_workspace_buffer(exact, torch.zeros(int_bytes, dtype=torch.uint8))
    wrapper.plan(*args, q_data_type=default_dtype())
    assert wrapper._planned()[1].partials.data_ptr() == exact.data_ptr()
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())
    wrapper.reset_workspace_buffer(exact[:16], exact[:16])
    wrapper.plan(*args, q_data_type=default_dtype())
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())
    unaligned = torch.zeros(65, dtype=torch.uint8)[1:]
    with pytest.raises(ValueError, match="float_workspace_buffer must be 16-byte aligned"):
        wrapper.reset_workspace_buffer(unaligned, exact)
    with pytest.raises(ValueError, match="int_workspace_buffer must be 16-byte aligned"):
        wrapper.reset_workspace_buffer(exact, unaligned)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indptr": int32([0, 3, 2])}, ValueError, r"indptr must never decrease; got indptr\[1\]"),
        ({"indptr": int32([-1, 1, 2])}, ValueError, r"indptr\[0\] must be at least 0; got -1"),
        ({"indptr": torch.tensor([0, 1, 2])}, TypeError, "indptr must have dtype torch.int32"),
        ({"indptr": int32([[0, 1, 2]])}, ValueError, "indptr must have shape"),
        (
            {"indptr": int32([0, 1, 2]).to("meta")},
            ValueError,
            "indptr must be on the CPU; got meta",
        ),
        ({"indptr": [0, 1, 2]}, TypeError, r"indptr must be a torch\.Tensor; got list"),
        ({"indices": int32([0])}, ValueError, r"indices must have at least indptr\[-1\] = 2"),
        ({"last_page_len": int32([1])}, ValueError, r"last_page_len must have shape \[2\]"),
        ({"last_page_len": int32([1, 17])}, ValueError, r"last_page_len\[1\] = 17"),
        ({"last_page_len": int32([-1, 1])}, ValueError, r"last_page_len\[0\] = -1"),
        ({"num_kv_heads": 3}, UnsupportedError, "num_qo_heads must be a positive multiple"),
        ({"head_dim": 60}, UnsupportedError, "head_dim_qk must be a multiple of 8"),
        ({"head_dim": 0}, UnsupportedError, "multiple of 8 up to 512 on cpu; got 0"),
        ({"num_qo_heads": 0}, UnsupportedError, "num_qo_heads must be a positive multiple"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1; got 0"),
        ({"page_size": 4.0}, TypeError, "page_size must be an int; got 4.0"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int; got 2.0"),
        ({"logits_soft_cap": float("nan")}, UnsupportedError, "logits_soft_cap .*; got nan"),
        (
            {"window": 3},
            TypeError,
            "BatchDecodeWithPagedKVCacheWrapper.plan: unknown argument 'window'; it takes pos",
        ),
        ({"q_data_type": "float99"}, TypeError, "q_data_type must be a torch.dtype"),
        ({"q_data_type": torch.float64}, UnsupportedError, "q_dtype must be one of"),
        ({"kv_data_type": torch.uint8}, UnsupportedError, "kv_dtype must be one of"),
        ({"pos_encoding_mode": "ROPE"}, ValueError, "pos_encoding_mode must be one of"),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 0.0}, ValueError, "rope_theta"),
        ({"window_left": -2}, UnsupportedError, "window_left must be at least 0"),
        ({"window_right": 3}, UnsupportedError, "window_right is not supported; got 3"),
        ({"block_tables": int32([[0, 1]])}, UnsupportedError, "block_tables is not supported"),
        ({"seq_lens": int32([1, 1])}, ValueError, "seq_lens must agree with the page table"),
        ({"fixed_split_size": 0}, ValueError, "fixed_split_size must be at least 1 page; got 0"),
        ({"q_len_per_req": 0}, ValueError, "q_len_per_req must be at least 1; got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_plan_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "indptr": int32([0, 1, 2]),
        "indices": int32([0, 1]),
        "last_page_len": int32([3, 4]),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "page_size": 4,
        "q_data_type": F32,
    }
    wrapper = decode_wrapper()
    with pytest.raises(error, match=message):
        wrapper.plan(**{**arguments, **change})
    with pytest.raises(RuntimeError, match="call plan"):
        wrapper.run(torch.zeros(2, 4, 64), torch.zeros(2, 2, 4, 2, 64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q": torch.zeros(2, 4, 64, dtype=BF16)},
            ValueError,
            "The dtype of q torch.bfloat16 does",
        ),
        ({"cache": torch.zeros(2, 2, 4, 2, 64, dtype=BF16)}, ValueError, "kv_data_type"),
        ({"q": torch.zeros(3, 4, 64)}, ValueError, "q must have batch_size"),
        ({"q": torch.zeros(2, 5, 64)}, ValueError, r"q must have shape \[\*, 4, 64\]"),
        ({"q": torch.zeros(2, 4, 64, 2)[..., 0]}, ValueError, "stride 1 in its last dimension"),
        ({"cache": torch.zeros(2, 2, 8, 2, 64)}, ValueError, r"k must have shape \[\*, 4, 2, 64\]"),
        ({"cache": torch.zeros(2, 3, 4, 2, 64)}, ValueError, "paged_kv_cache must be a pair"),
        ({"cache": [torch.zeros(2, 4, 2, 64)]}, TypeError, "paged_kv_cache must be a tensor"),
        ({"window_left": 5}, ValueError, "window_left must be what plan"),
        ({"out": torch.zeros(2, 4, 32)}, ValueError, "out must have shape"),
        ({"out": torch.zeros(2, 4, 64, dtype=BF16)}, TypeError, "out must have dtype"),
        ({"lse": torch.zeros(2, 4, dtype=BF16)}, TypeError, "lse must have dtype"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \[4\]"),
        ({"k_scale": torch.zeros(3)}, ValueError, "k_scale must have 1 element or one per kv head"),
        ({"kv_cache_sf": torch.zeros(2)}, UnsupportedError, "kv_cache_sf is not supported"),
        ({"skip_softmax_threshold_scale_factor": 0.5}, UnsupportedError, "skip_softmax"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_run_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = decode_wrapper()
    wrapper.plan(int32([0, 1, 2]), int32([0, 1]), int32([3, 4]), 4, 2, 64, 4, q_data_type=F32)
    arguments = {"q": torch.zeros(2, 4, 64), "cache": torch.zeros(2, 2, 4, 2, 64), **change}
    q, cache = arguments.pop("q"), arguments.pop("cache")
    with pytest.raises(error, match=message):
        wrapper.run(q, cache, **arguments)


def test_a_plan_is_of_what_host_tensors_held() -> None:
    """As where a GPU runs it: the next step's table may be filled in meanwhile."""
    case = make_case([1, 1], [40, 5])
    table = case.paged(4)
    metadata = (table.indptr, table.indices, table.last_page_len)
    wrapper = decode_wrapper()
    wrapper.plan(*metadata, *case.heads, 4, q_data_type=F32)
    for tensor in metadata:
        tensor.fill_(1)
    assert_state(wrapper.run_return_lse(case.rows, table.cache), case.expected())


def test_page_ids_out_of_range_are_found() -> None:
    wrapper = decode_wrapper()
    wrapper.plan(int32([0, 1, 2]), int32([0, 2]), int32([3, 4]), 4, 2, 64, 4, q_data_type=F32)
    with pytest.raises(ValueError, match=r"page ids in \[0, 2\); got 2"):
        wrapper.run(torch.zeros(2, 4, 64), torch.zeros(2, 2, 4, 2, 64))


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="kv_layout must be one of NHD, HND; got 'NDH'"):
        decode_wrapper(kv_layout="NDH")
    with pytest.raises(UnsupportedError, match="backend must be one of auto, fa2, fa3"):
        decode_wrapper(backend="trtllm-gen")
    with pytest.raises(UnsupportedError, match="jit_args must be"):
        decode_wrapper(jit_args=["uri"])
    with pytest.raises(UnsupportedError, match="device must be cpu or cuda; got meta"):
        fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device="meta"))
