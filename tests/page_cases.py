"""Small paged caches, in every memory order, and a page table for them."""

from __future__ import annotations

import torch

import fi_backend

HEADS, QK, VO = 3, 20, 12
PAGES, PAGE_SIZE = 7, 4
FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (*FLOATS, *FP8)


def make_cache(memory: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v) views [PAGES, PAGE_SIZE, HEADS, dim] of 7-filled memory in some order."""

    def filled(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, 7.0).to(dtype)

    if memory == "NHD":
        return filled(PAGES, PAGE_SIZE, HEADS, QK), filled(PAGES, PAGE_SIZE, HEADS, VO)
    if memory == "HND":
        k, v = filled(PAGES, HEADS, PAGE_SIZE, QK), filled(PAGES, HEADS, PAGE_SIZE, VO)
        return k.transpose(1, 2), v.transpose(1, 2)
    both = filled(PAGES, HEADS, PAGE_SIZE, QK + VO)  # a row holds K, then V
    return both[..., :QK].transpose(1, 2), both[..., QK:].transpose(1, 2)


def new_rows(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Strided K and V rows, as slices of a projection."""
    rows = torch.randn(count, HEADS, QK + VO + 5).to(dtype)
    return rows[..., :QK], rows[..., QK + 5 :]


def paged_case() -> tuple[torch.Tensor, ...]:
    """Three requests of lengths 6, 0 and 3, of which 2, 0 and 3 tokens are new; a padding row."""
    kv_indptr = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    kv_indices = torch.tensor([4, 1, 6, 2**31 - 1], dtype=torch.int32)
    last_page_len = torch.tensor([2, 0, 3], dtype=torch.int32)
    seq_lens = fi_backend.get_seq_lens(kv_indptr, last_page_len, PAGE_SIZE)
    append_indptr = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    batch_indices, positions = fi_backend.get_batch_indices_positions(append_indptr, seq_lens, 6)
    return batch_indices, positions, kv_indices, kv_indptr, last_page_len
