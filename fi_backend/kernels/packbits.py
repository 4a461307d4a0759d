"""Packing booleans into bits: a kernel on the CPU, torch operations on a GPU."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions

__all__ = ["pack_with_torch", "packbits_spec", "segment_packbits"]


def packbits_spec() -> KernelSpec:
    """Describe the module that packs booleans."""
    return KernelSpec(name="packbits_cpu", target="cpu", templates=("packbits_cpu.cc.j2",))


_segment_packbits = Functions("segment_packbits", lambda _: packbits_spec())


def segment_packbits(
    *,
    x: torch.Tensor,
    indptr: torch.Tensor,
    out_indptr: torch.Tensor,
    out: torch.Tensor,
    little: bool,
) -> None:
    """Pack segments of `x` into bytes of their own; on a GPU, without waiting for it.

    Args:
        x: bool [any].
        indptr: int64 [num_segments + 1]; segment s is ``x[indptr[s] : indptr[s + 1]]``.
        out_indptr: int64 [num_segments + 1], the first byte of each packed segment.
        out: uint8 [any], written; a segment of n values takes ceil(n / 8) bytes, zero padded.
        little: whether the first of 8 values is the lowest bit, rather than the highest.

    Raises:
        ValueError: offsets do not fit `x` or `out`. On a GPU their values are not looked at.
    """
    if x.is_cpu:
        _segment_packbits[None](x, indptr, out_indptr, out, little, torch.get_num_threads())
    else:
        pack_with_torch(x=x, indptr=indptr, out_indptr=out_indptr, out=out, little=little)


def pack_with_torch(
    *,
    x: torch.Tensor,
    indptr: torch.Tensor,
    out_indptr: torch.Tensor,
    out: torch.Tensor,
    little: bool,
) -> None:
    """Pack as :func:`segment_packbits` does, on any device; bytes of no segment become 0."""
    out.zero_()
    if x.numel() == 0 or indptr.numel() < 2:
        return
    byte = torch.arange(out.numel(), device=out.device)
    segment = torch.searchsorted(out_indptr, byte, right=True).sub_(1).clamp_(0, len(indptr) - 2)
    first_element = indptr[segment] + 8 * (byte - out_indptr[segment])
    end = indptr[segment + 1]
    for bit in range(8):
        element = first_element + bit
        # Offsets that do not fit x, which nobody checks here, must not be read.
        value = x[element.clamp(0, x.numel() - 1)] & (element < end)
        out |= value.to(torch.uint8) << (bit if little else 7 - bit)
