"""vLLM's metadata of one step -> PagedBatch, and what our layers read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fi_backend import AttentionSpec, PagedBatch, Plan
from fi_backend.integrations.vllm.reservation import Reservation

__all__ = ["FIMetadata", "new_tokens", "to_batch"]


def new_tokens(
    qo_indptr: torch.Tensor, qo_lens: torch.Tensor, max_qo_len: int | None = None
) -> PagedBatch:
    """Return a step in which each request sees its own new tokens, and no cache.

    Args:
        qo_indptr: int32 [R + 1], first token of each request.
        qo_lens: int32 [R], tokens of each request.
        max_qo_len: as PagedBatch has it.
    """
    return PagedBatch(qo_indptr, qo_lens, page_indptr=qo_indptr, max_qo_len=max_qo_len)


def to_batch(
    common: Any, *, encoder_only: bool = False, max_qo_len: int | None = None
) -> PagedBatch:
    """Name what vLLM already has; nothing is copied and no value is read.

    Args:
        common: a CommonAttentionMetadata: query_start_loc [R + 1], seq_lens [R] and
            block_table_tensor [R, max_blocks], int32. Padding requests have length 0.
        encoder_only: the keys are this step's own tokens, as many as seq_lens says.
        max_qo_len: as PagedBatch has it.
    """
    if encoder_only:
        return new_tokens(common.query_start_loc, common.seq_lens)
    return PagedBatch(
        qo_indptr=common.query_start_loc,
        kv_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        max_qo_len=max_qo_len,
    )


@dataclass
class FIMetadata:
    """One step of one group of layers. (A dataclass: vLLM's wrappers copy its fields.)

    Attributes:
        num_actual_tokens: rows of q, k and v that hold tokens; the rest is padding.
        slot_mapping: int64 [num_tokens], where each token's key and value go; -1 for nowhere.
        causal: whether a token sees only its past.
        batch: the step as the core reads it. Under decode context parallelism its keys are the
            cached tokens of this rank, without those of the step.
        seq_lens: int32 [R], tokens of each request on all ranks, those of the step included.
        reservation: the memory to plan into.
        plans: the division of work for each geometry among the group's layers.
        new_tokens: under decode context parallelism, the step with its own tokens as keys.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    causal: bool
    batch: PagedBatch
    seq_lens: torch.Tensor
    reservation: Reservation
    plans: dict[int, Plan]
    new_tokens: PagedBatch | None = None

    def plan_for(self, key: int, spec: AttentionSpec) -> Plan:
        """Return the step's plan for layers like `spec`, making it if no layer asked before."""
        found = self.plans.get(key)
        if found is None:
            batch = self.batch
            if self.new_tokens is not None and spec.page_size == 1:  # what is cached has pages
                batch = self.new_tokens
            found = self.plans[key] = self.reservation.plan(key, spec, batch)
        return found
