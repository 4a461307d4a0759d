"""What an engine has of a step, in the form that attention reads: page tables and masks."""

from __future__ import annotations

import torch

from fi_backend.kernels import pack_masks as masks_kernel
from fi_backend.kernels import page_table as table_kernel

__all__ = ["gather_page_table", "pack_masks"]


def gather_page_table(
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    token_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int = 1,
    *,
    extra_tokens: int = 0,
    slot_map: torch.Tensor | None = None,
    num_branches: int = 1,
    branch_tokens: int = 0,
) -> None:
    """Write the block table and the lengths of a step's requests.

    Entry (r, j) of the block table becomes ``token_table[request_rows[r], j * page_size]``, through
    `slot_map` if there is one, divided by `page_size`. Entries past a request's last page are left
    alone. On CUDA this is one launch on the current stream, which reads no value on the host and
    may be captured in a graph once a call has compiled or loaded the kernel.

    Args:
        page_table: int32 [num_requests * num_branches, max_pages], any row stride; written.
        kv_lens: int32 [num_requests * num_branches]; written: ``seq_lens + extra_tokens``, between
            0 and what a row of either table holds. 0 if the request's row is not in `token_table`.
        token_table: int32 [num_rows, max_tokens], any row stride; the cache slot of each token.
        request_rows: int32 or int64 [num_requests], row of `token_table`.
        seq_lens: int32 or int64 [num_requests], tokens.
        page_size: tokens a page holds. Slots of a page follow one another, from a multiple of it.
        extra_tokens: tokens of every request beyond its `seq_lens`.
        slot_map: int32 or int64 [num_slots], the slot in another pool for each slot; what is not
            in it counts as slot 0.
        num_branches: rows of `page_table` and `kv_lens` for each request, one after the other: the
            branches of a tree of drafts. They share the request's `seq_lens` tokens. More than 1
            needs page_size 1.
        branch_tokens: after the shared tokens, those of each branch begin so many further on in
            `token_table`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or `page_size` is not allowed.
    """
    table_kernel.gather_page_table(
        page_table=page_table,
        kv_lens=kv_lens,
        token_table=token_table,
        request_rows=request_rows,
        seq_lens=seq_lens,
        extra_tokens=extra_tokens,
        page_size=page_size,
        slot_map=slot_map,
        num_branches=num_branches,
        branch_tokens=branch_tokens,
    )


def pack_masks(
    bits: torch.Tensor, masks: torch.Tensor, kv_lens: torch.Tensor, num_rows: int
) -> None:
    """Pack booleans into the masks that :meth:`PagedAttention.run` takes.

    Request r's are ``num_rows * kv_lens[r]`` booleans, row by row; those of the requests follow one
    another. Its bits begin at ``bits[r]``, little endian, so that `mask_indptr` is the multiples of
    ``bits.shape[1]``. On CUDA this is one launch on the current stream, which reads no value on the
    host and may be captured in a graph once a call has compiled or loaded the kernel.

    Args:
        bits: uint8 [num_requests, bytes_per_request], contiguous; written. Bytes past a request's
            last one are left alone, bits that do not fit are left out.
        masks: bool [any]; what is missing at its end counts as true.
        kv_lens: int32 [num_requests], keys of each request.
        num_rows: query rows of every request.

    Raises:
        TypeError, ValueError: a dtype, shape, device or `num_rows` is not allowed.
    """
    masks_kernel.pack_masks(bits=bits, masks=masks, kv_lens=kv_lens, num_rows=num_rows)
