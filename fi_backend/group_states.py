"""GroupStates: what groups of a step's query rows attend to, before each row's own keys.

Groups are a batch of their own, whose requests have many rows and no mask. Its states stay where
they are, a state for each part of the keys: the run over own keys merges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fi_backend.batch import PagedBatch
from fi_backend.kernels import attention as attention_kernels
from fi_backend.kernels import device_plan, host_plan
from fi_backend.spec import AttentionSpec, Geometry

__all__ = ["GroupStates", "max_states", "plan_ints", "state_floats"]

# Most states of rows, one for each part of the keys, where rows are not more: this bounds memory.
_MAX_STATES = 2048
_MOST_PARTS = 16  # of what a row shares: plan/kept_parts.h
_NUM_PARTS = 19  # place in a plan's header of the states that each row has: plan/work_line.h
_ALIGNMENT = 4  # floats


def max_states(rows: int) -> int:
    """Count the states that there is room for; `rows` are the query rows of all levels."""
    return min(_MOST_PARTS * rows, max(rows, _MAX_STATES))


def state_floats(geometry: Geometry, num_states: int) -> int:
    """Count the float32 elements of workspace for so many states."""
    # And some to begin at a multiple of 16 bytes.
    return num_states * geometry.num_qo_heads * (geometry.head_dim_vo + 1) + _ALIGNMENT


def plan_ints(num_groups: int, num_workers: int, device: torch.device) -> int:
    """Count the int32 elements of a plan for so many places of groups."""
    planner = host_plan if device.type == "cpu" else device_plan
    return planner.plan_buffer_ints(max_reqs=num_groups, num_workers=num_workers)


class Groups(Protocol):
    """The batch that groups make; int32 tensors."""

    @property
    def group_indptr(self) -> torch.Tensor:
        """[num_groups + 1], first row of each group."""

    @property
    def group_lens(self) -> torch.Tensor:
        """[num_groups], keys of each."""

    @property
    def group_tables(self) -> torch.Tensor:
        """[num_groups + 1], place of its first page in the list of pages."""

    @property
    def q_rows(self) -> torch.Tensor:
        """[*], row of q of each row."""


@dataclass(frozen=True, kw_only=True)
class GroupStates:
    """The plan of a batch of groups, and the states that its runs leave.

    Attributes:
        batch: the step.
        pages: int32 [*], page ids of groups, in one list.
        groups: the batch that they make.
        group_plan: int32, the plan.
        partials: float32 workspace of the attention kernels.
        prior_out: float32 [max_states, num_qo_heads, head_dim_vo], states of groups' rows.
        prior_lse: float32 [max_states, num_qo_heads].
        prior_parts: int32 [1], states of each row, in the plan.
        kernels: what computes those.
    """

    batch: PagedBatch
    pages: torch.Tensor
    groups: Groups
    group_plan: torch.Tensor
    partials: torch.Tensor
    prior_out: torch.Tensor
    prior_lse: torch.Tensor
    prior_parts: torch.Tensor
    kernels: Any

    @staticmethod
    def memory(
        spec: AttentionSpec,
        *,
        num_groups: int,
        num_states: int,
        num_workers: int,
        workspace: torch.Tensor,
    ) -> dict[str, Any]:
        """Allocate the attributes above.

        Args:
            spec: the layer.
            num_groups: places of groups.
            num_states: states of rows that there is room for.
            num_workers: as planned.
            workspace: float32 scratch; states take state_floats() at its end, what is before is
                left to the attention kernels.
        """
        geometry, device = spec.geometry, workspace.device
        heads, head_dim = geometry.num_qo_heads, geometry.head_dim_vo
        first = workspace.numel() - state_floats(geometry, num_states) + _ALIGNMENT
        first -= first % _ALIGNMENT
        values, lse = workspace[first:][: num_states * heads * (head_dim + 1)].split(
            [num_states * heads * head_dim, num_states * heads]
        )
        group_plan = torch.empty(
            plan_ints(num_groups, num_workers, device), dtype=torch.int32, device=device
        )
        return dict(
            group_plan=group_plan,
            partials=workspace[:first],
            prior_out=values.view(num_states, heads, head_dim),
            prior_lse=lse.view(num_states, heads),
            prior_parts=group_plan[_NUM_PARTS : _NUM_PARTS + 1],
            kernels=attention_kernels.load_groups(device_type=device.type, **spec.kernel_types),
        )

    @property
    def own_keys(self) -> dict[str, torch.Tensor]:
        """What runs over each request's own keys take instead of the step's, and besides."""
        raise NotImplementedError

    def plan_on_host(self, geometry: Geometry, plan_buffer: torch.Tensor, num_workers: int) -> None:
        """Plan the step without what groups have, and the batch of groups.

        Args:
            geometry: of the layers.
            plan_buffer: the step's plan; written.
            num_workers: workers of both plans.
        """
        common: dict[str, Any] = dict(
            num_qo_heads=geometry.num_qo_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim_qk=geometry.head_dim_qk,
            head_dim_vo=geometry.head_dim_vo,
            q_dtype=geometry.q_dtype,
            kv_dtype=geometry.kv_dtype,
            num_workers=num_workers,
            split=0,
        )
        host_plan.host_plan(
            plan_buffer=plan_buffer,
            qo_indptr=self.batch.qo_indptr,
            kv_lens=self.own_keys["kv_lens"],
            first_pages=self.own_keys.get("first_pages"),
            causal=geometry.causal,
            window_left=geometry.window_left,
            many_rows_only=False,
            **common,
        )
        host_plan.host_plan(
            plan_buffer=self.group_plan,
            qo_indptr=self.groups.group_indptr,
            kv_lens=self.groups.group_lens,
            causal=False,
            window_left=-1,
            many_rows_only=True,
            kept_states=-1,
            **common,
        )

    def run(
        self,
        launch: Callable[..., None] | None,
        *,
        spec: AttentionSpec,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        k_scale: float | torch.Tensor,
        num_workers: int,
    ) -> dict[str, torch.Tensor]:
        """Compute the states of groups' rows; return what the run over own keys needs of them.

        Args:
            launch: stands in for the kernels' run().
            spec: the layer.
            q: as PagedAttention.run() has it, as all below.
            kv_cache: as there.
            k_scale: as there.
            num_workers: as planned.
        """
        groups = self.groups
        (launch or self.kernels.run)(
            plan_buffer=self.group_plan,
            partials=self.partials,
            q=q,
            k_cache=kv_cache[0],
            v_cache=kv_cache[1],
            out=self.prior_out,
            lse=self.prior_lse,
            qo_indptr=groups.group_indptr,
            kv_lens=groups.group_lens,
            page_indptr=groups.group_tables,
            page_indices=self.pages,
            block_table=None,
            request_rows=None,
            max_qo_len=None,
            alibi_slopes=None,
            sinks=None,
            custom_mask=None,
            mask_indptr=None,
            q_rows=groups.q_rows,
            k_scale=k_scale,
            v_scale=1.0,
            sm_scale=spec.sm_scale,
            logits_soft_cap=spec.logits_soft_cap,
            window_left=-1,
            causal=False,
            rope_scale=1.0,
            rope_theta=0.0,
            num_workers=num_workers,
            members=(),
        )
        prior = dict(
            prior_out=self.prior_out, prior_lse=self.prior_lse, prior_parts=self.prior_parts
        )
        return prior | self.own_keys
