"""SGLang's batch of one step -> the page tables and plans that our layers read.

Everything is computed on the device: no length is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fi_backend import AttentionSpec, PagedBatch, Plan, Workspace, plan
from fi_backend.integrations.sglang.layer import BoundLayer

__all__ = ["DraftStep", "FIMetadata", "QueryRows", "StepRows"]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which query rows and keys each request of a step has.

    Attributes:
        qo_indptr: int32 [num_rows + 1], first query row of each request, or branch of one.
        max_qo_len: most query rows of a request; None if it may have any number.
        request_rows: int32 or int64 [num_requests], row of SGLang's token table.
        seq_lens: int32 or int64 [num_requests].
        extra_tokens: keys of every request beyond its seq_len.
        num_branches: rows of the page table for each request; 1 but for a tree of drafts.
        branch_tokens: room in the token table for the keys of each branch.
    """

    qo_indptr: torch.Tensor
    max_qo_len: int | None
    request_rows: torch.Tensor
    seq_lens: torch.Tensor
    extra_tokens: int
    num_branches: int = 1
    branch_tokens: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the page table."""
        return self.request_rows.shape[0] * self.num_branches


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One of the steps in which a draft model decodes.

    Attributes:
        index: drafts of each branch that are in the cache before this step.
        num_branches: branches of each request.
        num_steps: room for the drafts of each branch in the token table.
    """

    index: int
    num_branches: int
    num_steps: int


class QueryRows:
    """Makes the StepRows of SGLang's batches.

    Args:
        device: where the steps run.
        draft_step: which of a draft model's steps the decode steps are; None if they are not.
    """

    def __init__(self, device: torch.device, draft_step: DraftStep | None = None) -> None:
        self._device = device
        self._draft_step = draft_step
        self._uniform: dict[int, torch.Tensor] = {}

    def of(self, batch: Any, qo_indptr: torch.Tensor | None = None) -> StepRows:
        """Describe a step.

        Args:
            batch: a ForwardBatch, or the namespace that SGLang shows in its place when it replays a
                graph; forward_mode, batch_size, req_pool_indices, seq_lens and spec_info are read,
                and extend_seq_lens of a prefill.
            qo_indptr: int32 [>= num_requests + 1], written by a prefill; a new tensor if None.
        """
        num_requests = batch.batch_size
        mode = batch.forward_mode
        step = self._draft_step if mode.is_decode_or_idle() else None
        num_branches = 1 if step is None else step.num_branches
        extra_tokens = 0 if step is None else step.index + 1
        rows_each: int | None = None
        if mode.is_decode_or_idle():
            rows_each = 1
        elif mode.is_target_verify():
            # The drafts are in the cache already, but not in seq_lens.
            rows_each = extra_tokens = batch.spec_info.draft_token_num
        elif mode.is_draft_extend_v2() and batch.spec_info.num_tokens_per_req > 0:
            rows_each = batch.spec_info.num_tokens_per_req
        if rows_each is None:
            indptr = self._offsets(batch.extend_seq_lens[:num_requests], qo_indptr)
        else:
            indptr = self._same_for_all(rows_each, num_requests * num_branches)
        return StepRows(
            qo_indptr=indptr,
            max_qo_len=rows_each,
            request_rows=batch.req_pool_indices[:num_requests],
            seq_lens=batch.seq_lens[:num_requests],
            extra_tokens=extra_tokens,
            num_branches=num_branches,
            branch_tokens=0 if step is None else step.num_steps,
        )

    def _offsets(self, lens: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        num_requests = lens.shape[0]
        if out is None:
            out = torch.empty(num_requests + 1, dtype=torch.int32, device=self._device)
        out[:1].zero_()
        torch.cumsum(lens, 0, dtype=torch.int32, out=out[1 : num_requests + 1])
        return out[: num_requests + 1]

    def _same_for_all(self, num_rows: int, num_requests: int) -> torch.Tensor:
        """Return the offsets of requests with `num_rows` rows each, at an address that stays."""
        found = self._uniform.get(num_rows)
        if found is None or found.shape[0] <= num_requests:
            size = max(1024, 2 * num_requests)
            found = torch.arange(size, dtype=torch.int32, device=self._device) * num_rows
            self._uniform[num_rows] = found
        return found[: num_requests + 1]


@dataclass(slots=True)
class FIMetadata:
    """One step.

    Attributes:
        batch: the step as the core reads it.
        window_batch: the same for layers in the window pool of a hybrid pool; None without one.
        window_out_slots: int64 [num_tokens], where the window pool's layers write; None as above.
        mask: custom_mask and mask_indptr of a verification; None for causal attention.
        workspace: scratch memory of the plans.
        split_tokens: see plan(); not 0 makes results independent of batch mates.
        plans: the division of work, by geometry and pool.
    """

    batch: PagedBatch
    window_batch: PagedBatch | None
    window_out_slots: torch.Tensor | None
    mask: tuple[torch.Tensor, torch.Tensor] | None
    workspace: Workspace
    split_tokens: int
    plans: dict[tuple[int, bool], tuple[AttentionSpec, Plan]] = field(default_factory=dict)

    def plan_for(self, bound: BoundLayer) -> Plan:
        """Return the step's plan for a layer, making it if no layer like it asked before."""
        spec = bound.attention.spec
        # Equal geometries are one object that is never freed, so its id is a cheap key.
        key = (id(spec.geometry), bound.in_window_pool)
        found = self.plans.get(key)
        if found is None:
            found = self.plans[key] = (spec, self._plan(spec, bound.in_window_pool, None))
        return found[1]

    def replan(self) -> None:
        """Divide the work again, into the same memory, after the batch's tensors were refilled."""
        for key, (spec, old) in self.plans.items():
            self.plans[key] = (spec, self._plan(spec, key[1], old))

    def _plan(self, spec: AttentionSpec, in_window_pool: bool, into: Plan | None) -> Plan:
        batch = self.window_batch if in_window_pool else self.batch
        assert batch is not None
        return plan(spec, batch, self.workspace, into=into, split_tokens=self.split_tokens)
