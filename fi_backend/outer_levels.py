"""OuterLevels: keys that groups of a step's query rows have in common, as a caller tells.

A plan with some computes the states of all rows over these first, as a batch of its own, and runs
merge them with each row's own keys, as those of pages that a plan finds to be shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fi_backend.batch import PagedBatch
from fi_backend.group_states import GroupStates, max_states, state_floats
from fi_backend.kernels.outer_levels import (
    LevelGroups,
    LevelTable,
    level_plan,
    write_outer_levels,
)
from fi_backend.spec import AttentionSpec, Geometry

__all__ = ["MAX_OUTER_LEVELS", "OuterLevels", "OuterStates", "outer_floats"]

MAX_OUTER_LEVELS = 2


@dataclass(frozen=True)
class OuterLevels:
    """Keys before those of a step's requests, in one or two levels.

    Attributes:
        levels: the outer one first. The requests of each are groups of rows of the step, which lie
            one after the other and have all of its rows; every row sees all keys of its groups.
        max_rows: most query rows of a step.
    """

    levels: tuple[PagedBatch, ...]
    max_rows: int

    @property
    def num_rows(self) -> int:
        """Most rows of all levels."""
        return len(self.levels) * self.max_rows

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each level."""
        return tuple(level.num_requests for level in self.levels)

    def check(self, spec: AttentionSpec, batch: PagedBatch) -> None:
        """Refuse what a plan of `batch` for a layer `spec` cannot have.

        Raises:
            TypeError, ValueError: a tensor has a wrong dtype, shape or device, or there are too
                many levels.
        """
        if not 1 <= len(self.levels) <= MAX_OUTER_LEVELS:
            raise ValueError(
                f"outer.levels must be 1 to {MAX_OUTER_LEVELS} batches; got {len(self.levels)}"
            )
        if not spec.geometry.may_share or spec.window_left >= 0:
            raise ValueError(
                "outer must be None where logits depend on positions (ALiBi, masks, windows, rope, "
                "variants) and with batch_invariant"
            )
        if not any(self.num_groups):
            raise ValueError("outer.levels must have a request, which all rows are in; got none")
        for level in self.levels:
            level.validate(spec.page_size)
            if level.device != batch.device or level.page_indices is None:
                raise ValueError(
                    f"outer.levels must have page_indices on {batch.device}; got a batch on "
                    f"{level.device}, page_indices {level.page_indices is not None}"
                )
        ends = [int(b.qo_indptr[-1]) for b in (batch, *self.levels) if b.qo_indptr.is_cpu]
        if len(set(ends)) > 1 or max(ends, default=0) > self.max_rows:
            raise ValueError(
                f"outer.levels must have the rows of the step, at most {self.max_rows}; got "
                f"qo_indptr[-1] {ends}, that of the step first"
            )


def outer_floats(geometry: Geometry, outer: OuterLevels) -> int:
    """Count the float32 elements of workspace for the states of rows."""
    return state_floats(geometry, max_states(outer.num_rows))


@dataclass(frozen=True, kw_only=True)
class OuterStates(GroupStates):
    """The batch that a step's outer levels make, and its states.

    Attributes:
        outer: the step's levels.
        groups: the batch.
        first_rows: int32 [num_requests], each request's first row among those of a level.
    """

    outer: OuterLevels
    groups: LevelGroups
    first_rows: torch.Tensor
    is_active: ClassVar[bool] = True

    @classmethod
    def allocate(
        cls,
        spec: AttentionSpec,
        batch: PagedBatch,
        outer: OuterLevels,
        num_workers: int,
        workspace: torch.Tensor,
    ) -> OuterStates:
        """Allocate for a step.

        Args:
            spec: the layer.
            batch: the step.
            outer: its levels, checked.
            num_workers: as planned.
            workspace: float32 scratch, outer_floats() of it for states, the rest for the kernels.
        """
        groups = LevelGroups.empty(outer.num_groups, outer.max_rows, batch.device)
        return cls(
            batch=batch,
            outer=outer,
            pages=_page_list(outer, None),
            groups=groups,
            first_rows=batch.qo_indptr[:-1],
            **cls.memory(
                spec,
                num_groups=groups.group_lens.shape[0],
                num_states=max_states(outer.num_rows),
                num_workers=num_workers,
                workspace=workspace,
            ),
        )

    def serves(self, outer: OuterLevels) -> bool:
        """Whether this has memory for levels: they have the sizes of those it was made for."""
        mine = self.outer
        return (mine.num_groups, mine.max_rows) == (outer.num_groups, outer.max_rows)

    def of(self, batch: PagedBatch, outer: OuterLevels) -> OuterStates:
        """Return what another step, whose levels this serves, uses of the same memory."""
        pages = _page_list(outer, self.pages)
        return replace(self, batch=batch, outer=outer, pages=pages, first_rows=batch.qo_indptr[:-1])

    def plan(self, geometry: Geometry, plan_buffer: torch.Tensor, num_workers: int) -> None:
        """Make the batch of groups, and plan the step and that batch.

        Args:
            geometry: of the layers.
            plan_buffer: the step's plan; written.
            num_workers: workers of both plans.
        """
        batch, groups = self.batch, self.groups
        step: dict[str, Any] = dict(
            qo_indptr=batch.qo_indptr,
            levels=[_table(level) for level in self.outer.levels],
        )
        common: dict[str, Any] = dict(
            num_qo_heads=geometry.num_qo_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim_qk=geometry.head_dim_qk,
            head_dim_vo=geometry.head_dim_vo,
            q_dtype=geometry.q_dtype,
            kv_dtype=geometry.kv_dtype,
            num_workers=num_workers,
        )
        if not batch.qo_indptr.is_cpu:
            level_plan(
                groups,
                plan_buffer=plan_buffer,
                group_plan=self.group_plan,
                group_states=self.prior_lse.shape[0],
                kv_lens=batch.kv_lens,
                causal=geometry.causal,
                **step,
                **common,
            )
            return
        write_outer_levels(groups, **step)
        self.plan_on_host(geometry, plan_buffer, num_workers)

    @property
    def own_keys(self) -> dict[str, torch.Tensor]:
        """See GroupStates."""
        return dict(kv_lens=self.batch.kv_lens, first_rows=self.first_rows)


def _pages_of(level: PagedBatch) -> torch.Tensor:
    assert level.page_indices is not None
    return level.page_indices


def _table(level: PagedBatch) -> LevelTable:
    assert level.page_indptr is not None
    num_pages = _pages_of(level).shape[0]
    return LevelTable(level.qo_indptr, level.kv_lens, level.page_indptr, num_pages)


def _page_list(outer: OuterLevels, old: torch.Tensor | None) -> torch.Tensor:
    """Return the page ids of all levels as one list, in the memory of an earlier one if it fits."""
    pages = [_pages_of(level) for level in outer.levels]
    if len(pages) == 1:
        return pages[0]
    if old is not None and old.shape[0] == sum(ids.shape[0] for ids in pages):
        with torch.inference_mode():  # in which the earlier one may have been made
            return torch.cat(pages, out=old)
    return torch.cat(pages)
