"""Merge attention states (v, lse) over disjoint sets of keys."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.dtypes import cpp_type, short_name
from fi_backend.kernels.functions import Functions, cuda_spec

__all__ = ["merge_cuda_spec", "merge_pair", "merge_spec", "merge_states"]

# Nothing here lets a caller ask for a programmatic dependent launch.
_ENABLE_PDL = False


def merge_spec(in_dtype: torch.dtype, out_dtype: torch.dtype) -> KernelSpec:
    """Describe the CPU module for one pair of value types."""
    return KernelSpec(
        name=f"merge_cpu_{short_name(in_dtype)}_{short_name(out_dtype)}",
        target="cpu",
        templates=("merge_cpu.cc.j2",),
        parameters=(
            ("in_type", cpp_type(in_dtype, "cpu")),
            ("out_type", cpp_type(out_dtype, "cpu")),
        ),
    )


def merge_cuda_spec(in_dtype: torch.dtype, out_dtype: torch.dtype) -> KernelSpec:
    """Describe the CUDA module for one pair of value types."""
    return cuda_spec("merge", {"in": in_dtype, "out": out_dtype})


_merge_pair = Functions("merge_pair", lambda dtypes: merge_spec(*dtypes))
_merge_states = Functions("merge_states", lambda dtypes: merge_spec(*dtypes))
_merge_pair_cuda = Functions("merge_pair", lambda dtypes: merge_cuda_spec(*dtypes))
_merge_states_cuda = Functions("merge_states", lambda dtypes: merge_cuda_spec(*dtypes))


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

    On CUDA this is one launch on the current stream.

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
    dtypes = v_a.dtype, v_out.dtype
    option: int
    if v_a.is_cuda:
        run, option = _merge_pair_cuda[dtypes], _ENABLE_PDL
    else:
        run, option = _merge_pair[dtypes], torch.get_num_threads()
    run(v_a, lse_a, v_b, lse_b, v_out, lse_out, mask, option)


def merge_states(
    *,
    v: torch.Tensor,
    lse: torch.Tensor,
    v_out: torch.Tensor,
    lse_out: torch.Tensor | None = None,
) -> None:
    """Merge num_states states per (row, head), in index order.

    On CUDA this is one launch on the current stream.

    Args:
        v: [num_rows, num_states, num_heads, head_dim], last dim contiguous.
        lse: float32 [num_rows, num_states, num_heads], base 2.
        v_out: [num_rows, num_heads, head_dim], any float type; 0 where every state is empty.
        lse_out: float32 [num_rows, num_heads], -inf where every state is empty.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    dtypes = v.dtype, v_out.dtype
    option: int
    if v.is_cuda:
        run, option = _merge_states_cuda[dtypes], _ENABLE_PDL
    else:
        run, option = _merge_states[dtypes], torch.get_num_threads()
    run(v, lse, v_out, lse_out, option)
