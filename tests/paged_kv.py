"""Paged caches whose every unread byte is poison: NaN rows, and huge ids in unread table slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HUGE_PAGE_ID = 2**31 - 1


@dataclass(frozen=True)
class PagedKv:
    """A cache and every form of its page table.

    Attributes:
        k_cache: [num_pages, page_size, Hkv, Dqk], possibly a strided view.
        v_cache: [num_pages, page_size, Hkv, Dvo].
        kv_lens: int32 [R].
        page_indptr: int32 [R + 1].
        page_indices: int32 [page_indptr[-1] + 3], the last three poisoned.
        block_table: int32 [R + 2, max_pages + 2], poisoned past each request's pages.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_lens: torch.Tensor
    page_indptr: torch.Tensor
    page_indices: torch.Tensor
    block_table: torch.Tensor


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 1:  # fill_ does not know these types; 0x7f is NaN in e4m3fn and e5m2
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(shape, float("nan"), dtype=dtype)


def empty_caches(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate poisoned K and V views [num_pages, page_size, Hkv, D].

    Layouts: "NHD" and "HND" are two tensors; "interleaved" is one [pages, Hkv, page_size, Dk + Dv]
    whose rows hold K and then V, as vLLM allocates it.
    """
    dim_qk, dim_vo = dims
    if layout == "NHD":
        return tuple(_poisoned((num_pages, page_size, num_kv_heads, d), dtype) for d in dims)
    if layout == "HND":
        return tuple(
            _poisoned((num_pages, num_kv_heads, page_size, d), dtype).transpose(1, 2) for d in dims
        )
    both = _poisoned((num_pages, num_kv_heads, page_size, dim_qk + dim_vo), dtype).transpose(1, 2)
    return both[..., :dim_qk], both[..., dim_qk:]


def paged_kv(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    page_size: int,
    *,
    layout: str = "NHD",
    unreadable: list[int] | None = None,
) -> PagedKv:
    """Scatter each request's K [len, Hkv, Dqk] and V [len, Hkv, Dvo] over random pages.

    Args:
        keys: one tensor per request.
        values: one tensor per request.
        page_size: tokens per page.
        layout: see empty_caches.
        unreadable: per request, how many leading tokens nobody may read (a window has left
            them): they stay NaN, and pages wholly among them get huge ids.
    """
    lens = [k.shape[0] for k in keys]
    counts = [-(-length // page_size) for length in lens]
    num_pages = sum(counts) + 3
    shuffled = torch.randperm(num_pages, dtype=torch.int32)
    k_cache, v_cache = empty_caches(
        num_pages,
        page_size,
        keys[0].shape[1],
        (keys[0].shape[2], values[0].shape[2]),
        keys[0].dtype,
        layout,
    )
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    table = torch.full((len(lens) + 2, max(counts, default=0) + 2), HUGE_PAGE_ID, dtype=torch.int32)
    indices = torch.full((sum(counts) + 3,), HUGE_PAGE_ID, dtype=torch.int32)
    for r, length in enumerate(lens):
        first = 0 if unreadable is None else min(unreadable[r], length)
        pages = shuffled[int(indptr[r]) : int(indptr[r + 1])]
        token = torch.arange(first, length)
        page, offset = pages[token // page_size].long(), token % page_size
        for cache, rows in ((k_cache, keys[r]), (v_cache, values[r])):
            if cache.dtype.itemsize == 1:
                cache.view(torch.uint8)[page, offset] = rows[first:].view(torch.uint8)
            else:
                cache[page, offset] = rows[first:]
        used = slice(first // page_size, counts[r])
        table[r, used] = pages[used]
        indices[int(indptr[r]) : int(indptr[r + 1])][used] = pages[used]
    return PagedKv(k_cache, v_cache, torch.tensor(lens, dtype=torch.int32), indptr, indices, table)
