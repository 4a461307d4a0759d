"""PagedAttention: values through the whole core, plans that are shared, and refusals."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
from paged_kv import PagedKv, paged_kv
from reference import Mask, attention, torch_attention
from tolerance import assert_accurate

import fi_backend
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Plan, Workspace
from fi_backend import attention as attention_module

SPEC = AttentionSpec(
    num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.float32, page_size=16
)
QO_LENS = (1, 0, 70, 3, 5)
KV_LENS = (130, 7, 90, 3, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of decode, prefill and empty requests with poisoned unread memory."""

    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cache: PagedKv
    batch: PagedBatch

    @property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.k_cache, self.cache.v_cache


def make_case(spec: AttentionSpec = SPEC) -> Case:
    keys, values = (
        [torch.randn(n, spec.num_kv_heads, dim, dtype=spec.q_dtype) for n in KV_LENS]
        for dim in (spec.head_dim_qk, spec.head_dim_vo)
    )
    cache = paged_kv(keys, values, spec.page_size)
    qo_indptr = torch.tensor((0, *QO_LENS)).cumsum(0).to(torch.int32)
    q = torch.randn(int(qo_indptr[-1]), spec.num_qo_heads, spec.head_dim_qk, dtype=spec.q_dtype)
    batch = PagedBatch(qo_indptr, cache.kv_lens, block_table=cache.block_table)
    return Case(q, keys, values, cache, batch)


def check_values(case: Case, spec: AttentionSpec, out: torch.Tensor) -> None:
    mask = Mask(causal=spec.causal, window_left=spec.window_left)
    for r in range(len(QO_LENS)):
        rows = slice(int(case.batch.qo_indptr[r]), int(case.batch.qo_indptr[r + 1]))
        tensors = (case.q[rows], case.keys[r], case.values[r], mask)
        wanted, _ = attention(*tensors, sm_scale=spec.sm_scale)
        assert_accurate(
            out[rows], wanted, torch_attention(*tensors, sm_scale=spec.sm_scale), f"request {r}"
        )


@pytest.mark.parametrize("split_tokens", [0, -1, 64])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_mixed_batch_matches_the_reference(split_tokens: int, num_workers: int) -> None:
    case = make_case()
    plan = fi_backend.plan(
        SPEC, case.batch, Workspace(), num_workers=num_workers, split_tokens=split_tokens
    )
    out = PagedAttention(SPEC).run(plan, case.q, case.kv)
    assert isinstance(out, torch.Tensor)
    check_values(case, SPEC, out)


def test_layers_of_one_geometry_share_a_plan_and_a_workspace() -> None:
    case, workspace = make_case(), Workspace()
    plan = fi_backend.plan(SPEC, case.batch, workspace)
    capped = dataclasses.replace(SPEC, logits_soft_cap=5.0)
    plain = PagedAttention(SPEC).run(plan, case.q, case.kv)
    other = PagedAttention(capped).run(plan, case.q, case.kv)
    assert not torch.equal(plain, other)
    check_values(case, SPEC, plain)


def test_a_refilled_plan_keeps_its_buffer() -> None:
    case, workspace = make_case(), Workspace()
    first = fi_backend.plan(SPEC, case.batch, workspace)
    smaller = PagedBatch(
        case.batch.qo_indptr[:2], case.batch.kv_lens[:1], block_table=case.cache.block_table
    )
    second = fi_backend.plan(SPEC, smaller, workspace, into=first)
    assert second.buffer.data_ptr() == first.buffer.data_ptr()
    assert second.num_tokens == 1
    PagedAttention(SPEC).run(second, case.q[:1], case.kv)
    third = fi_backend.plan(SPEC, case.batch, workspace, into=second)
    assert third.buffer.data_ptr() == first.buffer.data_ptr()
    check_values(case, SPEC, PagedAttention(SPEC).run(third, case.q, case.kv))


