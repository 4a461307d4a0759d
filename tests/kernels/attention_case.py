"""Plan and run the attention kernels on poisoned caches, and judge them by the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fi_backend.kernels import attention, decode, host_plan, prefill
from tests.kernels.plan_step import HAS_WORK
from tests.paged_kv import PagedKv, paged_kv
from tests.reference import Mask, torch_attention
from tests.reference import attention as reference_attention
from tests.tolerance import assert_accurate, assert_lse_accurate

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What every attention kernel must be able to mask and transform.
MASKS = [
    Mask(),
    Mask(causal=True, window_left=0),
    Mask(causal=True, window_left=70),
    Mask(window_left=33),
    Mask(causal=True, logits_soft_cap=5.0),
    Mask(causal=True, alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    Mask(causal=True, sinks=torch.tensor([0.5, -1.0, 4.0, -20.0])),
    Mask(
        causal=True,
        window_left=50,
        logits_soft_cap=8.0,
        sinks=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]),
    ),
]


@dataclass(frozen=True)
class Case:
    """A step: lengths, head counts, types, masks, and how the cache is laid out."""

    requests: tuple[tuple[int, int], ...]  # (qo_len, kv_len)
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim_qk: int = 64
    head_dim_vo: int = 64
    q_dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    o_dtype: torch.dtype | None = None
    mask: Mask = field(default_factory=lambda: Mask(causal=True))
    page_size: int = 16
    layout: str = "NHD"
    table: str = "block_table"  # "csr", "rows32", "rows64", "ragged"
    sm_scale: float | None = None
    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    num_workers: int = 2
    split: int = 0
    many_rows_only: bool = False
    custom_mask: bool = False
    padding_rows: int = 3

    @property
    def types(self) -> dict[str, object]:
        return {
            "q_dtype": self.q_dtype,
            "kv_dtype": self.kv_dtype or self.q_dtype,
            "o_dtype": self.o_dtype or self.q_dtype,
            "head_dim_qk": self.head_dim_qk,
            "head_dim_vo": self.head_dim_vo,
        }

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim_qk) if self.sm_scale is None else self.sm_scale


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    masks: list[torch.Tensor] | None

    def subset(self, case: Case, chosen: list[int]) -> Inputs:
        """Return the inputs of some of the requests."""
        rows = self.q.split([qo_len for qo_len, _ in case.requests] + [case.padding_rows])
        return Inputs(
            torch.cat([rows[r] for r in chosen] + [rows[-1]]),
            [self.keys[r] for r in chosen],
            [self.values[r] for r in chosen],
            None if self.masks is None else [self.masks[r] for r in chosen],
        )


def make_inputs(case: Case) -> Inputs:
    """Draw q, K and V; padding rows of q are NaN."""
    kv_dtype = case.kv_dtype or case.q_dtype
    num_rows = sum(qo_len for qo_len, _ in case.requests)
    q = torch.randn(num_rows, case.num_qo_heads, case.head_dim_qk).to(case.q_dtype)
    padding = torch.full((case.padding_rows, *q.shape[1:]), math.nan, dtype=case.q_dtype)
    heads = case.num_kv_heads
    return Inputs(
        torch.cat([q, padding]),
        [torch.randn(n, heads, case.head_dim_qk).to(kv_dtype) for _, n in case.requests],
        [torch.randn(n, heads, case.head_dim_vo).to(kv_dtype) for _, n in case.requests],
        [torch.rand(qo, kv) < 0.5 for qo, kv in case.requests] if case.custom_mask else None,
    )


def _unreadable(case: Case) -> list[int]:
    window = case.mask.window_left
    if window < 0:
        return [0] * len(case.requests)
    return [max(0, kv - qo - window) for qo, kv in case.requests]


def _page_table(case: Case, kv: PagedKv) -> dict[str, torch.Tensor]:
    if case.table == "csr":
        return {"page_indptr": kv.page_indptr, "page_indices": kv.page_indices}
    if case.table in ("rows32", "rows64"):
        rows = torch.randperm(kv.block_table.shape[0])[: len(case.requests)]
        table = torch.full_like(kv.block_table, 2**31 - 1)
        table[rows] = kv.block_table[: len(case.requests)]
        dtype = torch.int32 if case.table == "rows32" else torch.int64
        return {"block_table": table, "request_rows": rows.to(dtype)}
    return {"block_table": kv.block_table}


def _ragged(inputs: Inputs, kv_lens: torch.Tensor) -> tuple[PagedKv, dict[str, torch.Tensor]]:
    indptr = torch.zeros(len(kv_lens) + 1, dtype=torch.int32)
    indptr[1:] = kv_lens.cumsum(0)
    kv = PagedKv(
        torch.cat(inputs.keys)[:, None],
        torch.cat(inputs.values)[:, None],
        kv_lens,
        indptr,
        indptr,
        indptr,
    )
    return kv, {"page_indptr": indptr}


def pack_masks(masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack bool masks into little-endian bits, each from its own byte; return (bytes, indptr)."""
    packed = []
    for mask in masks:
        bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        packed.append((bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
    sizes = torch.tensor([0] + [p.numel() for p in packed])
    return torch.cat(packed), sizes.cumsum(0).to(torch.int32)


def make_arguments(case: Case, inputs: Inputs, target: str = "cpu") -> dict[str, Any]:
    """Plan the step for `target` and return what its kernels' `run` takes, all on the CPU.

    `partials` is missing; padding rows of out and lse hold 7.
    """
    qo_lens = [qo_len for qo_len, _ in case.requests]
    qo_indptr = torch.tensor([0, *qo_lens]).cumsum(0).to(torch.int32)
    kv_lens = torch.tensor([kv_len for _, kv_len in case.requests], dtype=torch.int32)
    if case.table == "ragged":
        kv, table = _ragged(inputs, kv_lens)
    else:
        kv = paged_kv(
            inputs.keys,
            inputs.values,
            case.page_size,
            layout=case.layout,
            unreadable=_unreadable(case),
        )
        table = _page_table(case, kv)
    ints = host_plan.plan_buffer_ints(max_reqs=len(qo_lens), num_workers=case.num_workers)
    plan_buffer = torch.full((ints,), -1, dtype=torch.int32)
    host_plan.host_plan(
        plan_buffer=plan_buffer,
        qo_indptr=qo_indptr,
        kv_lens=kv_lens,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim_qk=case.head_dim_qk,
        head_dim_vo=case.head_dim_vo,
        q_dtype=case.q_dtype,
        kv_dtype=case.kv_dtype or case.q_dtype,
        causal=case.mask.causal,
        window_left=case.mask.window_left,
        num_workers=case.num_workers,
        split=case.split,
        many_rows_only=case.many_rows_only,
        target=target,
    )
    num_rows = inputs.q.shape[0]
    out = torch.full(
        (num_rows, case.num_qo_heads, case.head_dim_vo), 7.0, dtype=case.o_dtype or case.q_dtype
    )
    packed = (None, None) if inputs.masks is None else pack_masks(inputs.masks)
    return dict(
        plan_buffer=plan_buffer,
        q=inputs.q,
        k_cache=kv.k_cache,
        v_cache=kv.v_cache,
        out=out,
        lse=torch.full((num_rows, case.num_qo_heads), 7.0),
        qo_indptr=qo_indptr,
        kv_lens=kv_lens,
        **table,
        alibi_slopes=case.mask.alibi_slopes,
        sinks=case.mask.sinks,
        custom_mask=packed[0],
        mask_indptr=packed[1],
        k_scale=case.k_scale,
        v_scale=case.v_scale,
        sm_scale=case.scale,
        logits_soft_cap=case.mask.logits_soft_cap,
        window_left=case.mask.window_left,
        causal=case.mask.causal,
        rope_scale=case.mask.rope_scale,
        rope_theta=case.mask.rope_theta,
        num_workers=case.num_workers,
    )


def run(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and run; return out and lse with padding rows, which hold 7 where not written."""
    arguments = make_arguments(case, inputs)
    floats = attention.partial_floats(
        num_workers=case.num_workers, head_dim_qk=case.head_dim_qk, head_dim_vo=case.head_dim_vo
    )
    arguments["partials"] = torch.full((floats,), math.nan)
    # Load only the kernels that the plan has work for: a test compiles no more than it runs.
    lines = arguments["plan_buffer"][HAS_WORK : HAS_WORK + 2].tolist()
    for has_work, kernel in zip(lines, (decode, prefill), strict=True):
        if has_work:
            kernel.load(**case.types).run(**arguments)
    return arguments["out"], arguments["lse"]


def judge(case: Case, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Check out and lse of every request against the reference, and padding rows for silence."""
    row = 0
    expected, yardstick, expected_lse = [], [], []
    for r, (qo_len, _) in enumerate(case.requests):
        mask = case.mask
        if inputs.masks is not None:
            mask = replace(mask, custom_mask=inputs.masks[r])
        q = inputs.q[row : row + qo_len]
        k, v = inputs.keys[r], inputs.values[r]
        ref, ref_lse = reference_attention(
            q, k, v, mask, sm_scale=case.scale, k_scale=case.k_scale, v_scale=case.v_scale
        )
        expected.append(ref)
        expected_lse.append(ref_lse)
        k, v = _scaled(k, case.k_scale, q.dtype), _scaled(v, case.v_scale, q.dtype)
        yardstick.append(torch_attention(q, k, v, mask, sm_scale=case.scale))
        row += qo_len
    assert_accurate(out[:row], torch.cat(expected), torch.cat(yardstick), str(case))
    rounds_rotated = case.mask.rope_theta != 0
    assert_lse_accurate(
        lse[:row], torch.cat(expected_lse), case.q_dtype if rounds_rotated else torch.float32
    )
    assert (out[row:] == 7).all(), "padding rows of out were written"
    assert (lse[row:] == 7).all(), "padding rows of lse were written"


def _scaled(x: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    factor = scale[:, None] if isinstance(scale, torch.Tensor) else scale
    return (x.float() * factor).to(dtype)


def check(case: Case) -> None:
    """Draw inputs, run, judge."""
    inputs = make_inputs(case)
    judge(case, inputs, *run(case, inputs))


def check_nan_stays_visible(
    case: Case,
    broken_from: int,
    run: Callable[[Case, Inputs], tuple[torch.Tensor, torch.Tensor]] = run,
) -> None:
    """Draw inputs of break_some(), run, judge."""
    inputs = make_inputs(case)
    break_some(inputs, broken_from)
    judge_broken(case, *run(case, inputs), broken_from)


def break_some(inputs: Inputs, broken_from: int) -> None:
    """Make the first row of q NaN, and keys of the last request from `broken_from` on."""
    inputs.q[0] = math.nan
    inputs.keys[-1][broken_from:] = math.nan


def judge_broken(case: Case, out: torch.Tensor, lse: torch.Tensor, broken_from: int) -> None:
    """Check that rows which see a NaN of break_some() are NaN, and no others.

    A part of an item that is all NaN must not look like one that saw no key.
    """
    qo_lens, kv_lens = zip(*case.requests, strict=True)
    num_rows = sum(qo_lens)
    broken = torch.zeros(num_rows, dtype=torch.bool)
    broken[0] = True
    positions = torch.arange(qo_lens[-1]) + kv_lens[-1] - qo_lens[-1]  # masks are causal
    broken[-qo_lens[-1] :] = positions >= broken_from
    for result in (out[:num_rows].flatten(1), lse[:num_rows]):
        assert torch.equal(result.isnan().all(1), broken)
        assert torch.equal(result.isnan().any(1), broken)
