"""Decode context parallelism: layers whose cache is spread over the ranks of a group.

The ranks of a group have the same key/value heads and different query heads, and each keeps a share
of every request's tokens. A rank attends with the queries of all ranks to its share; then they
exchange results, and each merges those of its own heads by their LSE. Tokens of the step itself are
not looked up in the cache: every rank has them all, and their causality needs their positions.

vLLM's `dcp_comm_backend` chooses how its own backends exchange results. Here that is one
all-to-all of the results and one of their LSEs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dcp_group

from fi_backend import AttentionSpec, merge_states
from fi_backend.integrations.vllm.attentions import attention_for, geometry_key
from fi_backend.integrations.vllm.metadata import FIMetadata, new_tokens

__all__ = ["Shard", "ShardedAttention", "cached_spec", "new_spec"]


def cached_spec(spec: AttentionSpec, num_ranks: int) -> AttentionSpec:
    """Return the spec of all ranks' queries over the cached tokens of one.

    All of these come before the step, so nothing is causal. A sink counts once: with the new
    tokens.
    """
    return replace(spec, num_qo_heads=num_ranks * spec.num_qo_heads, causal=False, sinks=False)


def new_spec(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of a rank's own queries over the tokens of the step, which have no pages."""
    return replace(spec, page_size=1, kv_dtype=spec.q_dtype)


class Shard:
    """This rank's part of each step.

    Lengths have the same addresses in every step, as CUDA graphs want it.

    Args:
        num_ranks: ranks that share a cache.
        rank: which of them this is.
        interleave: tokens in a row that one rank keeps before it is the next one's turn.
        max_reqs: most requests of a step.
        device: where steps run.
    """

    def __init__(
        self, num_ranks: int, rank: int, interleave: int, max_reqs: int, device: torch.device
    ) -> None:
        self._skipped = rank * interleave
        self._interleave = interleave
        self._round = num_ranks * interleave
        self._new, self._cached = torch.zeros(2, max_reqs, dtype=torch.int32, device=device)

    def split(self, step: FIMetadata) -> None:
        """Leave the cached tokens of this rank in step.batch, and move the new ones to a batch.

        This only launches, and may be done again when the engine's lengths have changed.
        """
        batch, requests = step.batch, step.seq_lens.shape[0]
        new, cached = self._new[:requests], self._cached[:requests]
        torch.sub(batch.qo_indptr[1:], batch.qo_indptr[:-1], out=new)
        before = step.seq_lens - new
        of_last_round = (before % self._round - self._skipped).clamp_(0, self._interleave)
        torch.add(of_last_round, before // self._round, alpha=self._interleave, out=cached)
        step.batch = replace(batch, kv_lens=cached)
        step.new_tokens = new_tokens(batch.qo_indptr, new, batch.max_qo_len)


class ShardedAttention:
    """One layer, on one rank.

    Args:
        spec: the layer with the rank's own query heads.
        device: where it runs.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        self._group = get_dcp_group()
        cached, new = cached_spec(spec, self._group.world_size), new_spec(spec)
        self._cached, self._cached_key = attention_for(cached, device), geometry_key(cached)
        self._new, self._new_key = attention_for(new, device), geometry_key(new)

    def run(
        self,
        metadata: FIMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        *,
        sinks: torch.Tensor | None,
        k_scale: float,
        v_scale: float,
    ) -> None:
        """Fill `output`; all ranks of the group call this together. Rows of padding become 0.

        Args:
            metadata: the step; its batch has this rank's cached tokens.
            query: [num_tokens, num_heads, head_dim_qk].
            key: [num_tokens, num_kv_heads, head_dim_qk], the same on all ranks.
            value: as key, with head_dim_vo.
            cache: (k, v) of this rank, each [num_pages, page_size, num_kv_heads, head_dim].
            output: [num_tokens, num_heads, head_dim_vo].
            sinks: float32 [num_heads], if the spec has them.
            k_scale: factor on the cached keys.
            v_scale: factor on the cached values.
        """
        ranks, (tokens, heads, head_dim) = self._group.world_size, output.shape
        found, found_lse = self._cached.run(
            metadata.plan_for(self._cached_key, self._cached.spec),
            self._group.all_gather(query.contiguous(), dim=1),
            cache,
            out=output.new_empty(tokens, ranks * heads, head_dim),
            return_lse=True,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        # States of our heads, one from each rank and then that of the new tokens.
        states = output.new_empty(ranks + 1, tokens, heads, head_dim)
        lses = found_lse.new_full((ranks + 1, tokens, heads), float("-inf"))
        for mine, everyones in ((states, found), (lses, found_lse)):
            by_rank = everyones.unflatten(1, (ranks, heads)).transpose(0, 1).contiguous()
            dist.all_to_all_single(mine[:ranks], by_rank, group=self._group.device_group)
        self._new.run(
            metadata.plan_for(self._new_key, self._new.spec),
            query,
            (key.unsqueeze(1), value.unsqueeze(1)),
            out=states[ranks],
            lse=lses[ranks],
            sinks=sinks,
        )
        output.copy_(merge_states(states.transpose(0, 1), lses.transpose(0, 1))[0])
