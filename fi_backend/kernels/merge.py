"""Merge attention states (v, lse) over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fi_backend.jit import KernelSpec, load
from fi_backend.kernels.dtypes import cpp_type, short_name

__all__ = ["merge_pair", "merge_spec", "merge_states"]

_functions: dict[tuple[str, torch.dtype, torch.dtype], Callable[..., Any]] = {}


def merge_spec(in_dtype: torch.dtype, out_dtype: torch.dtype) -> KernelSpec:
    """Describe the merge kernels for one pair of value types."""
    return KernelSpec(
        name=f"merge_cpu_{short_name(in_dtype)}_{short_name(out_dtype)}",
        target="cpu",
        templates=("merge_cpu.cc.j2",),
        parameters=(
            ("in_type", cpp_type(in_dtype, "cpu")),
            ("out_type", cpp_type(out_dtype, "cpu")),
        ),
    )


def _function(name: str, in_dtype: torch.dtype, out_dtype: torch.dtype) -> Callable[..., Any]:
    key = (name, in_dtype, out_dtype)
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = load(merge_spec(in_dtype, out_dtype)).get_function(name)
    return function


def merge_pair(
    *,
    v_a: torch.Tensor,
    lse_a: torch.Tensor,
    v_b: torch.Tensor,
    lse_b: torch.Tensor,
    v_out: torch.Tensor,
    lse_out: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    """Merge two states per (row, head); v_out and lse_out may be v_a and lse_a.

    Args:
        v_a: [num_rows, num_heads, head_dim], last dim contiguous; ignored where lse_a is -inf.
        lse_a: float32 [num_rows, num_heads], base 2.
        v_b: as v_a.
        lse_b: as lse_a.
        v_out: [num_rows, num_heads, head_dim], any float type; 0 where both states are empty.
        lse_out: float32 [num_rows, num_heads], -inf where both states are empty.
        mask: bool [num_rows]; rows with False are not written.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    _function("merge_pair", v_a.dtype, v_out.dtype)(
        v_a, lse_a, v_b, lse_b, v_out, lse_out, mask, torch.get_num_threads()
    )


def merge_states(
    *,
    v: torch.Tensor,
    lse: torch.Tensor,
    v_out: torch.Tensor,
    lse_out: torch.Tensor | None = None,
) -> None:
    """Merge num_states states per (row, head), in index order.

    Args:
        v: [num_rows, num_states, num_heads, head_dim], last dim contiguous.
        lse: float32 [num_rows, num_states, num_heads], base 2.
        v_out: [num_rows, num_heads, head_dim], any float type; 0 where every state is empty.
        lse_out: float32 [num_rows, num_heads], -inf where every state is empty.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    _function("merge_states", v.dtype, v_out.dtype)(v, lse, v_out, lse_out, torch.get_num_threads())
