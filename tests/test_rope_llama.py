"""Attention that rotates q and K itself, through every public call that takes "ROPE_LLAMA".

Kernels of the CPU do it; where they do not, as on a GPU, copies are rotated before. The CPU runs
both ways.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import Mask, torch_attention
from sync_debug import nothing_waits
from wrapper_cases import (
    Case,
    PagedTable,
    assert_state,
    decode_wrapper,
    default_dtype,
    graph_decode_wrapper,
    int32,
    make_case,
    offsets,
    plan_decode,
    plan_prefill,
    prefill_buffers,
    prefill_wrapper,
    workspace,
)

import fi_backend as fi
from fi_backend import spec as spec_module
from fi_backend.errors import UnsupportedError
from tests.tolerance import assert_accurate, assert_lse_accurate

QO_LENS = [5, 1, 0, 70, 3]
KV_LENS = [37, 16, 9, 70, 1]
LLAMA = {"pos_encoding_mode": "ROPE_LLAMA"}
ROPE = {"rope_scale": 2.0, "rope_theta": 5e3}
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def leave_rotation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU a device whose kernels do not rotate."""
    limits = spec_module._LIMITS
    monkeypatch.setitem(limits, "cpu", dataclasses.replace(limits["cpu"], rope=False))


@pytest.fixture(params=["cpu", "cpu copies", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    device, _, before = request.param.partition(" ")
    if before:
        leave_rotation_out(monkeypatch)
    with torch.device(device):
        yield device


def assert_rotated(
    got: tuple[torch.Tensor, torch.Tensor], case: Case, *, scale: float = 1.0, **options: Any
) -> None:
    """Compare with the reference; what is rotated in 16 bits is also rounded to them.

    Args:
        got: out and lse.
        case: what was run.
        scale: factor on logits beyond 1 / sqrt(head_dim).
        options: those of Mask.
    """
    out, lse = got
    sm_scale = scale * case.head_dim**-0.5
    expected = case.expected(sm_scale=sm_scale, **options)
    if out.dtype == torch.float32:
        assert_state(got, expected, 5e-5)
        return
    yardstick = [
        torch_attention(q, k, v, Mask(**options), sm_scale=sm_scale)
        for q, k, v in zip(case.q, case.k, case.v, strict=True)
    ]
    assert_accurate(out, expected[0], torch.cat(yardstick))
    assert_lse_accurate(lse, expected[1], out.dtype)
    assert not out[expected[1].isinf()].any()


@pytest.mark.parametrize(("scale", "theta"), [(None, None), (2.0, 5e3)])
@pytest.mark.usefixtures("device")
def test_decode(scale: float | None, theta: float | None) -> None:
    case = make_case([1] * 4, [40, 5, 0, 18])
    table = case.paged(4)
    wrapper = decode_wrapper()
    plan_decode(wrapper, case, table, 4, **LLAMA, rope_scale=scale, rope_theta=theta)
    rope = {"rope_scale": scale or 1.0, "rope_theta": theta or 1e4}
    assert_rotated(wrapper.run_return_lse(case.rows, table.cache), case, **rope)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("form", "page_size"), [("pair", 1), ("one", 5), ("pair", 16)])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": False, "logits_soft_cap": 3.0}, {"window_left": 6}],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_paged_prefill(kv_layout: str, form: str, page_size: int, options: dict[str, Any]) -> None:
    """The last request has more rows than keys, so that its first rows stand before position 0."""
    case = make_case(QO_LENS, KV_LENS)
    table = case.paged(page_size, kv_layout, form)
    wrapper = prefill_wrapper(kv_layout=kv_layout)
    plan_prefill(wrapper, case, table, page_size, **options, **LLAMA, **ROPE)
    got = wrapper.run_return_lse(case.rows, table.cache)
    assert_rotated(got, case, **options, **ROPE)


@pytest.mark.usefixtures("device")
def test_requests_share_pages_at_different_positions() -> None:
    """Table slots that belong to no request hold ids of no page; the cache stays as it is."""
    dtype, page_size = default_dtype(), 4
    cache = torch.randn(5, 2, page_size, 2, 64).to(dtype)
    pages = [[3, 0, 1], [0, 3], [], [1, 1, 1]]
    last_page_len = int32([4, 2, 0, 1])
    counts = [len(ids) for ids in pages]
    lens = [12, 6, 0, 9]
    k, v = (
        [cache[ids, half].flatten(0, 1)[:n] for ids, n in zip(pages, lens, strict=True)]
        for half in (0, 1)
    )
    case = Case(q=[torch.randn(2, 4, 64).to(dtype) for _ in pages], k=k, v=v)
    indices = int32([2**31 - 1, *itertools.chain(*pages), -(2**31), 5])
    table = PagedTable(cache, offsets(counts) + 1, indices, last_page_len)
    before = cache.clone()
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, page_size, causal=True, **LLAMA, **ROPE)
    assert_rotated(wrapper.run_return_lse(case.rows, cache), case, causal=True, **ROPE)
    assert torch.equal(cache, before)


