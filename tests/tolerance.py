"""How wrong a kernel may be: at most twice as wrong as torch in the same dtype."""

from __future__ import annotations

import torch


def max_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest absolute error; infinite where infinities or NaNs do not match."""
    value, reference = value.double(), reference.double()
    finite = reference.isfinite()
    if not torch.equal(value[~finite], reference[~finite]) or not value[finite].isfinite().all():
        return float("inf")
    return float((value - reference)[finite].abs().max()) if finite.any() else 0.0


def one_ulp(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the spacing of `dtype` at the reference's largest finite magnitude."""
    finite = reference[reference.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.finfo(dtype).eps * largest


def assert_accurate(
    value: torch.Tensor, reference: torch.Tensor, same_dtype: torch.Tensor, what: str = ""
) -> None:
    """Check value's error against that of torch's result `same_dtype` for the same problem.

    One ulp is added, so that a result torch happens to get exactly right stays reachable.
    """
    error = max_error(value, reference)
    allowed = 2 * max_error(same_dtype, reference) + one_ulp(reference, same_dtype.dtype)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_lse_accurate(
    lse: torch.Tensor, reference: torch.Tensor, logit_dtype: torch.dtype = torch.float32
) -> None:
    """Check base-2 log-sum-exps, whose error is that of logits.

    Products of the inputs are exact in float32, so a logit errs by its summation alone, unless
    something rounds to `logit_dtype` before.
    """
    error = max_error(lse, reference)
    allowed = 32 * max(torch.finfo(logit_dtype).eps, one_ulp(reference, logit_dtype))
    assert error <= allowed, f"lse: error {error:.3g}, allowed {allowed:.3g}"
