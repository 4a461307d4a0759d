"""Packing booleans into bits, with FlashInfer's calls."""

from __future__ import annotations

import torch

from fi_backend.kernels import packbits as kernel
from fi_backend.torch_ops import register, runs_directly

__all__ = ["packbits", "segment_packbits"]

_BIT_ORDERS = ("big", "little")


def _op(
    x: torch.Tensor,
    indptr: torch.Tensor,
    out_indptr: torch.Tensor,
    out: torch.Tensor,
    little: bool,
) -> None:
    kernel.segment_packbits(x=x, indptr=indptr, out_indptr=out_indptr, out=out, little=little)


_segment_packbits = register(
    "segment_packbits(Tensor x, Tensor indptr, Tensor out_indptr, Tensor(a!) out, bool little) "
    "-> ()",
    _op,
)


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack 8 values into each byte; the last byte is padded with zero bits.

    Args:
        x: [n], bool, or of another dtype whose nonzero values mean true.
        bitorder: "big" puts the first of 8 values into the highest bit, "little" into the lowest.

    Returns:
        uint8 [ceil(n / 8)].

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` has not one dimension, or `bitorder` is not one of the two.
    """
    directly = _check(x, bitorder, "packbits")
    size = x.shape[0]
    out = x.new_empty((size + 7) // 8, dtype=torch.uint8)
    ends = torch.arange(2, device=x.device)  # made there: a copy from the host would wait
    indptr, out_indptr = ends * size, ends * out.shape[0]
    run = _segment_packbits.direct if directly else _segment_packbits.traced
    run(x.bool().contiguous(), indptr, out_indptr, out, bitorder == "little")
    return out


def segment_packbits(
    x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each segment of `x` into bytes of its own.

    Args:
        x: [n], bool, or of another dtype whose nonzero values mean true.
        indptr: [num_segments + 1]; segment s is ``x[indptr[s] : indptr[s + 1]]``.
        bitorder: as for :func:`packbits`; attention masks are packed "little".

    Returns:
        packed: uint8 [new_indptr[-1]].
        new_indptr: like `indptr`, counted in bytes of `packed`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: as :func:`packbits`, or `indptr` decreases or leaves ``[0, n]``.

    The size of `packed` depends on the values of `indptr`, so on a GPU this waits for them.
    """
    directly = _check(x, bitorder, "segment_packbits", indptr=indptr)
    sizes = indptr[1:] - indptr[:-1]
    new_indptr = torch.zeros_like(indptr)
    new_indptr[1:] = torch.cumsum((sizes + 7) // 8, 0)
    if directly:
        size = x.shape[0]
        is_bad = torch.cat((indptr[:1] < 0, sizes < 0, indptr[-1:] > size))
        if not len(indptr) or bool(is_bad.any()):
            raise ValueError(
                f"indptr must rise from 0 or more to {size}, the size of x, or less; "
                f"got {indptr.tolist()}"
            )
    out = x.new_empty(int(new_indptr[-1]) if len(indptr) else 0, dtype=torch.uint8)
    run = _segment_packbits.direct if directly else _segment_packbits.traced
    run(x.bool().contiguous(), indptr.long(), new_indptr.long(), out, bitorder == "little")
    return out, new_indptr


def _check(x: torch.Tensor, bitorder: str, operation: str, **others: torch.Tensor) -> bool:
    directly = runs_directly(operation, x=x, **others)
    if bitorder not in _BIT_ORDERS:
        raise ValueError(f"bitorder must be one of {', '.join(_BIT_ORDERS)}; got {bitorder!r}")
    if x.dim() != 1:
        raise ValueError(f"x must have one dimension; got shape {list(x.shape)}")
    return directly