@pytest.mark.usefixtures("device")
def test_pages_left_of_a_window_may_have_any_id() -> None:
    qo_lens, kv_lens, window = [1, 3, 9], [50, 90, 9], 7
    case = make_case(qo_lens, kv_lens)
    lens = zip(qo_lens, kv_lens, strict=True)
    table = case.paged(4, unreadable=[max(0, kv - qo - window) for qo, kv in lens])
    options = {"causal": True, "window_left": window}
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, **options, **LLAMA, **ROPE)
    assert_rotated(wrapper.run_return_lse(case.rows, table.cache), case, **options, **ROPE)


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.usefixtures("device")
def test_fp8_caches_are_rotated_in_the_dtype_of_q(kv_dtype: torch.dtype) -> None:
    case = make_case([1, 6, 1], [40, 30, 3], dtype=torch.bfloat16, kv_dtype=kv_dtype)
    table = case.paged(4)
    wrapper = prefill_wrapper()
    plan_prefill(wrapper, case, table, 4, causal=True, **LLAMA, **ROPE)
    got = wrapper.run_return_lse(case.rows, table.cache, k_scale=0.5)
    assert_rotated(got, case, scale=0.5, causal=True, **ROPE)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.usefixtures("device")
def test_ragged_prefill(kv_layout: str, kv_dtype: torch.dtype | None) -> None:
    """Keys before and after those of the requests are NaN; value heads have another size."""
    dtype = default_dtype() if kv_dtype is None else torch.bfloat16
    case = make_case(QO_LENS, KV_LENS, head_dim_vo=32, dtype=dtype, kv_dtype=kv_dtype)
    poison = torch.full((3, 2, 64), float("nan"))
    k = torch.cat((poison, torch.cat([x.float() for x in case.k]), poison)).to(case.k[0].dtype)
    v = torch.cat((poison[..., :32], torch.cat([x.float() for x in case.v]), poison[..., :32])).to(
        k.dtype
    )
    before = k.clone()
    if kv_layout == "HND":
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(), kv_layout)
    wrapper.plan(
        case.qo_indptr,
        case.kv_indptr + 3,
        *case.heads,
        head_dim_vo=32,
        causal=True,
        q_data_type=dtype,
        kv_data_type=k.dtype,
        **LLAMA,
        **ROPE,
    )
    assert_rotated(wrapper.run_return_lse(case.rows, k, v), case, causal=True, **ROPE)
    kept = k if kv_layout == "NHD" else k.transpose(0, 1)
    assert torch.equal(kept.float().nan_to_num(), before.float().nan_to_num())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.usefixtures("device")
def test_single_calls(kv_layout: str) -> None:
    for qo_len, kv_len in ((1, 70), (20, 70), (9, 4)):
        case = make_case([qo_len], [kv_len])
        k, v = case.ragged(kv_layout)
        options: dict[str, Any] = {"kv_layout": kv_layout, "return_lse": True, **LLAMA, **ROPE}
        got = fi.single_prefill_with_kv_cache(case.rows, k, v, causal=True, **options)
        assert_rotated(got, case, causal=True, **ROPE)
        if qo_len == 1:
            out, lse = fi.single_decode_with_kv_cache(case.q[0][0], k, v, **options)
            assert_rotated((out[None], lse[None]), case, **ROPE)


@pytest.mark.usefixtures("device")
def test_forward_turns_the_rotation_on_and_off() -> None:
    case = make_case([1] * 3, [40, 5, 18])
    table, wrapper = case.paged(4), decode_wrapper()
    plan_decode(wrapper, case, table, 4)
    for rope in (ROPE, {}, ROPE):
        mode = LLAMA if rope else {}
        assert_rotated(
            wrapper.forward_return_lse(case.rows, table.cache, **mode, **rope), case, **rope
        )


@pytest.mark.usefixtures("device")
def test_sinks_and_another_sm_scale() -> None:
    case = make_case([2, 1], [40, 18])
    table = case.paged(4)
    q_dtype, sinks = case.rows.dtype, torch.tensor([-1.0, 0.5, 2.0, 3.0])
    wrapper = fi.BatchAttentionWithAttentionSinkWrapper(
        workspace(),
        pos_encoding_mode="ROPE_LLAMA",
        q_data_type=q_dtype,
        kv_data_type=q_dtype,
        head_dim_qk=64,
        head_dim_vo=64,
    )
    plan_prefill(wrapper, case, table, 4, **LLAMA, **ROPE)
    got = wrapper.run(case.rows, table.cache, sinks, 0.25, return_lse=True)
    assert_rotated(got, case, scale=2.0, sinks=sinks, **ROPE)


