"""Custom attention masks: from FlashInfer's two forms to the bits that kernels read."""

from __future__ import annotations

import torch

from fi_backend._page_table import to_device
from fi_backend.checks import check_tensor
from fi_backend.kernels.packbits import segment_packbits

__all__ = ["resolve_mask"]


def resolve_mask(
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    qo_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    device: torch.device,
    *,
    non_blocking: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bring a custom mask into the form kernels read.

    Sizes are checked where both lengths are on the host; lengths on a device are not read back.

    Args:
        custom_mask: bool, qo_len x kv_len elements of every request in turn, or None.
        packed_custom_mask: uint8 [num_bytes], packed already; it takes precedence.
        qo_lens: int32 [batch_size].
        kv_lens: int32 [batch_size], where qo_lens is: on the host or on `device`.
        device: where the step runs.
        non_blocking: do not wait for copies of masks on the host.

    Returns:
        (packed, mask_indptr) on `device`: uint8 bits, lowest first, every request at a byte of its
        own, and int32 [batch_size + 1] byte offsets; (None, None) if there is no mask.
    """
    if custom_mask is None and packed_custom_mask is None:
        return None, None
    sizes = qo_lens.to(torch.int64) * kv_lens.to(torch.int64)
    first_byte = _starts((sizes + 7) // 8)
    if sizes.is_cpu and int(first_byte[-1]) > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"custom_mask must pack into fewer than 2**31 bytes; got {int(first_byte[-1])}"
        )
    if packed_custom_mask is None:
        assert custom_mask is not None
        name, packed = "custom_mask", _pack(custom_mask, sizes, first_byte, device, non_blocking)
    else:
        name, packed = "packed_custom_mask", _checked(packed_custom_mask, first_byte)
    mask_indptr = first_byte.to(torch.int32)
    return (
        to_device(name, packed, device, non_blocking=non_blocking),
        to_device("mask_indptr", mask_indptr, device),
    )


def _starts(sizes: torch.Tensor) -> torch.Tensor:
    """Offsets int64 [n + 1] of n pieces that lie one after the other."""
    return torch.nn.functional.pad(torch.cumsum(sizes, 0), (1, 0))


def _checked(packed: torch.Tensor, first_byte: torch.Tensor) -> torch.Tensor:
    """Check a mask that the caller has packed; return it dense."""
    check_tensor("packed_custom_mask", packed, shape=(None,), dtype=torch.uint8)
    if first_byte.is_cpu and packed.shape[0] < int(first_byte[-1]):
        raise ValueError(
            f"packed_custom_mask must have {int(first_byte[-1])} bytes, qo_len x kv_len bits of "
            f"every request rounded up to bytes; got {packed.shape[0]}"
        )
    return packed.contiguous()


def _pack(
    mask: torch.Tensor,
    sizes: torch.Tensor,
    first_byte: torch.Tensor,
    device: torch.device,
    non_blocking: bool,
) -> torch.Tensor:
    """Pack flattened masks of `sizes` elements each, where the mask is or where the step runs."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"custom_mask must be a torch.Tensor of dtype torch.bool; "
            f"got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    mask = mask.reshape(-1).contiguous()
    num_bytes = (mask.numel() + 7 * sizes.numel()) // 8  # rounding up adds at most 7 bits a request
    if sizes.is_cpu:
        total = int(sizes.sum())
        if mask.numel() != total:
            raise ValueError(
                f"custom_mask must have {total} elements, qo_len x kv_len of every request; "
                f"got {mask.numel()}"
            )
        num_bytes = int(first_byte[-1])
    if not (mask.is_cpu and sizes.is_cpu):
        mask = to_device("custom_mask", mask, device, non_blocking=non_blocking)
        sizes, first_byte = (to_device("qo_indptr", x, device) for x in (sizes, first_byte))
    packed = torch.empty(num_bytes, dtype=torch.uint8, device=mask.device)
    segment_packbits(x=mask, indptr=_starts(sizes), out_indptr=first_byte, out=packed, little=True)
    return packed
