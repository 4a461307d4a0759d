"""Make a batch of groups of the levels of keys that a caller gives: on the host or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fi_backend.kernels.device_plan import plan_spec as device_plan_spec
from fi_backend.kernels.functions import Functions
from fi_backend.kernels.host_plan import plan_spec as host_plan_spec
from fi_backend.kernels.mixed import planned_kernels

__all__ = ["LevelGroups", "LevelTable", "level_plan", "write_outer_levels"]

_write = Functions("write_outer_levels", lambda _: host_plan_spec())
_level_plan = Functions("level_plan", lambda _: device_plan_spec())
_num_places = Functions(
    "num_group_places", lambda device: device_plan_spec() if device == "cuda" else host_plan_spec()
)


class LevelTable(NamedTuple):
    """Groups of a level. All tensors are int32.

    Attributes:
        qo_indptr: [num_groups + 1], first row of each group; groups lie one after the other.
        kv_lens: [num_groups], keys of each.
        page_indptr: [num_groups + 1], first entry of each in the level's page list.
        num_pages: entries of that list.
    """

    qo_indptr: torch.Tensor
    kv_lens: torch.Tensor
    page_indptr: torch.Tensor
    num_pages: int


@dataclass(frozen=True)
class LevelGroups:
    """The batch that levels make (csrc/include/fi_backend/plan/outer_levels.h); int32 tensors.

    Attributes:
        group_indptr: [places + 1], first row of each group; places without one have no rows.
        group_lens: [places], keys of each.
        group_tables: [places + 1], place of its first page in the lists of all levels, one after
            the other.
        q_rows: [levels * max_rows], row of q of each row.
    """

    group_indptr: torch.Tensor
    group_lens: torch.Tensor
    group_tables: torch.Tensor
    q_rows: torch.Tensor

    @classmethod
    def empty(cls, num_groups: Sequence[int], max_rows: int, device: torch.device) -> LevelGroups:
        """Allocate for levels of so many groups.

        Args:
            num_groups: of each level, one or two.
            max_rows: most query rows of a step.
            device: where steps are planned.
        """
        places = int(_num_places[device.type](num_groups[0], sum(num_groups[1:])))
        sizes = (places + 1, places, places + 1, len(num_groups) * max_rows)
        return cls(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors, in order."""
        return self.group_indptr, self.group_lens, self.group_tables, self.q_rows


def _arguments(levels: Sequence[LevelTable]) -> tuple[Any, ...]:
    second: tuple[Any, ...] = levels[1][:3] if len(levels) > 1 else (None, None, None)
    return (*levels[0][:3], *second, levels[0].num_pages)


def write_outer_levels(
    groups: LevelGroups, *, qo_indptr: torch.Tensor, levels: Sequence[LevelTable]
) -> None:
    """Write the batch of groups, on the host.

    Args:
        groups: for these levels; written.
        qo_indptr: int32 [num_reqs + 1], first query row of each request of the step. Levels have
            all of its rows: a level's first and last group take those that no other has.
        levels: one or two, the outer one first.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    _write[None](qo_indptr, *_arguments(levels), *groups.tensors())


def level_plan(
    groups: LevelGroups,
    *,
    plan_buffer: torch.Tensor,
    group_plan: torch.Tensor,
    group_states: int,
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    levels: Sequence[LevelTable],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    causal: bool,
    num_workers: int,
    enable_pdl: bool = False,
) -> None:
    """Write the batch of groups on a GPU, and plan it and the step: one launch, nothing read back.

    What it writes is what :func:`write_outer_levels` and the host planner write; of the group plan
    that holds for the many-row line.

    Args:
        groups: for these levels, on a CUDA device; written.
        plan_buffer: int32 [plan_buffer_ints(...)] on the device, as all tensors; written.
        group_plan: the same for the batch of groups, whose requests have many rows and no mask.
        group_states: states of rows that there is room for: parts of items keep states of their
            own.
        qo_indptr: as there.
        kv_lens: int32 [num_reqs], keys of each request behind those of the levels.
        levels: as there.
        num_qo_heads: a multiple of num_kv_heads.
        num_kv_heads: heads of the cache.
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        q_dtype: type of q.
        kv_dtype: type of the cache.
        causal: a query sees no key of its request after its own position.
        num_workers: thread blocks that will run the plan.
        enable_pdl: launch as a programmatic dependent of the kernel before.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device, or a wrong value that
            is not a length.
    """
    _level_plan[None](
        plan_buffer,
        group_plan,
        qo_indptr,
        kv_lens,
        *_arguments(levels),
        *groups.tensors(),
        group_states,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        causal,
        num_workers,
        q_dtype == kv_dtype,
        *planned_kernels(),
        enable_pdl,
    )
