"""Divide a step's attention among thread blocks: the planner that runs on the GPU."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions
from fi_backend.kernels.mixed import planned_kernels

__all__ = ["device_plan", "partial_floats", "plan_buffer_ints", "plan_spec"]


def plan_spec() -> KernelSpec:
    """Describe the planner module."""
    return KernelSpec(
        name="plan_cuda",
        target="cuda",
        templates=("plan_cuda.cu.j2", "plan_cuda_binding.cc.j2"),
    )


_plan_buffer_ints = Functions("plan_buffer_ints", lambda _: plan_spec())
_partial_floats = Functions("partial_floats", lambda _: plan_spec())
_device_plan = Functions("device_plan", lambda _: plan_spec())


def plan_buffer_ints(*, max_reqs: int, num_workers: int) -> int:
    """Count the int32 elements that a plan of at most `max_reqs` requests needs.

    Raises:
        ValueError: max_reqs is negative or num_workers is not positive.
    """
    return int(_plan_buffer_ints[None](max_reqs, num_workers))


def partial_floats(
    *,
    head_dim_qk: int,
    head_dim_vo: int,
    num_workers: int,
    split: int,
    many_rows_only: bool,
    has_mixed: bool,
) -> int:
    """Count the float32 elements of workspace that a plan needs, whichever kernels run it.

    Args:
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        num_workers: as planned, as the next two.
        split: split > 0 needs more.
        many_rows_only: likewise.
        has_mixed: one kernel may run both lines.
    """
    return int(
        _partial_floats[None](
            head_dim_qk, head_dim_vo, num_workers, split > 0, many_rows_only, has_mixed
        )
    )


def device_plan(
    *,
    plan_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    causal: bool,
    window_left: int,
    num_workers: int,
    split: int,
    many_rows_only: bool,
    enable_pdl: bool = False,
) -> None:
    """Write the plan of a step into `plan_buffer`: one launch on the current stream.

    The lengths are read on the device when the launch runs: a graph that holds it can be replayed
    with others. A length that is negative or decreases `qo_indptr` is empty.

    Args:
        plan_buffer: int32 [plan_buffer_ints(...)] on a CUDA device, aligned to 16 bytes; written.
        qo_indptr: int32 [num_reqs + 1], first query row of each request.
        kv_lens: int32 [num_reqs], cached tokens of each request, its new ones included.
        num_qo_heads: a multiple of num_kv_heads.
        num_kv_heads: heads of the cache.
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        q_dtype: type of q.
        kv_dtype: type of the cache. Tiles of query rows depend on whether it is q's type.
        causal: a query sees no key after its own position.
        window_left: keys a query sees to the left of its own; -1 for all.
        num_workers: thread blocks of the few-row kernel that will run the plan, three for each
            multiprocessor: the many-row line is divided among a third of them.
        split: 0 cuts work anywhere; -1 never cuts a request's keys; n > 0 cuts them at multiples
            of n tokens. -1 and n make a request's bits independent of its batch mates and of
            num_workers.
        many_rows_only: give every request to the many-row kernel.
        enable_pdl: launch as a programmatic dependent of the kernel before.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device, or a wrong value that
            is not a length.
    """
    _device_plan[None](
        plan_buffer,
        qo_indptr,
        kv_lens,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        causal,
        window_left,
        num_workers,
        split,
        many_rows_only,
        q_dtype == kv_dtype,
        *planned_kernels(),
        enable_pdl,
    )
