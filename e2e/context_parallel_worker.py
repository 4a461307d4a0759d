"""A worker extension with which vLLM's CPU workers run decode context parallelism.

vLLM's own kernel for the CPU that says where tokens go refuses it; this one knows the ranks. It is
what vLLM's kernel for GPUs computes.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils.dispatcher import register_kernels

from fi_backend.integrations.vllm.worker_extension import WorkerExtension

__all__ = ["ContextParallelExtension"]


def _slots(
    num_tokens: int,
    _max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    _stride: int,
    slot_mapping: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    *_: Any,
) -> None:
    ranks, interleave = TOTAL_CP_WORLD_SIZE, CP_KV_CACHE_INTERLEAVE_SIZE
    requests = torch.repeat_interleave(query_start_loc.diff().long())
    where = positions[: len(requests)]
    index = where // (ranks * interleave) * interleave + where % interleave
    pages = block_table[requests, index // KV_CACHE_BLOCK_SIZE].long()
    slots = pages * KV_CACHE_BLOCK_SIZE + index % KV_CACHE_BLOCK_SIZE
    is_ours = where // interleave % ranks == TOTAL_CP_RANK
    slot_mapping.fill_(-1)
    slot_mapping[: len(requests)] = torch.where(is_ours, slots, -1)


register_kernels({"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": _slots})


class ContextParallelExtension(WorkerExtension):
    """The counters, and the kernel as a side effect of the import."""
