"""Run both lines of a plan: the few-row kernel, then the many-row kernel."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.attention_line import (
    LineKernels,
    call_count,
    load_lines,
    partial_floats,
)
from fi_backend.kernels.decode import decode_spec
from fi_backend.kernels.prefill import prefill_spec

__all__ = ["attention_specs", "call_count", "load", "partial_floats"]


def attention_specs(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
) -> tuple[KernelSpec, KernelSpec]:
    """Describe both kernels for one set of types and head sizes, few rows first."""
    types: dict[str, Any] = {
        "q_dtype": q_dtype,
        "kv_dtype": kv_dtype,
        "o_dtype": o_dtype,
        "head_dim_qk": head_dim_qk,
        "head_dim_vo": head_dim_vo,
    }
    return decode_spec(**types), prefill_spec(**types)


def load(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
) -> LineKernels:
    """Load both kernels, compiling them in parallel where no cache has them.

    Args:
        q_dtype: float32, float16 or bfloat16.
        kv_dtype: one of those, float8_e4m3fn or float8_e5m2.
        o_dtype: float32, float16 or bfloat16.
        head_dim_qk: size of a query or key row, a multiple of 8.
        head_dim_vo: size of a value or output row, a multiple of 8.
    """
    return load_lines(
        attention_specs(
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
        )
    )
