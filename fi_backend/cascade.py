"""Attention over shared prefixes, and merging of attention states, with FlashInfer's calls.

A state is (v, s): the attention output over some keys, and the base-2 logarithm of the sum of
their softmax weights. A state that saw no key has s = -inf and no influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fi_backend._arguments import PagedCache
from fi_backend._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_backend._merge import merge_state, merge_state_in_place, merge_states
from fi_backend._prefill_options import PrefillOptions
from fi_backend._prefill_wrapper import PrefillStep
from fi_backend._shared_prefix import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from fi_backend.errors import UnsupportedError
from fi_backend.outer_levels import MAX_OUTER_LEVELS, OuterLevels
from fi_backend.planning import max_prior_rows

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


class MultiLevelCascadeAttentionWrapper:
    """Attention where requests share prefixes on several levels, from shared to unique.

    Every level has a page table of its own into one cache; a level's "requests" are groups of
    query rows that see the same keys. The levels' states are merged.

    Up to three levels are one launch for the groups of all outer levels and one for own keys, which
    merges states, if requests of the last level have few query rows, as in decoding, and their
    qo_indptr is on the host. Else levels run one after the other.

    Args:
        num_levels: levels, at least 1; the last one holds each request's own keys.
        float_workspace_buffer: scratch of any dtype, 16-byte aligned; levels take turns with it.
            It is where the wrapper works, on the CPU or on a GPU.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: plan() copies into the buffers below. If the first plan() merges levels in
            two launches, all later ones must be such that they can be merged so.
        qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr,
            paged_kv_last_page_len_buf_arr: a buffer per level, with use_cuda_graph.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ) -> None:
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1; got {num_levels}")
        buffers = (
            ("qo_indptr_buf_arr", qo_indptr_buf_arr),
            ("paged_kv_indptr_buf_arr", paged_kv_indptr_buf_arr),
            ("paged_kv_indices_buf_arr", paged_kv_indices_buf_arr),
            ("paged_kv_last_page_len_buf_arr", paged_kv_last_page_len_buf_arr),
        )
        of_level: list[list[torch.Tensor | None]] = [[None] * len(buffers)] * num_levels
        if use_cuda_graph:
            for name, values in buffers:
                _check_levels(name, values, num_levels)
            of_level = [[values[i] for _, values in buffers if values] for i in range(num_levels)]
        self._use_cuda_graph = use_cuda_graph
        self._has_outer: bool | None = None  # whether the last level's plan has the others
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                qo_indptr_buf=level[0],
                paged_kv_indptr_buf=level[1],
                paged_kv_indices_buf=level[2],
                paged_kv_last_page_len_buf=level[3],
            )
            for level in of_level
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() copies into buffers given to the constructor."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        """Use other workspaces from the next plan() on.

        Args:
            float_workspace_buffer: as for BatchPrefillWithPagedKVCacheWrapper's
                reset_workspace_buffer().
            int_workspace_buffers: one for each level, as its `int_workspace_buffer`.

        Raises:
            TypeError, ValueError: a buffer is malformed, or their number is not that of the levels.
            RuntimeError: with use_cuda_graph, plan() has been called: a captured graph keeps the
                workspace of its capture. As with any error, all levels have what they had.
        """
        _check_levels("int_workspace_buffers", int_workspace_buffers, len(self._levels))
        levels = list(zip(self._levels, int_workspace_buffers, strict=True))
        for level, int_workspace_buffer in levels:
            level._check_workspaces(float_workspace_buffer, int_workspace_buffer)
        for level, int_workspace_buffer in levels:
            level.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Plan a step. Every layer with these heads and this cache form then shares the plan.

        Args:
            qo_indptr_arr: per level int32 [groups + 1], first query row of each group; every
                level covers the same rows, which is checked where they are on the host.
            paged_kv_indptr_arr: per level int32 [groups + 1].
            paged_kv_indices_arr: per level int32 [num_pages_used].
            paged_kv_last_page_len: per level int32 [groups].
            head_dim: size of a head.
            causal: within the last level; all rows see all keys of the levels above.
            pos_encoding_mode, window_left: "NONE" and -1 unless there is one level, since a level
                does not know where its keys stand in the whole sequence.

        The other arguments are those of BatchPrefillWithPagedKVCacheWrapper.plan().

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
            UnsupportedError: the combination is not served.
        """
        num_levels = len(self._levels)
        for name, values in (
            ("qo_indptr_arr", qo_indptr_arr),
            ("paged_kv_indptr_arr", paged_kv_indptr_arr),
            ("paged_kv_indices_arr", paged_kv_indices_arr),
            ("paged_kv_last_page_len", paged_kv_last_page_len),
        ):
            _check_levels(name, values, num_levels)
        for option, value, allowed in (
            ("pos_encoding_mode", pos_encoding_mode, "NONE"),
            ("window_left", window_left, -1),
        ):
            if num_levels > 1 and value != allowed:
                raise UnsupportedError(
                    f"MultiLevelCascadeAttentionWrapper: {option} must be {allowed!r} with more "
                    f"than one level; got {value!r}. Encode positions in q and k, or plan one level"
                )
        on_host = [x for x in qo_indptr_arr if isinstance(x, torch.Tensor) and x.is_cpu]
        rows = [int(qo_indptr[-1]) for qo_indptr in on_host]
        if len(set(rows)) > 1:
            raise ValueError(
                f"qo_indptr_arr must cover the same rows on every level; got last entries {rows}"
            )
        options = PrefillOptions(
            pos_encoding_mode=pos_encoding_mode,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )
        heads = (num_qo_heads, num_kv_heads, head_dim)
        tables = zip(paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, strict=True)
        steps = []  # of all levels, before the first of them copies to its fixed buffers
        for i, (level, table) in enumerate(zip(self._levels, tables, strict=True)):
            of_level = replace(options, causal=causal and i == num_levels - 1)
            steps.append(
                level._check_arguments(of_level, qo_indptr_arr[i], table, heads, page_size)
            )
        most_rows = self._rows_behind_outer(*steps)
        if most_rows is None:
            for level, step in zip(self._levels, steps, strict=True):
                level._plan_step(step)
        else:
            self._plan_together(steps, most_rows)
        self._has_outer = most_rows is not None

    begin_forward = plan

    def _rows_behind_outer(self, *steps: PrefillStep) -> int | None:
        """Most rows that requests of the last level may have behind outer ones.

        None if this step's have more, or nobody knows, or there are no outer levels, or too many.
        """
        is_fixed = self._use_cuda_graph and self._has_outer is not None
        num_outer = len(self._levels) - 1
        if (is_fixed and not self._has_outer) or not 0 < num_outer <= MAX_OUTER_LEVELS:
            return None
        *outer, step = steps
        qo_indptr = step.metadata["qo_indptr"]
        if not is_fixed:
            has_groups = any(level.metadata["qo_indptr"].shape[0] > 1 for level in outer)
            if not has_groups or not qo_indptr.is_cpu or int(qo_indptr[-1]) == 0:
                return None
        most_rows = max_prior_rows(step.spec, self._levels[-1]._device)
        longest = int(qo_indptr.diff().max()) if qo_indptr.is_cpu else None
        if longest is not None and longest <= most_rows:
            return most_rows
        if is_fixed:
            raise ValueError(
                f"qo_indptr_arr[-1] must be on the host and give a request at most {most_rows} "
                f"rows, as that of the first plan() with use_cuda_graph; got "
                f"{'a tensor on a device' if longest is None else longest}. Make another wrapper"
            )
        return None

    def _plan_together(self, steps: list[PrefillStep], most_rows: int) -> None:
        """Plan all levels as one: the last one's plan has the others."""
        *outer, last = self._levels
        max_rows = last._max_total_num_rows or steps[-1].rows
        assert max_rows is not None
        batches = [level._stage_batch(step) for level, step in zip(outer, steps[:-1], strict=True)]
        # Which a graph's later steps have too.
        step = replace(steps[-1], max_qo_len=most_rows) if self._use_cuda_graph else steps[-1]
        last._plan_step(step, OuterLevels(tuple(batches), max_rows))

    def run(self, q: torch.Tensor, paged_kv_cache: PagedCache) -> torch.Tensor:
        """Compute attention of the planned step for one layer.

        Args:
            q: [rows, num_qo_heads, head_dim], q_data_type.
            paged_kv_cache: as for BatchPrefillWithPagedKVCacheWrapper.run().

        Returns:
            [rows, num_qo_heads, head_dim], q_data_type.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        if self._has_outer:
            return self._levels[-1].run(q, paged_kv_cache)  # type: ignore[return-value]
        out, lse = self._levels[-1].run_return_lse(q, paged_kv_cache)
        for level in self._levels[:-1]:
            merge_state_in_place(out, lse, *level.run_return_lse(q, paged_kv_cache))
        return out

    forward = run

    def end_forward(self) -> None:
        """Do nothing; kept for callers written against older versions."""


def _check_levels(name: str, values: Sequence[torch.Tensor] | None, num_levels: int) -> None:
    if values is None or len(values) != num_levels:
        raise ValueError(
            f"{name} must hold a tensor for each of the {num_levels} levels; "
            f"got {None if values is None else len(values)}"
        )
