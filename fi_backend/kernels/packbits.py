"""Packing booleans into bits on the CPU."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions

__all__ = ["packbits_spec", "segment_packbits"]


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
    """Pack segments of `x` into bytes of their own.

    Args:
        x: bool [any].
        indptr: int64 [num_segments + 1]; segment s is ``x[indptr[s] : indptr[s + 1]]``.
        out_indptr: int64 [num_segments + 1], the first byte of each packed segment.
        out: uint8 [any], written; a segment of n values takes ceil(n / 8) bytes, zero padded.
        little: whether the first of 8 values is the lowest bit, rather than the highest.
    """
    _segment_packbits[None](x, indptr, out_indptr, out, little, torch.get_num_threads())
