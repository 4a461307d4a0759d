"""Divide a step's attention among workers: the host planner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from fi_backend.jit import KernelSpec, load

__all__ = ["host_plan", "plan_buffer_ints", "plan_spec", "workspace_floats"]

_functions: dict[str, Callable[..., Any]] = {}


def plan_spec() -> KernelSpec:
    """Describe the planner module."""
    return KernelSpec(name="plan_cpu", target="cpu", templates=("plan_cpu.cc.j2",))


def _function(name: str) -> Callable[..., Any]:
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = load(plan_spec()).get_function(name)
    return function


def plan_buffer_ints(*, max_reqs: int, num_workers: int) -> int:
    """Count the int32 elements that a plan of at most `max_reqs` requests needs.

    Raises:
        ValueError: max_reqs is negative or num_workers is not positive.
    """
    return int(_function("plan_buffer_ints")(max_reqs, num_workers))


def workspace_floats(*, num_workers: int, head_dim_qk: int, head_dim_vo: int) -> int:
    """Count the float32 elements of workspace that a run needs: it grows with workers alone.

    Raises:
        ValueError: an argument is not positive.
    """
    return int(_function("workspace_floats")(num_workers, head_dim_qk, head_dim_vo))


def host_plan(
    *,
    plan_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    first_pages: torch.Tensor | None = None,
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
    kept_states: int = 0,
    target: Literal["cpu", "cuda", "sm_90"] = "cpu",
) -> None:
    """Write the plan of a step into `plan_buffer`.

    Args:
        plan_buffer: int32 [plan_buffer_ints(...)], aligned to 16 bytes; written.
        qo_indptr: int32 [num_reqs + 1], first query row of each request.
        kv_lens: int32 [num_reqs], cached tokens of each request, its new ones included.
        first_pages: int32 [num_reqs], where in its page table the kv_lens of a request begin; None
            for the start.
        num_qo_heads: a multiple of num_kv_heads.
        num_kv_heads: heads of the cache.
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        q_dtype: type of q.
        kv_dtype: type of the cache. On sm_90, tiles of query rows depend on whether it is q's type.
        causal: a query sees no key after its own position.
        window_left: keys a query sees to the left of its own; -1 for all.
        num_workers: pieces to divide into, each for a thread; or, for a GPU, three for each
            multiprocessor: the many-row line is divided among a third of them.
        split: 0 cuts work anywhere; -1 never cuts a request's keys; n > 0 cuts them at multiples
            of n tokens. -1 and n make a request's bits independent of its batch mates and of
            num_workers.
        many_rows_only: give every request to the many-row kernel.
        kept_states: for the batch that groups of a step make (kernels/shared_prefix.py), states of
            query rows that there is room for, where parts of items keep states of their own; -1
            where the kernel merges them, as on the CPU. 0 for any other batch.
        target: whose kernels will run the plan. For "sm_90" it is, bit for bit, what
            :func:`fi_backend.kernels.device_plan.device_plan` writes on such a device, and for
            "cuda" what it writes on others: a length that is negative or decreases `qo_indptr` is
            empty, while for "cpu" it is an error.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape, device or value.
    """
    if target not in ("cpu", "cuda", "sm_90"):
        raise ValueError(f'target must be "cpu", "cuda" or "sm_90"; got {target!r}')
    _function("host_plan")(
        plan_buffer,
        qo_indptr,
        kv_lens,
        first_pages,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        causal,
        window_left,
        num_workers,
        split,
        many_rows_only,
        kept_states,
        target != "cpu",
        q_dtype == kv_dtype,
        target == "sm_90",
    )
