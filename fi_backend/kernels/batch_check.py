"""Check the values of a step's metadata on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fi_backend.jit import load
from fi_backend.kernels.host_plan import plan_spec

__all__ = ["check_batch"]

_check: Callable[..., int] | None = None


def check_batch(
    *,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int | None,
    page_indptr: torch.Tensor | None,
    num_page_indices: int | None,
    page_size: int,
    max_qo_len: int | None = None,
) -> int:
    """Check offsets and lengths, and that the page table holds them; return qo_indptr[-1].

    Args:
        qo_indptr: int32 [R + 1], contiguous, on the CPU, as all tensors here.
        kv_lens: int32 [R].
        max_kv_len: tokens that a row of the block table holds; None without one.
        page_indptr: int32 [R + 1]; None with a block table.
        num_page_indices: entries that page_indptr counts; None without any.
        page_size: tokens a page holds.
        max_qo_len: most query rows of a request; None for any number.

    Raises:
        ValueError: an offset decreases or is negative, a length does not fit its pages, or a
            request has too many query rows.
    """
    global _check
    if _check is None:
        _check = load(plan_spec()).get_function("check_batch")
    return _check(
        qo_indptr,
        kv_lens,
        -1 if max_kv_len is None else max_kv_len,
        page_indptr,
        -1 if num_page_indices is None else num_page_indices,
        page_size,
        -1 if max_qo_len is None else max_qo_len,
    )
