"""Attention over a table of cache pages: plan and run in one call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from fi_backend._arguments import (
    PagedCache,
    check_layout,
    check_workspace,
    combine_scales,
    layer_spec,
    split_paged_cache,
    to_dtype,
)
from fi_backend.attention import PagedAttention
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_tensor
from fi_backend.planning import plan
from fi_backend.torch_ops import register, runs_directly
from fi_backend.workspace import Workspace

__all__ = ["BlockTableStep"]

Scale = float | torch.Tensor


@dataclass(frozen=True)
class BlockTableStep:
    """What the three calls have in common, as their callers gave it."""

    operation: str
    query: torch.Tensor
    kv_cache: PagedCache
    workspace_buffer: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    bmm1_scale: Scale
    bmm2_scale: Scale
    window_left: int
    out: torch.Tensor | None
    sinks: torch.Tensor | None
    kv_layout: str
    out_dtype: torch.dtype | str | None = None
    lse: torch.Tensor | None = None
    return_lse: bool = False

    @property
    def batch_size(self) -> int:
        return self.seq_lens.shape[0]

    def check(self) -> None:
        check_tensor("query", self.query, shape=(None, None, None))
        check_layout("kv_layout", self.kv_layout)
        integers = (torch.int32, torch.uint32)
        device = self.query.device
        check_tensor("seq_lens", self.seq_lens, shape=(None,), dtype=integers, device=device)
        check_tensor(
            "block_tables",
            self.block_tables,
            shape=(None, None),
            dtype=torch.int32,
            device=device,
            last_dim_contiguous=True,
        )
        if self.block_tables.shape[0] < self.batch_size:
            raise ValueError(
                f"block_tables must have a row for each of the {self.batch_size} requests of "
                f"seq_lens; got {self.block_tables.shape[0]}"
            )

    def uniform_rows(self, q_len: int) -> torch.Tensor:
        """Return qo_indptr where every request has q_len rows."""
        if q_len < 1:
            raise ValueError(f"q_len_per_req must be at least 1; got {q_len}")
        if self.query.shape[0] != self.batch_size * q_len:
            raise ValueError(
                f"query must have {q_len} rows (q_len_per_req) for each of the {self.batch_size} "
                f"requests of seq_lens; got {self.query.shape[0]}"
            )
        rows = torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.query.device)
        return rows * q_len

    def given_rows(self, name: str, indptr: torch.Tensor) -> torch.Tensor:
        """Return the qo_indptr that a caller gave as `name`."""
        shape, device = (self.batch_size + 1,), self.query.device
        check_tensor(name, indptr, shape=shape, dtype=torch.int32, device=device)
        return indptr

    def attend(
        self,
        qo_indptr: torch.Tensor,
        *,
        max_qo_len: int,
        max_kv_len: int,
        causal: bool = True,
        max_layer_rows: int | None = None,
        may_be_padded: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Plan and run.

        Args:
            qo_indptr: int32 [batch_size + 1], first row of each request.
            max_qo_len: most rows of a request.
            max_kv_len: most keys of a request.
            causal: whether rows see no keys after their own.
            max_layer_rows: the most that max_qo_len is in calls of this kind, None for any.
            may_be_padded: whether rows may follow the last request's, which nobody writes.
        """
        query = self.query
        keys, values = split_paged_cache("kv_cache", self.kv_cache, self.kv_layout)
        num_kv_heads = keys.shape[2]
        k_scale, v_scale = (
            combine_scales(((name, scale),), num_kv_heads)
            for name, scale in (("bmm1_scale", self.bmm1_scale), ("bmm2_scale", self.bmm2_scale))
        )
        out, lse = self.out, self.lse
        dtype = to_dtype("out_dtype", self.out_dtype, query.dtype if out is None else out.dtype)
        allocate = query.new_zeros if may_be_padded else query.new_empty
        if out is None:
            out = allocate((*query.shape[:2], values.shape[3]), dtype=dtype)
        elif dtype != out.dtype:
            raise TypeError(f"out must have dtype {dtype}, as out_dtype; got {out.dtype}")
        if lse is None and self.return_lse:
            lse = allocate(query.shape[:2], dtype=torch.float32)
        directly = runs_directly(self.operation, query=query, keys=keys, values=values)
        run = _attend if directly else _attend_op.traced
        run(
            query,
            keys,
            values,
            out,
            lse,
            self.workspace_buffer,
            qo_indptr,
            self.seq_lens.view(torch.int32),
            self.block_tables,
            self.sinks,
            k_scale if isinstance(k_scale, torch.Tensor) else None,
            v_scale if isinstance(v_scale, torch.Tensor) else None,
            k_scale=1.0 if isinstance(k_scale, torch.Tensor) else k_scale,
            v_scale=1.0 if isinstance(v_scale, torch.Tensor) else v_scale,
            causal=causal,
            window_left=self.window_left,
            max_qo_len=max_qo_len,
            max_kv_len=max_kv_len,
            max_layer_rows=max_layer_rows,
        )
        return (out, lse) if self.return_lse and lse is not None else out