def test_a_layer_for_few_rows_refuses_plans_of_more() -> None:
    case, layer = make_case(), PagedAttention(SPEC, max_qo_len=70)
    for promised in (None, 71):
        batch = dataclasses.replace(case.batch, max_qo_len=promised)
        plan = fi_backend.plan(SPEC, batch, Workspace())
        with pytest.raises(ValueError, match=rf"max_qo_len is at most 70, .*; got {promised}"):
            layer.run(plan, case.q, case.kv)
    kept = dataclasses.replace(case.batch, max_qo_len=70)
    plan = fi_backend.plan(SPEC, kept, Workspace())
    check_values(case, SPEC, layer.run(plan, case.q, case.kv))


def test_a_plan_refilled_for_more_requests_gets_a_larger_buffer() -> None:
    case, workspace = make_case(), Workspace()
    one = PagedBatch(
        case.batch.qo_indptr[:2], case.batch.kv_lens[:1], block_table=case.cache.block_table
    )
    first = fi_backend.plan(SPEC, one, workspace)
    second = fi_backend.plan(SPEC, case.batch, workspace, into=first)
    assert second.buffer.numel() > first.buffer.numel()
    check_values(case, SPEC, PagedAttention(SPEC).run(second, case.q, case.kv))


def test_a_refilled_plan_keeps_its_memory_when_the_workspace_grows() -> None:
    """A CUDA graph that holds the first plan reads and writes where that was."""
    case, workspace = make_case(), Workspace()
    first = fi_backend.plan(SPEC, case.batch, workspace, num_workers=1)
    larger = fi_backend.plan(SPEC, case.batch, workspace, num_workers=50)
    assert larger.partials.data_ptr() != first.partials.data_ptr()
    again = fi_backend.plan(SPEC, case.batch, workspace, into=first, num_workers=1)
    assert again.partials.data_ptr() == first.partials.data_ptr()
    assert again.buffer.data_ptr() == first.buffer.data_ptr()
    check_values(case, SPEC, PagedAttention(SPEC).run(again, case.q, case.kv))
    elsewhere = fi_backend.plan(SPEC, case.batch, Workspace(), into=first, num_workers=1)
    assert elsewhere.partials.data_ptr() != first.partials.data_ptr()


def test_padding_rows_are_zeroed_or_left_alone() -> None:
    case = make_case()
    plan = fi_backend.plan(SPEC, case.batch, Workspace())
    padded = torch.cat([case.q, torch.full((4, 8, 64), float("nan"))])
    layer = PagedAttention(SPEC)
    out, lse = layer.run(plan, padded, case.kv, return_lse=True)
    assert torch.equal(out[-4:], torch.zeros(4, 8, 64))
    assert torch.equal(lse[-4:], torch.full((4, 8), float("-inf")))
    check_values(case, SPEC, out[:-4])
    mine = torch.full_like(out, 7.0)
    assert layer.run(plan, padded, case.kv, out=mine) is mine
    assert torch.equal(mine[-4:], torch.full((4, 8, 64), 7.0))


def test_workspace_needs_do_not_grow_with_lengths() -> None:
    few = fi_backend.workspace_bytes(SPEC, 4, 16, num_workers=8)
    assert fi_backend.workspace_bytes(SPEC, 4, 1 << 20, num_workers=8) == few
    case, workspace = make_case(), Workspace()
    fi_backend.plan(SPEC, case.batch, workspace, num_workers=8)
    assert workspace.num_bytes <= few


def test_one_layer_run_counts_once() -> None:
    case = make_case()
    plan = fi_backend.plan(SPEC, case.batch, Workspace())
    layer = PagedAttention(SPEC)
    before = fi_backend.runtime_counters()["attention_runs"]
    for _ in range(3):
        layer.run(plan, case.q, case.kv)
    assert fi_backend.runtime_counters()["attention_runs"] == before + 3


def test_the_constructor_refuses_what_is_not_supported() -> None:
    with pytest.raises(fi_backend.errors.UnsupportedError, match=r"head_dim_qk.*60"):
        PagedAttention(dataclasses.replace(SPEC, head_dim_qk=60))
    with pytest.raises(fi_backend.errors.UnsupportedError, match="cuda"):
        PagedAttention(SPEC, device="cuda")


