"""The kernels of the paged cache as torch ops."""

from __future__ import annotations

import torch

from fi_backend.checks import check_tensor, unpack_cache
from fi_backend.kernels import append_kv as kernel
from fi_backend.torch_ops import register

__all__ = ["APPEND_POSITIONS", "APPEND_SLOTS", "BATCH_POSITIONS", "to_int32", "unbind_cache"]

_LAYOUTS = ("NHD", "HND")
_INDEX_DTYPES = (torch.int32, torch.int64)


def unbind_cache(
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views (k, v) [num_pages, page_size, num_kv_heads, head_dim] of FlashInfer's cache.

    Raises:
        ValueError: the layout has no such name, or the tensor no such shape.
    """
    if kv_layout not in _LAYOUTS:
        raise ValueError(f"kv_layout must be one of {', '.join(_LAYOUTS)}; got {kv_layout!r}")
    if isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            raise ValueError(
                "paged_kv_cache must have shape [num_pages, 2, ...] with 5 dimensions, or be a "
                f"pair of tensors; got {list(paged_kv_cache.shape)}"
            )
        k_cache, v_cache = paged_kv_cache.unbind(1)
    else:
        k_cache, v_cache = unpack_cache("paged_kv_cache", paged_kv_cache)
    if kv_layout == "HND":
        return k_cache.transpose(-3, -2), v_cache.transpose(-3, -2)
    return k_cache, v_cache


def to_int32(name: str, indices: torch.Tensor) -> torch.Tensor:
    """Return indices as int32; what does not fit becomes the largest or smallest, which no row has.

    Raises:
        TypeError: they are neither int32 nor int64.
    """
    if indices.dtype == torch.int32:
        return indices
    if indices.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64; got {indices.dtype}")
    limits = torch.iinfo(torch.int32)
    return indices.clamp(limits.min, limits.max).int()


def _append_slots(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    kernel.append_slots(
        key=key,
        value=value,
        key_cache=k_cache,
        value_cache=v_cache,
        slot_mapping=slot_mapping,
        k_scale=k_scale if k_scales is None else k_scales,
        v_scale=v_scale if v_scales is None else v_scales,
    )


def _append_positions(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> None:
    kernel.append_positions(
        key=key,
        value=value,
        key_cache=k_cache,
        value_cache=v_cache,
        batch_indices=batch_indices,
        positions=positions,
        kv_indices=kv_indices,
        kv_indptr=kv_indptr,
    )


def _batch_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    if append_indptr.is_cuda:
        _batch_positions_cuda(append_indptr, seq_lens, batch_indices, positions)
        return
    kernel.batch_positions(
        append_indptr=append_indptr,
        seq_lens=seq_lens,
        batch_indices=batch_indices,
        positions=positions,
    )


def _batch_positions_cuda(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Search every row's request, with torch's operators: nothing waits for the device."""
    device, num_rows = append_indptr.device, batch_indices.shape[0]
    check_tensor("append_indptr", append_indptr, shape=(None,), dtype=_INDEX_DTYPES)
    num_requests = append_indptr.shape[0] - 1
    if num_requests < 0:
        raise ValueError("append_indptr must have shape [num_requests + 1]; got [0]")
    check_tensor("seq_lens", seq_lens, shape=(num_requests,), dtype=_INDEX_DTYPES, device=device)
    for name, out in (("batch_indices", batch_indices), ("positions", positions)):
        check_tensor(name, out, shape=(num_rows,), dtype=torch.int32, device=device)
    if num_requests == 0:
        batch_indices.fill_(-1)
        positions.zero_()
        return
    rows = torch.arange(num_rows, dtype=append_indptr.dtype, device=device)
    # Of the requests that begin at or before a row, the last one; those without rows are passed.
    request = torch.searchsorted(append_indptr.contiguous(), rows, right=True) - 1
    has_request = (request >= 0) & (request < num_requests)
    known = request.clamp(0, num_requests - 1)
    position = seq_lens[known] - append_indptr[known + 1] + rows
    batch_indices.copy_(torch.where(has_request, request, -1))
    positions.copy_(torch.where(has_request, position, 0))


APPEND_SLOTS = register(
    "append_slots(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping, float k_scale, float v_scale, Tensor? k_scales, Tensor? v_scales) -> ()",
    _append_slots,
)
APPEND_POSITIONS = register(
    "append_positions(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr) -> ()",
    _append_positions,
)
BATCH_POSITIONS = register(
    "batch_positions(Tensor append_indptr, Tensor seq_lens, Tensor(a!) batch_indices, "
    "Tensor(b!) positions) -> ()",
    _batch_positions,
)
