"""Run both lines of a plan: the few-row kernel, then the many-row kernel, or one for both.

Where a row's bits must not depend on its batch, the many-row kernel runs alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fi_backend import jit
from fi_backend.jit import KernelSpec
from fi_backend.kernels import (
    attention_cuda,
    attention_line,
    attention_variant,
    device_plan,
    host_plan,
    mixed,
    prefill,
)
from fi_backend.kernels.decode import decode_spec

__all__ = [
    "attention_specs",
    "call_count",
    "group_spec",
    "load",
    "load_groups",
    "max_prior_rows",
    "partial_floats",
]

_PRIOR_ROWS = 32  # packed, of a request: as on most GPUs

# Every run on CUDA launches the few-row kernel or the one for both lines: their modules count. So
# does that of the many-row kernel where it runs alone; what it runs beside the others then counts
# too, in a process that does both.
_cuda_call_counts: dict[str, Callable[[], int]] = {}


def attention_specs(
    *,
    device_type: str = "cpu",
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
    many_rows_only: bool = False,
    max_rows: int | None = None,
) -> tuple[KernelSpec, ...]:
    """Describe the kernels for one set of types and head sizes.

    Few rows come first, then many, then the kernel for both if there is one. With many_rows_only
    there is but the second, for plans that are made with the same; and on a GPU but the first where
    no request has more than max_rows packed query rows (rows x query heads per KV head) and that
    kernel takes as many.
    """
    types: dict[str, Any] = {
        "q_dtype": q_dtype,
        "kv_dtype": kv_dtype,
        "o_dtype": o_dtype,
        "head_dim_qk": head_dim_qk,
        "head_dim_vo": head_dim_vo,
        "variant": variant,
    }
    if many_rows_only:
        return ((attention_cuda if device_type == "cuda" else prefill).prefill_spec(**types),)
    if device_type == "cuda":
        few = attention_cuda.decode_spec(**types)
        if max_rows is not None and max_rows <= attention_cuda.few_rows_limit(
            head_dim_qk, head_dim_vo
        ):
            return (few,)
        lines = few, attention_cuda.prefill_spec(**types)
        return (*lines, mixed.mixed_spec(**types)) if mixed.is_served(**types) else lines
    return decode_spec(**types), prefill.prefill_spec(**types)


def load(
    *, device_type: str = "cpu", with_groups: bool = False, **types: Any
) -> attention_line.LineKernels | attention_cuda.CudaLineKernels:
    """Load the kernels, compiling them and the planner in parallel where no cache has them.

    Args:
        device_type: "cpu" or "cuda".
        with_groups: load the kernel of group_spec() too, so that nothing is left to compile when
            the first step shares pages.
        types: q_dtype, kv_dtype, o_dtype, head_dim_qk, head_dim_vo and, if it is not the built-in
            attention, variant; the modules of each target say which values it takes. many_rows_only
            and max_rows as for attention_specs().
    """
    specs = attention_specs(device_type=device_type, **types)
    beside = [device_plan.plan_spec() if device_type == "cuda" else host_plan.plan_spec()]
    if with_groups:
        beside.append(group_spec(device_type=device_type, **types))
    kernels: attention_line.LineKernels | attention_cuda.CudaLineKernels
    if device_type == "cuda":
        kernels = attention_cuda.load_lines(specs[:2], specs[2:], beside)
        for spec in (specs[0], *specs[2:]):
            _cuda_call_counts[spec.name] = jit.load(spec).get_function("call_count")
    else:
        kernels = attention_line.load_lines(specs, tuple(beside))
    if with_groups:
        load_groups(device_type=device_type, **types)
    return kernels


def group_spec(
    *,
    device_type: str,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    **_: Any,
) -> KernelSpec:
    """Describe the many-row kernel that attends to what groups of requests share.

    Arguments are those of load(). It writes float32 states, whatever o_dtype a layer has, and
    layers with a variant do not share. On a GPU it keeps the states of parts of an item
    (csrc/include/fi_backend/attention/kept_parts.cuh).
    """
    is_cuda = device_type == "cuda"
    spec = (attention_cuda if is_cuda else prefill).prefill_spec
    return spec(
        variant=("fi::KeptParts", "") if is_cuda else None,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=torch.float32,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
    )


def load_groups(
    *, device_type: str, **types: Any
) -> attention_line.LineKernels | attention_cuda.CudaLineKernels:
    """Load the kernel of group_spec(), whose arguments these are."""
    loader = attention_cuda.load_lines if device_type == "cuda" else attention_line.load_lines
    return loader((group_spec(device_type=device_type, **types),))


@functools.cache
def max_prior_rows(*, device_type: str, **types: Any) -> int:
    """Most packed query rows of a request that may begin with prior states.

    On a GPU that is what the few-row kernel takes, which alone merges them; on the CPU as many.
    Arguments are those of load().
    """
    if device_type == "cuda":
        specs = attention_specs(device_type=device_type, **types)
        return attention_cuda.load_lines(specs[:2], specs[2:]).few_rows_limit
    return _PRIOR_ROWS


def call_count() -> int:
    """Count runs of a layer inside native code, over all modules this process has loaded.

    A CUDA graph counts when it is captured; its replays do not enter our code.
    """
    return attention_line.call_count() + sum(count() for count in _cuda_call_counts.values())


def partial_floats(
    *,
    device_type: str = "cpu",
    num_workers: int,
    split: int = 0,
    many_rows_only: bool = False,
    **types: Any,
) -> int:
    """Count the float32 elements of the workspace `partials`: it grows with workers alone.

    Args:
        device_type: "cpu" or "cuda".
        num_workers: workers of the plan.
        split: as planned; the bound on the CPU does not depend on it.
        many_rows_only: as planned; likewise.
        types: as for load(); nothing is loaded for them but the planner.
    """
    dims = {name: types[name] for name in ("head_dim_qk", "head_dim_vo")}
    if device_type == "cuda":
        return device_plan.partial_floats(
            num_workers=num_workers,
            split=split,
            many_rows_only=many_rows_only,
            has_mixed=mixed.is_served(**types),
            **dims,
        )
    return attention_line.partial_floats(num_workers=num_workers, **dims)
