"""Run both lines of a plan: the few-row kernel, then the many-row kernel."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.jit import build
from fi_backend.kernels import decode, prefill
from fi_backend.kernels.attention_line import call_count, partial_floats

__all__ = ["AttentionKernels", "call_count", "load", "partial_floats"]

# Elements of a plan that tell which line has work: kHasWorkInt in plan/work_line.h.
_HAS_WORK = slice(14, 16)


class AttentionKernels:
    """Both attention kernels of one set of types and head sizes."""

    def __init__(self, types: dict[str, Any]) -> None:
        build([decode.decode_spec(**types), prefill.prefill_spec(**types)])
        self._few_rows = decode.load(**types)
        self._many_rows = prefill.load(**types)

    def run(self, *, plan_buffer: torch.Tensor, **arguments: Any) -> None:
        """Run each line of the plan that has work; arguments as LineKernel.run takes them."""
        few_rows, many_rows = plan_buffer[_HAS_WORK].tolist()
        if few_rows:
            self._few_rows.run(plan_buffer=plan_buffer, **arguments)
        if many_rows:
            self._many_rows.run(plan_buffer=plan_buffer, **arguments)


_kernels: dict[tuple[object, ...], AttentionKernels] = {}


def load(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
) -> AttentionKernels:
    """Load both kernels, compiling them in parallel where no cache has them.

    Args:
        q_dtype: float32, float16 or bfloat16.
        kv_dtype: one of those, float8_e4m3fn or float8_e5m2.
        o_dtype: float32, float16 or bfloat16.
        head_dim_qk: size of a query or key row, a multiple of 8.
        head_dim_vo: size of a value or output row, a multiple of 8.
    """
    key = (q_dtype, kv_dtype, o_dtype, head_dim_qk, head_dim_vo)
    kernels = _kernels.get(key)
    if kernels is None:
        types = {
            "q_dtype": q_dtype,
            "kv_dtype": kv_dtype,
            "o_dtype": o_dtype,
            "head_dim_qk": head_dim_qk,
            "head_dim_vo": head_dim_vo,
        }
        kernels = _kernels[key] = AttentionKernels(types)
    return kernels
