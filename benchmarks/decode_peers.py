"""The peers of the decode benchmark, those of them that import: FlashInfer and vLLM's FA3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], object]
MakeCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Call]


def load(
    *,
    num_heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    kv_dtype: torch.dtype,
    kv_lens: torch.Tensor,
) -> dict[str, MakeCall]:
    """Plan each peer for one step.

    Returns:
        By name, a function of (k, v, block_table, q) that returns the call to time.
    """
    found = {}
    for name, make in (("flashinfer tc", _flashinfer), ("fa3 paged", _fa3)):
        try:
            found[name] = make(num_heads, head_dim, page_size, kv_dtype, kv_lens)
        except ImportError:
            continue
    return found


def _flashinfer(
    num_heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    kv_dtype: torch.dtype,
    kv_lens: torch.Tensor,
) -> MakeCall:
    import flashinfer

    lens = kv_lens.cpu()
    counts = (lens + page_size - 1) // page_size
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def make(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, q: torch.Tensor) -> Call:
        indices = torch.cat([row[:n] for row, n in zip(table, counts.tolist(), strict=True)])
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            indptr,
            indices,
            (lens - 1) % page_size + 1,
            *num_heads,
            head_dim,
            page_size,
            q_data_type=q.dtype,
            kv_data_type=kv_dtype,
        )
        return lambda: wrapper.run(q, (k, v))

    return make


def _fa3(
    num_heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    kv_dtype: torch.dtype,
    kv_lens: torch.Tensor,
) -> MakeCall:
    if kv_dtype.itemsize == 1:
        raise ImportError("FA3 takes an fp8 cache with fp8 queries only")
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    batch, longest = len(kv_lens), int(kv_lens.max())
    rows = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=longest,
        num_heads_q=num_heads[0],
        num_heads_kv=num_heads[1],
        headdim=head_dim,
        cache_seqlens=kv_lens,
        qkv_dtype=kv_dtype,
        cu_seqlens_q=rows,
        page_size=page_size,
        causal=True,
        num_splits=0,
    )

    def make(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, q: torch.Tensor) -> Call:
        options: dict[str, Any] = dict(
            seqused_k=kv_lens, block_table=table, causal=True, fa_version=3
        )
        return lambda: flash_attn_varlen_func(
            q, k, v, 1, rows, longest, scheduler_metadata=metadata, **options
        )

    return make