@functools.lru_cache(maxsize=64)
def _layer(*, device: torch.device, max_qo_len: int | None, **options: Any) -> PagedAttention:
    """Return the layer that calls of one kind run, with its kernels loaded."""
    spec = layer_spec(
        **options,
        pos_encoding_mode="NONE",
        logits_soft_cap=None,
        # A factor on logits that may lie on a device comes as one on keys.
        sm_scale=1.0,
        rope_scale=None,
        rope_theta=None,
    )
    return PagedAttention(spec, device, max_qo_len=max_qo_len)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    block_tables: torch.Tensor,
    sinks: torch.Tensor | None,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    *,
    k_scale: float,
    v_scale: float,
    causal: bool,
    window_left: int,
    max_qo_len: int,
    max_kv_len: int,
    max_layer_rows: int | None,
) -> None:
    """Plan and run; keys and values are [num_pages, page_size, num_kv_heads, head_dim]."""
    check_workspace("attention over block tables", "workspace_buffer", workspace)
    if kv_lens.is_cpu and kv_lens.numel() and int(kv_lens.max()) > max_kv_len:
        raise ValueError(
            f"seq_lens must be at most {max_kv_len}, the longest length that the call names; "
            f"got {int(kv_lens.max())}"
        )
    layer = _layer(
        num_qo_heads=query.shape[1],
        num_kv_heads=keys.shape[2],
        head_dim_qk=query.shape[2],
        head_dim_vo=values.shape[3],
        page_size=keys.shape[1],
        q_dtype=query.dtype,
        kv_dtype=keys.dtype,
        o_dtype=out.dtype,
        causal=causal,
        window_left=window_left,
        sinks=sinks is not None,
        device=query.device,
        max_qo_len=max_layer_rows,
    )
    batch = PagedBatch(qo_indptr, kv_lens, block_table=block_tables, max_qo_len=max_qo_len)
    step = plan(layer.spec, batch, Workspace(buffer=workspace), share_prefixes=False)
    layer.run(
        step,
        query,
        (keys, values),
        out=out,
        lse=lse,
        sinks=sinks,
        k_scale=k_scale if k_scales is None else k_scales,
        v_scale=v_scale if v_scales is None else v_scales,
    )


# Planning reads values and loads kernels, so that torch.compile has to see all of it as one op.
_attend_op = register(
    "attend_block_tables(Tensor query, Tensor keys, Tensor values, Tensor(a!) out, "
    "Tensor(b!)? lse, Tensor(c!) workspace, Tensor qo_indptr, Tensor kv_lens, "
    "Tensor block_tables, Tensor? sinks, Tensor? k_scales, Tensor? v_scales, *, float k_scale, "
    "float v_scale, bool causal, int window_left, int max_qo_len, int max_kv_len, "
    "int? max_layer_rows) -> ()",
    _attend,
)
