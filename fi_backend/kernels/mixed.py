"""Attention of requests with few and with many query rows in one launch, on GPUs of sm_90."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from fi_backend import env
from fi_backend.errors import ToolchainError
from fi_backend.jit import KernelSpec, arch
from fi_backend.kernels import attention_variant
from fi_backend.kernels.attention_cuda import line_spec

__all__ = ["is_served", "mixed_spec", "planned_kernels"]

_HEAD_DIMS = (64, 96, 128, 192)


def is_served(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
) -> bool:
    """Return whether modules are compiled for sm_90a, and these types and sizes have such a kernel.

    FI_BACKEND_SEPARATE_LAUNCHES turns it off.

    Args:
        q_dtype: as for mixed_spec().
        kv_dtype: as for mixed_spec().
        o_dtype: any that the kernels of both lines take.
        head_dim_qk: as for mixed_spec().
        head_dim_vo: as for mixed_spec().
        variant: any.
    """
    if q_dtype != kv_dtype or head_dim_qk != head_dim_vo or head_dim_qk not in _HEAD_DIMS:
        return False
    return not env.SEPARATE_LAUNCHES.get() and _is_compiled_for_sm90()


def _is_compiled_for_sm90() -> bool:
    try:
        return any(target.digits == "90a" for target in arch.resolve())
    except ToolchainError:  # nothing can be compiled; whoever tries is told so
        return False


@cache
def planned_kernels() -> tuple[bool, bool]:
    """Return what a planner must know of the kernels that run its plans.

    The environment says so, which is read once: a plan is made in microseconds.

    Returns:
        Whether modules are compiled for sm_90a, and whether the kernel for both lines is used there
        for types and sizes that have one.
    """
    on_sm90 = _is_compiled_for_sm90()
    return on_sm90, on_sm90 and not env.SEPARATE_LAUNCHES.get()


def mixed_spec(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
    trace: bool = False,
) -> KernelSpec:
    """Describe the kernel that runs both lines of a plan.

    Args:
        q_dtype: float16 or bfloat16.
        kv_dtype: q_dtype.
        o_dtype: float32, float16 or bfloat16.
        head_dim_qk: 64, 96, 128 or 192.
        head_dim_vo: head_dim_qk.
        variant: the C++ type of a custom variant, and its definition.
        trace: record when each thread block was at which line; take_block_traces() of the module
            reads it.
    """
    spec = line_spec(
        "mixed_trace" if trace else "mixed",
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
        variant=variant,
    )
    return replace(spec, supported_majors=(9,))