@pytest.fixture(scope="module")
def ready() -> tuple[Case, Plan]:
    case = make_case()
    return case, fi_backend.plan(SPEC, case.batch, Workspace())


BAD_RUNS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.randn(79, 8, 32)}, ValueError, r"q must have shape \[\*, 8, 64\]"),
    ({"q": torch.randn(79, 4, 64)}, ValueError, "q must have shape"),
    ({"q": torch.randn(78, 8, 64)}, ValueError, "q must have at least 79 rows.*got 78"),
    ({"q": torch.randn(79, 8, 64).double()}, TypeError, "q must have dtype torch.float32"),
    ({"q": torch.randn(79, 8, 128)[..., ::2]}, ValueError, "q must have stride 1"),
    ({"q": torch.empty(79, 8, 64, device="meta")}, ValueError, "q must be on device cpu"),
    ({"k": torch.randn(20, 8, 2, 64)}, ValueError, r"k must have shape \[\*, 16, 2, 64\]"),
    ({"v": torch.randn(2, 16, 2, 64)}, ValueError, "k and v must have as many pages"),
    ({"out": torch.randn(79, 8, 32)}, ValueError, r"out must have shape \[79, 8, 64\]"),
    ({"lse": torch.randn(79, 8).double()}, TypeError, "lse must have dtype torch.float32"),
    ({"sinks": torch.randn(8)}, ValueError, "sinks must be None"),
    ({"alibi_slopes": torch.randn(8)}, ValueError, "alibi_slopes must be None"),
    ({"k_scale": torch.ones(3)}, ValueError, "k_scale"),
    ({"v_scale": None}, TypeError, "v_scale must be a float or a torch.Tensor; got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_RUNS)
def test_bad_runs_are_refused_before_anything_is_written(
    ready: tuple[Case, Plan], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    case, plan = ready
    k, v = case.kv
    out = torch.full((79, 8, 64), 7.0)
    arguments = {"q": case.q, "k": k, "v": v, "out": out} | change
    q, kv = arguments.pop("q"), (arguments.pop("k"), arguments.pop("v"))
    with pytest.raises(error, match=message):
        PagedAttention(SPEC).run(plan, q, kv, **arguments)
    assert torch.equal(out, torch.full((79, 8, 64), 7.0))
    if "out" not in change:
        with pytest.raises(error, match=message):
            PagedAttention(SPEC).run(plan, q, kv, **(arguments | {"out": None}))


def test_a_plan_for_another_geometry_is_refused(ready: tuple[Case, Plan]) -> None:
    case, plan = ready
    windowed = PagedAttention(dataclasses.replace(SPEC, window_left=3))
    with pytest.raises(ValueError, match=r"window_left=-1.*window_left=3"):
        windowed.run(plan, case.q, case.kv)


def test_ragged_keys_must_cover_the_batch() -> None:
    spec = dataclasses.replace(SPEC, page_size=1)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    plan = fi_backend.plan(spec, PagedBatch.ragged(offsets, offsets), Workspace())
    q, kv = torch.randn(4, 8, 64), torch.randn(3, 1, 2, 64)
    with pytest.raises(ValueError, match=r"k and v must have at least 4 rows.*got 3"):
        PagedAttention(spec).run(plan, q, (kv, kv))


@pytest.mark.parametrize("page_id", [-1, 1 << 27])
@pytest.mark.parametrize("checked", ["0", "1"])
def test_page_ids_out_of_range_are_found(
    monkeypatch: pytest.MonkeyPatch, checked: str, page_id: int
) -> None:
    monkeypatch.setenv("FI_BACKEND_CHECKED", checked)
    case = make_case()
    table = case.cache.block_table.clone()
    table[2, 1] = page_id
    batch = dataclasses.replace(case.batch, block_table=table)
    plan = fi_backend.plan(SPEC, batch, Workspace())
    with pytest.raises(ValueError, match=rf"block_table\[2\] must hold .*; got {page_id}"):
        PagedAttention(SPEC).run(plan, case.q, case.kv)
    good = fi_backend.plan(SPEC, case.batch, Workspace())
    PagedAttention(SPEC).run(good, case.q, case.kv)


def test_pages_that_no_row_sees_may_have_any_id() -> None:
    """Left of a window, where engines free pages, as well as past a request's length."""
    spec = dataclasses.replace(SPEC, window_left=5, page_size=4)
    cache, q = torch.randn(3, 4, 2, 64), torch.randn(2, 8, 64)
    rows, lens = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([18], dtype=torch.int32)

    def run(pages: list[int]) -> torch.Tensor:
        table = torch.tensor([pages], dtype=torch.int32)
        plan = fi_backend.plan(spec, PagedBatch(rows, lens, block_table=table), Workspace())
        out = PagedAttention(spec).run(plan, q, (cache, cache))
        assert isinstance(out, torch.Tensor)
        return out

    # Of tokens 0 to 17, the rows of tokens 16 and 17 see those from 11 on, in the third page.
    assert torch.equal(run([1 << 27, -1, 2, 0, 1, -1]), run([0, 0, 2, 0, 1, 0]))
    with pytest.raises(ValueError, match=r"block_table\[0\] must hold .*; got 3"):
        run([0, 0, 3, 0, 1])


def test_checked_mode_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = types.SimpleNamespace(kv_lens=types.SimpleNamespace(is_cuda=True))
    step = types.SimpleNamespace(batch=on_gpu, geometry=SPEC.geometry)
    with pytest.raises(RuntimeError, match=r"FI_BACKEND_CHECKED=1 .* CUDA graph .* unset it"):
        attention_module.check_used_pages(step, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask_indptr", "message"),
    [
        ([0, 1], r"mask_indptr must leave request 0 at least 12 bytes.*; got 1"),
        ([1, 12], "at least 12 bytes.*; got 11"),
        ([-1, 12], r"mask_indptr\[0\] must be at least 0; got -1"),
        ([12, 0], "mask_indptr must never decrease"),
        ([0, 14], r"custom_mask must have mask_indptr\[-1\] = 14 bytes; got 13"),
    ],
)
def test_masks_hold_a_bit_for_every_row_and_key(mask_indptr: list[int], message: str) -> None:
    spec = dataclasses.replace(SPEC, custom_mask=True)
    rows, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([31], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    plan = fi_backend.plan(spec, PagedBatch(rows, lens, block_table=table), Workspace())
    layer, cache, q = PagedAttention(spec), torch.randn(1, 16, 2, 64), torch.randn(3, 8, 64)
    bits = torch.full((13,), 255, dtype=torch.uint8)

    def run(offsets: list[int]) -> None:
        indptr = torch.tensor(offsets, dtype=torch.int32)
        layer.run(plan, q, (cache, cache), custom_mask=bits, mask_indptr=indptr)

    run([1, 13])
    with pytest.raises(ValueError, match=message):
        run(mask_indptr)


def test_a_cache_is_a_pair(ready: tuple[Case, Plan]) -> None:
    case, plan = ready
    with pytest.raises(TypeError, match=r"kv_cache must be a pair of tensors.*; got NoneType"):
        PagedAttention(SPEC).run(plan, case.q, None)  # type: ignore[arg-type]


def test_a_workspace_is_where_its_buffer_is() -> None:
    buffer = torch.empty(64, dtype=torch.uint8)
    assert Workspace(buffer=buffer).device == Workspace("cpu", buffer=buffer).device
    with pytest.raises(ValueError, match="buffer must be on device meta; got cpu"):
        Workspace("meta", buffer=buffer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_torch_cannot_use_is_named() -> None:
    for make in (Workspace, lambda device: fi_backend.BatchAttention(device=device)):
        with pytest.raises(fi_backend.errors.UnsupportedError, match=r"device must be .*got cuda"):
            make("cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"split_tokens": -2}, "split_tokens must be at least -1"),
    ],
)
def test_bad_plans_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fi_backend.plan(SPEC, make_case().batch, Workspace(), **arguments)
