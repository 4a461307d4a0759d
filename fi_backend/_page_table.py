"""Checks of FlashInfer's page tables and masks under the names their callers use."""

from __future__ import annotations

import torch

from fi_backend.checks import check_cpu, check_offsets, check_tensor
from fi_backend.quantization import segment_packbits

__all__ = [
    "check_bound",
    "check_indptr",
    "check_lens",
    "check_page_table",
    "fill",
    "resolve_mask",
]


def check_indptr(
    operation: str, name: str, indptr: torch.Tensor, *, batch_size: int | None = None
) -> torch.Tensor:
    """Check an int32 [batch_size + 1] tensor of offsets that never decrease; return it dense."""
    if not isinstance(indptr, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(indptr).__name__}")
    check_cpu(operation, indptr.device)
    size = None if batch_size is None else batch_size + 1
    check_tensor(name, indptr, shape=(size,), dtype=torch.int32)
    check_offsets(name, indptr)
    return indptr.contiguous()


def check_page_table(
    operation: str,
    names: tuple[str, str, str],
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """Check a CSR page table and return the tokens of each request, int32 [batch_size].

    Args:
        operation: who asks, for messages.
        names: the caller's names of the next three arguments.
        indptr: int32 [batch_size + 1], offsets into `indices`.
        indices: int32 [num_entries], page ids.
        last_page_len: int32 [batch_size], tokens in each last page; 0 to page_size.
        page_size: tokens a page holds.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")
    indptr_name, indices_name, last_name = names
    check_indptr(operation, indptr_name, indptr)
    batch_size = indptr.shape[0] - 1
    check_tensor(indices_name, indices, shape=(None,), dtype=torch.int32, device=indptr.device)
    if int(indptr[-1]) > indices.shape[0]:
        raise ValueError(
            f"{indices_name} must have at least {indptr_name}[-1] = {int(indptr[-1])} entries; "
            f"got {indices.shape[0]}"
        )
    check_tensor(
        last_name, last_page_len, shape=(batch_size,), dtype=torch.int32, device=indptr.device
    )
    bad = (last_page_len < 0) | (last_page_len > page_size)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{last_name} must lie between 0 and page_size ({page_size}); "
            f"got {last_name}[{at}] = {int(last_page_len[at])}"
        )
    pages = indptr[1:] - indptr[:-1]
    lens = (pages - 1) * page_size + last_page_len
    return torch.where(pages > 0, lens, 0).to(torch.int32)


def check_lens(name: str, given: torch.Tensor | None, lens: torch.Tensor, source: str) -> None:
    """Check that lengths a caller states a second time agree with the ones already known."""
    if given is None:
        return
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(given).__name__}")
    if given.numel() != lens.numel() or not torch.equal(
        given.reshape(-1).to(torch.int64), lens.to(torch.int64)
    ):
        raise ValueError(f"{name} must agree with {source}; got {given}, expected {lens}")


def check_bound(name: str, bound: int | None, lens: torch.Tensor) -> None:
    """Check that a stated maximum is one."""
    longest = int(lens.max()) if lens.numel() else 0
    if bound is not None and bound < longest:
        raise ValueError(f"{name} must be at least the longest length, {longest}; got {bound}")


def fill(name: str, buffer: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy `source` to the front of a caller's fixed buffer and return that part of it."""
    if source.shape[0] > buffer.shape[0]:
        raise ValueError(
            f"The size of {name} should be less than or equal to the allocated buffer; "
            f"got {source.shape[0]} elements for a buffer of {buffer.shape[0]}"
        )
    part = buffer[: source.shape[0]]
    part.copy_(source)
    return part


def resolve_mask(
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    qo_lens: torch.Tensor,
    kv_lens: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bring a custom mask into the form kernels read.

    Args:
        custom_mask: bool, qo_len x kv_len elements of every request in turn, or None.
        packed_custom_mask: uint8 [num_bytes], packed already; it takes precedence.
        qo_lens: int32 [batch_size].
        kv_lens: int32 [batch_size].

    Returns:
        (packed, mask_indptr): uint8 bits, lowest first, every request at a byte of its own, and
        int32 [batch_size + 1] byte offsets; (None, None) if there is no mask.
    """
    if custom_mask is None and packed_custom_mask is None:
        return None, None
    sizes = qo_lens.to(torch.int64) * kv_lens.to(torch.int64)
    num_bytes = int(((sizes + 7) // 8).sum())
    if num_bytes > torch.iinfo(torch.int32).max:
        raise ValueError(f"custom_mask must pack into fewer than 2**31 bytes; got {num_bytes}")
    if packed_custom_mask is None:
        assert custom_mask is not None
        return _pack(custom_mask, sizes)
    check_tensor("packed_custom_mask", packed_custom_mask, shape=(None,), dtype=torch.uint8)
    if packed_custom_mask.shape[0] < num_bytes:
        raise ValueError(
            f"packed_custom_mask must have {num_bytes} bytes, qo_len x kv_len bits of every "
            f"request rounded up to bytes; got {packed_custom_mask.shape[0]}"
        )
    return packed_custom_mask.contiguous(), _starts((sizes + 7) // 8).to(torch.int32)


def _starts(sizes: torch.Tensor) -> torch.Tensor:
    """Offsets int64 [n + 1] of n pieces that lie one after the other."""
    return torch.nn.functional.pad(torch.cumsum(sizes, 0), (1, 0))


def _pack(mask: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack flattened masks of `sizes` elements each; return (packed, byte offsets)."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"custom_mask must be a torch.Tensor of dtype torch.bool; "
            f"got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    total = int(sizes.sum())
    if mask.numel() != total:
        raise ValueError(
            f"custom_mask must have {total} elements, qo_len x kv_len of every request; "
            f"got {mask.numel()}"
        )
    packed, indptr = segment_packbits(mask.reshape(-1), _starts(sizes), bitorder="little")
    return packed, indptr.to(torch.int32)
