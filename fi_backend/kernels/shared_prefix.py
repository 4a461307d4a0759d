"""Find requests whose page tables begin with the same pages: on the host, or in a plan's launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fi_backend.kernels.device_plan import plan_spec as device_plan_spec
from fi_backend.kernels.functions import Functions
from fi_backend.kernels.host_plan import plan_spec as host_plan_spec
from fi_backend.kernels.mixed import planned_kernels

__all__ = ["Groups", "find_shared_prefixes", "max_shared_groups", "shared_plan"]


def _functions(name: str) -> Callable[..., Any]:
    by_device = Functions(
        name, lambda device: device_plan_spec() if device == "cuda" else host_plan_spec()
    )
    return by_device.__getitem__


_find = Functions("find_shared_prefixes", lambda _: host_plan_spec())
_shared_plan = Functions("shared_plan", lambda _: device_plan_spec())
_max_shared_groups = _functions("max_shared_groups")
_scratch_ints = _functions("shared_prefix_scratch_ints")


@dataclass(frozen=True)
class Groups:
    """Requests of a step that share pages: what a search writes. All tensors are int32.

    Attributes:
        own_lens: [num_reqs], keys that each request attends to by itself.
        first_pages: [num_reqs], pages of its table before those; 0 for requests of no group.
        first_rows: [num_reqs], its first row among those of a level.
        group_indptr: [max_shared_groups + 1], first row of each group, of two levels one after the
            other (csrc/include/fi_backend/plan/group_rows.h); groups that do not exist have no
            rows.
        group_lens: [max_shared_groups], keys that all of a group share.
        group_tables: [max_shared_groups + 1], where its pages are listed: a place in page_indices,
            or in the block table as if its rows were one.
        q_rows: [2 * max_rows], row of q of each row.
        scratch: for searches alone.
    """

    own_lens: torch.Tensor
    first_pages: torch.Tensor
    first_rows: torch.Tensor
    group_indptr: torch.Tensor
    group_lens: torch.Tensor
    group_tables: torch.Tensor
    q_rows: torch.Tensor
    scratch: torch.Tensor

    @staticmethod
    def _sizes(num_requests: int, max_rows: int, device_type: str) -> list[int]:
        groups = max_shared_groups(num_requests, device_type)
        scratch = _scratch_ints(device_type)(num_requests)
        return [num_requests] * 3 + [groups + 1, groups, groups + 1, 2 * max_rows, scratch]

    @classmethod
    def num_ints(cls, num_requests: int, max_rows: int, device_type: str) -> int:
        """Count the elements that empty() allocates: each tensor begins at 16 bytes."""
        return sum(-(-size // 4) * 4 for size in cls._sizes(num_requests, max_rows, device_type))

    @classmethod
    def empty(cls, num_requests: int, max_rows: int, device: torch.device) -> Groups:
        """Allocate the tensors for steps of up to `num_requests`.

        Args:
            num_requests: most requests of a step.
            max_rows: room for query rows of groups of a level; those that do not fit are not
                formed.
            device: where steps are planned.
        """
        sizes = cls._sizes(num_requests, max_rows, device.type)
        ints = cls.num_ints(num_requests, max_rows, device.type)
        # The scratch has a counter, which begins at 0.
        memory = torch.zeros(ints, dtype=torch.int32, device=device)
        parts = memory.split([-(-size // 4) * 4 for size in sizes])
        return cls(*(part[:size] for part, size in zip(parts, sizes, strict=True)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors, in order."""
        return (
            self.own_lens,
            self.first_pages,
            self.first_rows,
            self.group_indptr,
            self.group_lens,
            self.group_tables,
            self.q_rows,
            self.scratch,
        )

    def of(self, num_requests: int) -> Groups:
        """Return the parts of the tensors that a step of fewer requests uses."""
        max_rows, device_type = self.q_rows.shape[0] // 2, self.own_lens.device.type
        sizes = self._sizes(num_requests, max_rows, device_type)
        return Groups(*(x[:size] for x, size in zip(self.tensors(), sizes, strict=True)))