@pytest.mark.usefixtures("device")
def test_graph_mode_follows_its_buffers() -> None:
    wrapper, _ = graph_decode_wrapper(3, 40)
    for kv_lens in ([40, 5, 18], [1, 0, 100]):
        case = make_case([1] * 3, kv_lens)
        table = case.paged(4)
        plan_decode(wrapper, case, table, 4, **LLAMA, **ROPE)
        for given in (table.indptr, table.indices, table.last_page_len):
            given.fill_(-7)  # run() must read the buffers, not what plan() was given
        assert_rotated(wrapper.run_return_lse(case.rows, table.cache), case, **ROPE)
    with pytest.raises(ValueError, match=r"pos_encoding_mode is fixed at ROPE_LLAMA .*; got NONE"):
        plan_decode(wrapper, case, case.paged(4), 4)


@pytest.mark.usefixtures("device")
def test_a_compiled_step_is_one_graph() -> None:
    case = make_case([1, 1], [40, 20])
    table, wrapper = case.paged(16), decode_wrapper()
    plan_decode(wrapper, case, table, 16, **LLAMA, **ROPE)

    def step(q: torch.Tensor, cache: Any) -> Any:
        return wrapper.run_return_lse(q * 2, cache)

    expected = step(case.rows, table.cache)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(case.rows, table.cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("device")
def test_malformed_caches_are_refused() -> None:
    case = make_case([1, 1], [40, 20])
    table, wrapper = case.paged(4), decode_wrapper()
    plan_decode(wrapper, case, table, 4, **LLAMA)
    k, v = table.cache
    with pytest.raises(ValueError, match=r"k must have shape \[\*, 4, 2, 64\]; got"):
        wrapper.run(case.rows, (k.reshape(-1, 2, 2, 64), v))
    with pytest.raises(ValueError, match=r"v must have shape \[\*, 4, 2, 64\]; got"):
        wrapper.run(case.rows, (k, v[..., :32]))
    with pytest.raises(ValueError, match="k and v must have as many pages"):
        wrapper.run(case.rows, (k, v[:-1]))
    with pytest.raises(ValueError, match=r"q must have shape \[\*, 4, 64\]; got"):
        wrapper.run(case.rows[:, :2], table.cache)
    with pytest.raises(UnsupportedError, match=r"kv_dtype must be one of .*; got torch.uint8"):
        plan_decode(wrapper, case, table, 4, **LLAMA, kv_data_type=torch.uint8)
    with pytest.raises(ValueError, match=r"rope_scale must be finite and above 0; got -1\.0"):
        plan_decode(wrapper, case, table, 4, **LLAMA, rope_scale=-1.0)


def test_checked_mode_looks_at_the_pages_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the copies, which are always in range."""
    leave_rotation_out(monkeypatch)
    monkeypatch.setenv("FI_BACKEND_CHECKED", "1")
    case = make_case([1, 1], [40, 20])
    table, wrapper = case.paged(4), decode_wrapper()
    table.indices[2] = 1 << 27
    plan_decode(wrapper, case, table, 4, **LLAMA)
    with pytest.raises(ValueError, match=r"page_indices of request 0 must hold .*; got 134217728"):
        wrapper.run(case.rows, table.cache)


# (qo_lens, kv_lens): the step captured has the most rows.
STEPS = (([6, 70, 1], [33, 70, 200]), ([1, 1, 1], [60, 0, 9]), ([3, 60, 14], [300, 900, 15]))


@pytest.mark.gpu
def test_a_captured_run_follows_every_plan() -> None:
    page_size, num_pages, rows = 16, 100, 77
    with torch.device("cuda"):
        wrapper = prefill_wrapper(use_cuda_graph=True, **prefill_buffers(3, num_pages))
        pool = torch.empty(2, num_pages, page_size, 2, 64).bfloat16().unbind(0)
        q = torch.empty(rows, 4, 64, dtype=torch.bfloat16)
        out, lse = torch.empty_like(q), torch.empty(rows, 4)

        def load(qo_lens: list[int], kv_lens: list[int]) -> Case:
            case = make_case(qo_lens, kv_lens)
            table = case.paged(page_size)
            for into, cache in zip(pool, table.cache, strict=True):
                into.fill_(float("nan"))
                into[: cache.shape[0]] = cache
            q.fill_(float("nan"))
            q[: sum(qo_lens)] = case.rows
            plan_prefill(wrapper, case, table, page_size, causal=True, **LLAMA, **ROPE)
            return case

        load(*STEPS[0])
        with nothing_waits():
            wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            wrapper.run(q, pool, out=out, lse=lse, return_lse=True)
        for qo_lens, kv_lens in STEPS:
            case, count = load(qo_lens, kv_lens), sum(qo_lens)
            out.fill_(7.0)
            lse.fill_(7.0)
            graph.replay()
            assert_rotated((out[:count], lse[:count]), case, causal=True, **ROPE)
            assert (out[count:] == 7.0).all()
            assert (lse[count:] == 7.0).all()
