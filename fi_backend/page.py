"""Appending to a paged KV cache, with FlashInfer's calls and by slots, as engines do it.

CPU and CUDA tensors are served; a call's tensors are all on one device. On CUDA a call only
launches, on the current stream, and may be captured in a graph once a call with the same dtypes has
compiled or loaded the kernel. It never waits for the device, so no value in a tensor raises an
error: rows without a place in the cache are skipped, where the CPU refuses the call.
"""

from __future__ import annotations

import torch

from fi_backend._page_ops import (
    APPEND_POSITIONS,
    APPEND_SLOTS,
    BATCH_POSITIONS,
    to_int32,
    unbind_cache,
)
from fi_backend.checks import unpack_cache
from fi_backend.torch_ops import runs_directly

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "append_to_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
]


def append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> None:
    """Write new K and V rows to the slots of a paged cache.

    The number of tokens is that of `slot_mapping`: further rows of key and value are ignored, and
    slots without a row must be negative. Nothing is written if an argument is wrong.

    Args:
        key: [num_rows, num_kv_heads, head_dim_qk]; float32, float16, bfloat16, or the fp8 dtype
            of the cache.
        value: [num_rows, num_kv_heads, head_dim_vo], the dtype of `key`.
        kv_cache: (k, v), each [num_pages, page_size, num_kv_heads, head_dim], views of any strides
            but a contiguous last dimension; float32, float16, bfloat16, float8_e4m3fn or
            float8_e5m2.
        slot_mapping: int32 or int64 [num_tokens]; slot = page * page_size + offset, a negative
            slot is skipped.
        k_scale: an fp8 cache stores ``saturate(key / k_scale)``; a float, or a float32 tensor of
            one element or one per kv head. Caches of other dtypes ignore it.
        v_scale: the same for `value`.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed, a slot is outside the cache, or a
            scale is not above 0. (On CUDA slots, and scales in tensors, are not looked at.)
    """
    k_cache, v_cache = unpack_cache("kv_cache", kv_cache)
    if runs_directly(
        "append_to_cache",
        key=key,
        value=value,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
    ):
        APPEND_SLOTS.direct(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    k_scales = k_scale if isinstance(k_scale, torch.Tensor) else None
    v_scales = v_scale if isinstance(v_scale, torch.Tensor) else None
    APPEND_SLOTS.traced(
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        1.0 if k_scales is not None else k_scale,
        1.0 if v_scales is not None else v_scale,
        k_scales,
        v_scales,
    )


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write new K and V rows at positions of their requests.

    The page table must already hold the pages of the new tokens. Nothing is written if an argument
    is wrong. Index tensors are int32, or int64, which is converted into new memory.

    Args:
        append_key: [nnz, num_kv_heads, head_dim]; float32, float16, bfloat16, or the fp8 dtype of
            the cache.
        append_value: like `append_key`.
        batch_indices: [nnz], the request of each row; rows with a negative one are skipped.
        positions: [nnz], where in its request each row goes.
        paged_kv_cache: one tensor [num_pages, 2, page_size, num_kv_heads, head_dim] (NHD) or
            [num_pages, 2, num_kv_heads, page_size, head_dim] (HND), or a pair without the 2.
        kv_indices: [kv_indptr[-1]], page ids.
        kv_indptr: [num_requests + 1], where each request's pages begin in `kv_indices`.
        kv_last_page_len: [num_requests], tokens in each request's last page, the new ones
            included. Addresses do not depend on it.
        kv_layout: "NHD" or "HND".

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed, or a row has no place in the cache.
            (On CUDA such a row is skipped.)
    """
    k_cache, v_cache = unbind_cache(paged_kv_cache, kv_layout)
    _append_positions(
        "append_paged_kv_cache",
        append_key,
        append_value,
        batch_indices,
        positions,
        k_cache,
        v_cache,
        kv_indices,
        kv_indptr,
        kv_last_page_len,
    )


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Write new rows of an MLA cache; otherwise as :func:`append_paged_kv_cache`.

    Args:
        append_ckv: [nnz, head_dim_ckv], compressed KV.
        append_kpe: [nnz, head_dim_kpe], rotary keys.
        batch_indices: [nnz].
        positions: [nnz].
        ckv_cache: [num_pages, page_size, head_dim_ckv].
        kpe_cache: [num_pages, page_size, head_dim_kpe].
        kv_indices: [kv_indptr[-1]].
        kv_indptr: [num_requests + 1].
        kv_last_page_len: [num_requests].
    """
    operation = "append_paged_mla_kv_cache"
    runs_directly(
        operation,
        append_ckv=append_ckv,
        append_kpe=append_kpe,
        ckv_cache=ckv_cache,
        kpe_cache=kpe_cache,
    )
    _append_positions(
        operation,
        append_ckv.unsqueeze(-2),
        append_kpe.unsqueeze(-2),
        batch_indices,
        positions,
        ckv_cache.unsqueeze(-2),
        kpe_cache.unsqueeze(-2),
        kv_indices,
        kv_indptr,
        kv_last_page_len,
    )


def _append_positions(
    operation: str,
    key: torch.Tensor,
    value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    directly = runs_directly(
        operation,
        append_key=key,
        append_value=value,
        batch_indices=batch_indices,
        positions=positions,
        k_cache=k_cache,
        v_cache=v_cache,
        kv_indices=kv_indices,
        kv_indptr=kv_indptr,
        kv_last_page_len=kv_last_page_len,
    )
    if kv_last_page_len.shape != (kv_indptr.shape[0] - 1,):
        raise ValueError(
            f"kv_last_page_len must have shape [{kv_indptr.shape[0] - 1}], a request for each step "
            f"of kv_indptr; got {list(kv_last_page_len.shape)}"
        )
    run = APPEND_POSITIONS.direct if directly else APPEND_POSITIONS.traced
    run(
        key,
        value,
        k_cache,
        v_cache,
        to_int32("batch_indices", batch_indices),
        to_int32("positions", positions),
        to_int32("kv_indices", kv_indices),
        to_int32("kv_indptr", kv_indptr),
    )


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the request and the position of every appended row of a ragged batch.

    Args:
        append_indptr: int32 or int64 [num_requests + 1]; request b appends rows ``indptr[b]`` to
            ``indptr[b + 1]``.
        seq_lens: int32 or int64 [num_requests], lengths that include the appended tokens.
        nnz: number of rows; those that no request owns get batch index -1 and position 0. On CUDA
            the rest of `append_indptr` past it is ignored.
        batch_indices: int32 [nnz], where the result goes. None: a new tensor.
        positions: int32 [nnz], likewise.

    Returns:
        (batch_indices, positions), int32 [nnz] each.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: `append_indptr` decreases or exceeds `nnz`, a sequence is shorter than what it
            appends, or a shape is not allowed. (On CUDA values are not looked at; where lengths
            are too short positions are negative.)
    """
    directly = runs_directly(
        "get_batch_indices_positions", append_indptr=append_indptr, seq_lens=seq_lens
    )
    if batch_indices is None:
        batch_indices = append_indptr.new_empty(nnz, dtype=torch.int32)
    if positions is None:
        positions = append_indptr.new_empty(nnz, dtype=torch.int32)
    for name, tensor in (("batch_indices", batch_indices), ("positions", positions)):
        if tensor.shape != (nnz,):
            raise ValueError(f"{name} must have shape [nnz={nnz}]; got {list(tensor.shape)}")
    run = BATCH_POSITIONS.direct if directly else BATCH_POSITIONS.traced
    run(append_indptr, seq_lens, batch_indices, positions)
    return batch_indices, positions


def get_seq_lens(
    kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Return the length of every request, in tokens: ``(pages - 1) * page_size + last_page_len``.

    A request without pages has the length `kv_last_page_len` gives it, which must then be 0.

    No value is checked.

    Args:
        kv_indptr: int32 [num_requests + 1], counted in pages.
        kv_last_page_len: int32 [num_requests], tokens in each request's last page.
        page_size: tokens of a page.

    Returns:
        int32 [num_requests].

    Raises:
        RuntimeError: torch's own, where the sizes do not fit.
    """
    full_pages = torch.clamp(kv_indptr[1:] - kv_indptr[:-1] - 1, min=0)
    return full_pages * page_size + kv_last_page_len
