"""vLLM's metadata of one step -> PagedBatch, and what our layers read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fi_backend import AttentionSpec, PagedBatch, Plan
from fi_backend.integrations.vllm.reservation import Reservation

__all__ = ["FIMetadata", "to_batch"]


def to_batch(
    common: Any, *, encoder_only: bool = False, max_qo_len: int | None = None
) -> PagedBatch:
    """Name what vLLM already has; nothing is copied and no value is read.

    Args:
        common: a CommonAttentionMetadata: query_start_loc [R + 1], seq_lens [R] and
            block_table_tensor [R, max_blocks], int32. Padding requests have length 0.
        encoder_only: the keys are this step's own tokens; there is no cache.
        max_qo_len: as PagedBatch has it.
    """
    if encoder_only:
        return PagedBatch.ragged(common.query_start_loc, common.query_start_loc)
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
        batch: the step as the core reads it.
        reservation: the memory to plan into.
        plans: the division of work for each geometry among the group's layers.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    causal: bool
    batch: PagedBatch
    reservation: Reservation
    plans: dict[int, Plan]

    def plan_for(self, key: int, spec: AttentionSpec) -> Plan:
        """Return the step's plan for layers like `spec`, making it if no layer asked before."""
        found = self.plans.get(key)
        if found is None:
            found = self.plans[key] = self.reservation.plan(key, spec, self.batch)
        return found
