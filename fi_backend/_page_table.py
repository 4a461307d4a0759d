"""Checks of FlashInfer's page tables under the names their callers use.

Callers keep offsets and lengths on the host or on the device. What is on the host is checked by
value and copied; what is on the device is never read back, since that would wait for the device.
"""

from __future__ import annotations

import torch

from fi_backend.checks import check_offsets, check_tensor

__all__ = [
    "check_bound",
    "check_entries",
    "check_fits",
    "check_indptr",
    "check_lens",
    "check_metadata",
    "check_page_table",
    "fill",
    "own_copy",
    "page_lens",
    "to_device",
]

_MAX_TOKENS = torch.iinfo(torch.int32).max


def to_device(
    name: str, tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = True
) -> torch.Tensor:
    """Return `tensor` itself if it is on `device`, else a copy that nobody has waited for.

    Raises:
        RuntimeError: a CUDA graph is being captured; a replay would read host memory of long ago.
    """
    if tensor.device == device:
        return tensor
    _check_not_capturing(name, device)
    return tensor.to(device, non_blocking=non_blocking)


def own_copy(
    name: str, tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = True
) -> torch.Tensor:
    """Return a contiguous copy on `device` of what is on the host, and what a GPU has itself.

    Raises:
        RuntimeError: as :func:`to_device`.
    """
    if tensor.is_cpu and device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return to_device(name, tensor, device, non_blocking=non_blocking).contiguous()


def _check_not_capturing(name: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} is on the host, and a CUDA graph cannot hold a copy of it; plan before the "
            f"capture, or pass a tensor on {device}"
        )


def check_metadata(
    name: str, tensor: torch.Tensor, device: torch.device, *, shape: tuple[int | None, ...]
) -> None:
    """Check an int32 tensor that may be on the host or on `device`.

    Raises:
        TypeError, ValueError: its dtype, shape or device is not allowed.
    """
    check_tensor(name, tensor, shape=shape, dtype=torch.int32)
    if not tensor.is_cpu and tensor.device != device:
        allowed = "the CPU" if device.type == "cpu" else f"the CPU or on {device}"
        raise ValueError(f"{name} must be on {allowed}; got {tensor.device}")


def check_indptr(
    name: str,
    indptr: torch.Tensor,
    device: torch.device,
    *,
    batch_size: int | None = None,
    start_at_zero: bool = False,
) -> torch.Tensor:
    """Check an int32 [batch_size + 1] tensor of offsets that never decrease; return it dense."""
    size = None if batch_size is None else batch_size + 1
    check_metadata(name, indptr, device, shape=(size,))
    if indptr.is_cpu:
        check_offsets(name, indptr, start_at_zero=start_at_zero)
    elif indptr.shape[0] == 0:
        raise ValueError(f"{name} must have at least one element; got shape [0]")
    return indptr.contiguous()


def check_entries(
    names: tuple[str, str], indptr: torch.Tensor, indices: torch.Tensor, device: torch.device
) -> None:
    """Check that `indices` holds what `indptr` counts; `names` are the caller's of the two."""
    indptr_name, indices_name = names
    check_metadata(indices_name, indices, device, shape=(None,))
    if indptr.is_cpu and int(indptr[-1]) > indices.shape[0]:
        raise ValueError(
            f"{indices_name} must have at least {indptr_name}[-1] = {int(indptr[-1])} entries; "
            f"got {indices.shape[0]}"
        )


def check_page_table(
    names: tuple[str, str, str],
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    page_size: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Check a CSR page table; return the tokens of each request if the host knows them.

    Args:
        names: the caller's names of the next three arguments.
        indptr: int32 [batch_size + 1], offsets into `indices`.
        indices: int32 [num_entries], page ids.
        last_page_len: int32 [batch_size], tokens in each last page; 0 to page_size.
        page_size: tokens a page holds.
        device: where the step runs; each tensor is there or on the host.

    Returns:
        int32 [batch_size] on the host, or None if indptr or last_page_len is on a device.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")
    indptr_name, indices_name, last_name = names
    check_indptr(indptr_name, indptr, device)
    check_entries((indptr_name, indices_name), indptr, indices, device)
    check_metadata(last_name, last_page_len, device, shape=(indptr.shape[0] - 1,))
    if last_page_len.is_cpu:
        bad = (last_page_len < 0) | (last_page_len > page_size)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"{last_name} must lie between 0 and page_size ({page_size}); "
                f"got {last_name}[{at}] = {int(last_page_len[at])}"
            )
    if not (indptr.is_cpu and last_page_len.is_cpu):
        return None
    if int(indptr[-1]) * page_size > _MAX_TOKENS:
        pages = int(indptr.diff().max())
        if pages * page_size > _MAX_TOKENS:
            raise ValueError(
                f"{indptr_name} must give a request fewer than 2**31 tokens; got {pages} pages of "
                f"{page_size}"
            )
    return page_lens(indptr, last_page_len, page_size)


def page_lens(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request of a page table, int32 [batch_size]; 0 without pages."""
    pages = indptr[1:] - indptr[:-1]
    lens = (pages - 1) * page_size + last_page_len
    return torch.where(pages > 0, lens, 0).to(torch.int32)


def check_lens(
    name: str, given: torch.Tensor | None, lens: torch.Tensor | None, source: str
) -> None:
    """Check that lengths a caller states a second time agree with those the host knows."""
    if given is None:
        return
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(given).__name__}")
    if lens is None:
        return
    is_known = lens.is_cpu and given.is_cpu
    if given.numel() != lens.numel() or (
        is_known and not torch.equal(given.reshape(-1).to(torch.int64), lens.to(torch.int64))
    ):
        raise ValueError(f"{name} must agree with {source}; got {given}, expected {lens}")


def check_bound(name: str, bound: int | None, lens: torch.Tensor | None) -> None:
    """Check that a stated maximum is one, if the host knows the lengths."""
    if bound is None or lens is None:
        return
    longest = int(lens.max()) if lens.numel() else 0
    if bound < longest:
        raise ValueError(f"{name} must be at least the longest length, {longest}; got {bound}")


def check_fits(name: str, buffer: torch.Tensor, source: torch.Tensor) -> None:
    """Check that `source` can be copied to a caller's fixed buffer."""
    if source.shape[0] > buffer.shape[0]:
        raise ValueError(
            f"The size of {name} should be less than or equal to the allocated buffer; "
            f"got {source.shape[0]} elements for a buffer of {buffer.shape[0]}"
        )
    if source.device != buffer.device:
        _check_not_capturing(name, buffer.device)


def fill(
    name: str, buffer: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = True
) -> torch.Tensor:
    """Copy `source` to the front of a caller's fixed buffer and return that part of it."""
    check_fits(name, buffer, source)
    part = buffer[: source.shape[0]]
    part.copy_(source, non_blocking=non_blocking)
    return part
