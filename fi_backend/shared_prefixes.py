"""SharedPrefixes: pages that requests of a step have in common, attended to once.

A plan that looks for them has one. Runs then compute the states of each group's rows over the keys
that its requests share, as a batch of its own, and put them before each row's own keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fi_backend.batch import PagedBatch
from fi_backend.group_states import GroupStates, max_states, plan_ints, state_floats
from fi_backend.kernels.shared_prefix import (
    Groups,
    find_shared_prefixes,
    max_shared_groups,
    shared_plan,
)
from fi_backend.spec import AttentionSpec, Geometry

__all__ = ["SharedPrefixes", "are_looked_for", "shared_bytes", "shared_floats"]

# Fewer requests save too little to pay for another launch in every layer.
FEWEST_REQUESTS = 16
# What groups have in common at least: templates of prompts have some tokens in common, no more.
MIN_TOKENS = 256
# Keys, of all kv heads, that a GPU reads in the time that groups cost a layer, out of the L2 cache,
# where what many share mostly is: docs/shared-prefix-notes.md.
WORTH_KEYS = 7 << 16
_MAX_ROWS = 1024  # of queries, of groups: this bounds memory
_FEW_ROWS = 32  # packed rows of a request that may share


def _max_rows(geometry: Geometry, max_requests: int) -> int:
    group_size = geometry.num_qo_heads // geometry.num_kv_heads
    return min(_MAX_ROWS, max_requests * max(1, _FEW_ROWS // group_size))


def are_looked_for(batch: PagedBatch) -> bool:
    """Whether a step has a page table, and enough requests for shared pages to pay."""
    table = batch.block_table
    # Groups have int32 places in the table.
    has_table = batch.page_indices is not None if table is None else _span(table) < 1 << 31
    return has_table and batch.num_requests >= FEWEST_REQUESTS


def _span(table: torch.Tensor) -> int:
    """Count the elements from the first to the last of a block table."""
    rows, width = table.shape
    return (rows - 1) * table.stride(0) + width


def _page_list(batch: PagedBatch) -> torch.Tensor:
    """Return the step's page table as one list."""
    if batch.block_table is None:
        assert batch.page_indices is not None
        return batch.page_indices
    return batch.block_table.as_strided((_span(batch.block_table),), (1,))


def shared_floats(geometry: Geometry, max_requests: int) -> int:
    """Count the float32 elements of workspace for the states of groups' rows."""
    return state_floats(geometry, max_states(_max_rows(geometry, max_requests)))


def shared_bytes(
    geometry: Geometry, max_requests: int, num_workers: int, device: torch.device
) -> int:
    """Count the bytes that steps of up to so many requests need, workspace included."""
    groups = Groups.num_ints(max_requests, _max_rows(geometry, max_requests), device.type)
    plan = plan_ints(max_shared_groups(max_requests, device.type), num_workers, device)
    return 4 * (groups + plan + shared_floats(geometry, max_requests))


@dataclass(frozen=True, kw_only=True)
class SharedPrefixes(GroupStates):
    """What requests of a step share, as its plan found it.

    Attributes:
        is_active: whether the step is looked at.
        groups: what the search writes.
        capacity: as `groups`, for the largest step.
    """

    is_active: bool
    groups: Groups
    capacity: Groups

    @classmethod
    def allocate(
        cls, spec: AttentionSpec, batch: PagedBatch, num_workers: int, workspace: torch.Tensor
    ) -> SharedPrefixes:
        """Allocate for steps of up to the batch's requests.

        Args:
            spec: the layer.
            batch: the step.
            num_workers: as planned.
            workspace: float32 scratch; states of groups' rows take shared_floats() at its end, what
                is before is left to the attention kernels.
        """
        requests, rows = batch.num_requests, _max_rows(spec.geometry, batch.num_requests)
        groups = Groups.empty(requests, rows, batch.device)
        return cls(
            batch=batch,
            is_active=True,
            pages=_page_list(batch),
            groups=groups,
            capacity=groups,
            **cls.memory(
                spec,
                num_groups=groups.group_lens.shape[0],
                num_states=max_states(rows),
                num_workers=num_workers,
                workspace=workspace,
            ),
        )

    @property
    def max_requests(self) -> int:
        """Most requests of a step that this serves."""
        return self.capacity.own_lens.shape[0]

    def of(self, batch: PagedBatch) -> SharedPrefixes:
        """Return what another step of up to max_requests uses of the same memory."""
        requests = batch.num_requests
        groups = self.groups
        if groups.own_lens.shape[0] != requests:
            groups = self.capacity.of(requests)
        if not are_looked_for(batch):
            return replace(self, batch=batch, is_active=False, groups=groups)
        pages = _page_list(batch)
        return replace(self, batch=batch, is_active=True, pages=pages, groups=groups)

    def plan(self, geometry: Geometry, plan_buffer: torch.Tensor, num_workers: int) -> None:
        """Find the step's groups, and plan the step and the batch that they make.

        Args:
            geometry: of the layers.
            plan_buffer: the step's plan; written.
            num_workers: workers of both plans.
        """
        batch, groups = self.batch, self.groups
        heads: dict[str, Any] = dict(
            num_qo_heads=geometry.num_qo_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim_qk=geometry.head_dim_qk,
            head_dim_vo=geometry.head_dim_vo,
        )
        types: dict[str, Any] = dict(q_dtype=geometry.q_dtype, kv_dtype=geometry.kv_dtype)
        search: dict[str, Any] = dict(
            qo_indptr=batch.qo_indptr,
            kv_lens=batch.kv_lens,
            page_indptr=batch.page_indptr,
            page_indices=batch.page_indices,
            block_table=batch.block_table,
            request_rows=batch.request_rows,
            page_size=geometry.page_size,
            window_left=geometry.window_left,
            min_tokens=MIN_TOKENS,
            worth_keys=WORTH_KEYS,
            **heads,
        )
        if not batch.qo_indptr.is_cpu:
            shared_plan(
                groups,
                plan_buffer=plan_buffer,
                group_plan=self.group_plan,
                group_states=self.prior_lse.shape[0],
                causal=geometry.causal,
                num_workers=num_workers,
                **search,
                **types,
            )
            return
        find_shared_prefixes(groups, **search)
        self.plan_on_host(geometry, plan_buffer, num_workers)

    @property
    def own_keys(self) -> dict[str, torch.Tensor]:
        """See GroupStates."""
        groups = self.groups
        return dict(
            kv_lens=groups.own_lens,
            first_pages=groups.first_pages,
            first_rows=groups.first_rows,
        )