def max_shared_groups(num_requests: int, device_type: str) -> int:
    """Count the places for groups of so many requests."""
    return int(_max_shared_groups(device_type)(num_requests))


def find_shared_prefixes(
    groups: Groups,
    *,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    request_rows: torch.Tensor | None = None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    window_left: int,
    min_tokens: int,
    worth_keys: int,
    for_cuda: bool = False,
) -> None:
    """Group the few-row requests of a step that begin with the same pages, on the host.

    What several groups have in common is another group's, and theirs is what comes behind it.
    Pages are shared that are full and hold keys of no query row of the step; requests of which a
    window hides a key share none.

    Args:
        groups: for as many requests; written.
        qo_indptr: int32 [num_reqs + 1], first query row of each request.
        kv_lens: int32 [num_reqs], cached tokens of each request, its new ones included.
        page_indptr: int32 [num_reqs + 1], with page_indices the CSR page table.
        page_indices: int32 [page_indptr[-1]].
        block_table: int32 [*, max_pages], the other form of page table.
        request_rows: int32 or int64 [num_reqs], each request's row of block_table.
        page_size: tokens a page holds.
        num_qo_heads: a multiple of num_kv_heads.
        num_kv_heads: heads of the cache.
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        window_left: keys a query sees to the left of its own; -1 for all.
        min_tokens: what a group has in common at least.
        worth_keys: keys, over all heads of the cache, that the groups of a step must save it from
            reading, and twice as many for 352 query rows; else there are none. What groups have
            in common is shared if that saves as many for 352 rows.
        for_cuda: write what a GPU would.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device, or a wrong value that
            is not a length.
    """
    _find[None](
        qo_indptr,
        kv_lens,
        page_indptr,
        page_indices,
        block_table,
        request_rows,
        page_size,
        *groups.tensors(),
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        window_left,
        min_tokens,
        worth_keys,
        for_cuda,
    )


def shared_plan(
    groups: Groups,
    *,
    plan_buffer: torch.Tensor,
    group_plan: torch.Tensor,
    group_states: int,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    request_rows: torch.Tensor | None = None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    causal: bool,
    window_left: int,
    num_workers: int,
    min_tokens: int,
    worth_keys: int,
    enable_pdl: bool = False,
) -> None:
    """Group a step's requests on a GPU, and plan the step and the batch that its groups make.

    This is one launch on the current stream, whose shape depends on the number of requests and of
    workers alone. What it writes is what :func:`find_shared_prefixes`, and the host planner with
    the lengths that this finds, write; of group_plan that holds only where there are groups.

    Args:
        groups: for as many requests, on a CUDA device, all zeros before its first use; written.
        plan_buffer: int32 [plan_buffer_ints(...)] on the device, as all tensors; written.
        group_plan: the same for the batch of groups, whose requests have many rows and no mask.
        group_states: states of rows that there is room for: parts of items keep states of their
            own.
        qo_indptr: as for find_shared_prefixes().
        kv_lens: as there.
        page_indptr: as there.
        page_indices: as there.
        block_table: as there.
        request_rows: as there.
        page_size: as there.
        num_qo_heads: as there.
        num_kv_heads: as there.
        head_dim_qk: as there.
        head_dim_vo: as there.
        q_dtype: type of q.
        kv_dtype: type of the cache.
        causal: a query sees no key after its own position.
        window_left: as there.
        num_workers: thread blocks that will run the plan.
        min_tokens: as there.
        worth_keys: as there.
        enable_pdl: launch as a programmatic dependent of the kernel before.

    Raises:
        TypeError, ValueError: as there.
    """
    _shared_plan[None](
        plan_buffer,
        group_plan,
        qo_indptr,
        kv_lens,
        page_indptr,
        page_indices,
        block_table,
        request_rows,
        page_size,
        *groups.tensors(),
        group_states,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        causal,
        window_left,
        num_workers,
        min_tokens,
        worth_keys,
        q_dtype == kv_dtype,
        *planned_kernels(),
        enable_pdl,
    )
