"""Strided tensors inside a larger buffer of NaN: reading or writing past a row shows."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MARGIN = 3


def guarded(values: torch.Tensor) -> torch.Tensor:
    """Return a view of equal values, last dimension contiguous, with NaN on every side of it."""
    sizes = [size + 2 * _MARGIN for size in values.shape]
    buffer = torch.full(sizes, float("nan"), dtype=values.dtype)
    view = buffer[tuple(slice(_MARGIN, size - _MARGIN) for size in sizes)]
    view.copy_(values)
    return view


def guard_is_intact(view: torch.Tensor) -> bool:
    """Whether everything round a view from :func:`guarded` is still NaN."""
    assert view._base is not None
    outside = view._base.clone()
    outside[tuple(slice(_MARGIN, size - _MARGIN) for size in outside.shape)] = float("nan")
    return bool(outside.isnan().all())


def same_nans_and_infinities(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether NaNs and infinities of both sit at the same places with the same sign."""
    value, other = value.double(), other.double()
    infinite = torch.where(value.isinf(), value, 0.0), torch.where(other.isinf(), other, 0.0)
    return torch.equal(value.isnan(), other.isnan()) and torch.equal(*infinite)
