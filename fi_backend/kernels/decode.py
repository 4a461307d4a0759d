"""Attention of requests with few query rows, bound by reading K and V."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import attention_variant
from fi_backend.kernels.attention_line import LineKernels, line_spec, load_lines, partial_floats

__all__ = ["decode_spec", "load", "partial_floats"]


def decode_spec(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
) -> KernelSpec:
    """Describe the few-row kernel for one set of types and head sizes."""
    return line_spec(
        "decode",
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
        variant=variant,
    )


def load(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
) -> LineKernels:
    """Load the few-row kernel, compiling it where no cache has it."""
    spec = decode_spec(
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
    )
    return load_lines((spec,))
