"""Checks of tensor arguments. Every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "check_mask_offsets",
    "check_offsets",
    "check_page_ids",
    "check_tensor",
    "unpack_cache",
]


def check_tensor(
    name: str,
    tensor: object,
    *,
    shape: Sequence[int | None],
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    last_dim_contiguous: bool = False,
) -> None:
    """Check rank, sizes, dtype, device and layout of one tensor argument.

    `shape` holds a size per dimension, None where any size is allowed.

    Raises:
        TypeError: `tensor` is no tensor, or its dtype is not allowed.
        ValueError: its rank, a size, its device or its last stride is not allowed.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    sizes = tensor.shape
    if not _fits(sizes, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}]; got {list(sizes)}")
    if dtype is not None and tensor.dtype != dtype:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if tensor.dtype not in allowed:
            names = " or ".join(str(one) for one in allowed)
            raise TypeError(f"{name} must have dtype {names}; got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on device {device}; got {tensor.device}")
    if last_dim_contiguous and sizes[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension; got strides {tensor.stride()}. "
            f"Call .contiguous() on it first"
        )


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    # A plain loop: any() over a generator takes twice as long, and every step waits for it.
    if len(sizes) != len(shape):
        return False
    for at, want in enumerate(shape):  # noqa: SIM110
        if want is not None and sizes[at] != want:
            return False
    return True


def check_offsets(name: str, offsets: torch.Tensor, *, start_at_zero: bool = False) -> None:
    """Check that a host tensor of offsets never decreases and starts at 0 (or above).

    Raises:
        ValueError: an offset is negative, smaller than the one before, or the first is not 0.
    """
    if offsets.numel() == 0:
        raise ValueError(f"{name} must have at least one element; got shape {list(offsets.shape)}")
    first = int(offsets[0])
    if first < 0 or (start_at_zero and first != 0):
        allowed = "0" if start_at_zero else "at least 0"
        raise ValueError(f"{name}[0] must be {allowed}; got {first}")
    steps = offsets[1:] < offsets[:-1]
    if bool(steps.any()):
        at = int(steps.nonzero()[0])
        raise ValueError(
            f"{name} must never decrease; got {name}[{at}] = {int(offsets[at])} and "
            f"{name}[{at + 1}] = {int(offsets[at + 1])}"
        )


def check_mask_offsets(
    mask_indptr: torch.Tensor, qo_indptr: torch.Tensor, kv_lens: torch.Tensor, num_bytes: int
) -> None:
    """Check that packed masks hold the bits of every request; tensors on the host.

    Args:
        mask_indptr: int32 [R + 1], first byte of each request.
        qo_indptr: int32 [R + 1], first query row of each request.
        kv_lens: int32 [R], keys of each request.
        num_bytes: of all masks.

    Raises:
        ValueError: an offset is negative or decreases, or leaves a request too few bytes.
    """
    check_offsets("mask_indptr", mask_indptr)
    if int(mask_indptr[-1]) > num_bytes:
        raise ValueError(
            f"custom_mask must have mask_indptr[-1] = {int(mask_indptr[-1])} bytes; got {num_bytes}"
        )
    needed = (qo_indptr.diff().to(torch.int64) * kv_lens + 7) // 8
    short = mask_indptr.diff() < needed
    if bool(short.any()):
        at = int(short.nonzero()[0])
        raise ValueError(
            f"mask_indptr must leave request {at} at least {int(needed[at])} bytes, a bit for each "
            f"of its rows and keys; got {int(mask_indptr[at + 1] - mask_indptr[at])}"
        )


def unpack_cache(name: str, cache: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return a pair of caches as it is.

    Raises:
        TypeError: it is none.
    """
    if isinstance(cache, (tuple, list)) and len(cache) == 2:
        return cache
    raise TypeError(f"{name} must be a pair of tensors, (k, v); got {type(cache).__name__}")


def check_page_ids(name: str, page_ids: torch.Tensor, *, num_pages: int) -> None:
    """Check that every page id in a host tensor lies in [0, num_pages).

    Raises:
        ValueError: an id is out of range.
    """
    bad = (page_ids < 0) | (page_ids >= num_pages)
    if bool(bad.any()):
        value = int(page_ids[bad][0])
        raise ValueError(f"{name} must hold page ids in [0, {num_pages}); got {value}")
