"""Attention over one prefix that all requests share and paged keys of their own."""

from __future__ import annotations

import functools

import torch

from fi_backend._arguments import PagedCache, split_paged_cache
from fi_backend._batch_decode import BatchDecodeWithPagedKVCacheWrapper
from fi_backend._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_backend._merge import merge_state_in_place
from fi_backend._prefill_options import PrefillOptions
from fi_backend._single import single_attention

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
]


def _prefix_state(
    operation: str,
    q: torch.Tensor,
    k_shared: torch.Tensor,
    v_shared: torch.Tensor,
    kv_layout: str,
    sm_scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every row to the whole prefix."""
    return single_attention(  # type: ignore[return-value]
        operation,
        q,
        k_shared,
        v_shared,
        kv_layout=kv_layout,
        causal=False,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        sm_scale=sm_scale,
        rope_scale=None,
        rope_theta=None,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        return_lse=True,
    )


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode attention over a shared prefix and a paged cache of each request's own keys.

    MultiLevelCascadeAttentionWrapper is the more general form.

    Args:
        float_workspace_buffer: scratch of any dtype, 16-byte aligned.
        kv_layout: "NHD" or "HND".
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        """Use another workspace from the next begin_forward() on.

        Arguments and errors are those of BatchPrefillWithPagedKVCacheWrapper's
        reset_workspace_buffer().
        """
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str | torch.dtype = "float16",
    ) -> None:
        """Plan a step.

        Args:
            unique_kv_indptr: `indptr` of BatchDecodeWithPagedKVCacheWrapper.plan(), whose arguments
                and errors the others are too.
            unique_kv_indices: its `indices`.
            unique_kv_last_page_len: its `last_page_len`.
            data_type: dtype of q and of both caches.
        """
        self._own.plan(
            unique_kv_indptr,
            unique_kv_indices,
            unique_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
    ) -> torch.Tensor:
        """Compute attention of the planned step for one layer.

        Args:
            q: [batch_size, num_qo_heads, head_dim].
            k_shared, v_shared: [prefix_len, num_kv_heads, head_dim]; "HND" swaps the first two.
            unique_kv_cache: as for BatchDecodeWithPagedKVCacheWrapper.run().

        Returns:
            [batch_size, num_qo_heads, head_dim], dtype of q.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        out, lse = self._own.run_return_lse(q, unique_kv_cache)
        prefix = _prefix_state(type(self).__name__, q, k_shared, v_shared, self._kv_layout, None)
        merge_state_in_place(out, lse, *prefix)
        return out

    def end_forward(self) -> None:
        """Do nothing; kept for callers written against older versions."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill attention over a shared prefix and a paged cache of each request's own keys.

    MultiLevelCascadeAttentionWrapper is the more general form.

    Args:
        float_workspace_buffer: scratch of any dtype, 16-byte aligned.
        kv_layout: "NHD" or "HND".
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout
        self._plan_own: functools.partial[None] | None = None
        self._planned_dtypes: tuple[torch.dtype, torch.dtype] | None = None

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        """Use another workspace from the next begin_forward() on.

        Arguments and errors are those of BatchPrefillWithPagedKVCacheWrapper's
        reset_workspace_buffer().
        """
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Plan a step.

        Arguments and errors are those of BatchPrefillWithPagedKVCacheWrapper.plan().
        No argument says the dtypes, so the first forward() after this one divides the work.
        """
        table = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._own._check_plan(PrefillOptions(), qo_indptr, table, page_size)
        # Copies: the caller may fill in the next step's before forward() plans this one.
        self._plan_own = functools.partial(
            self._own.plan,
            qo_indptr.clone(),
            paged_kv_indptr.clone(),
            paged_kv_indices.clone(),
            paged_kv_last_page_len.clone(),
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
        )
        self._planned_dtypes = None

    def _plan_for(self, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        if self._plan_own is None:
            raise RuntimeError(f"{type(self).__name__}: call begin_forward() before forward()")
        self._plan_own(q_data_type=q_dtype, kv_data_type=kv_dtype)
        self._planned_dtypes = (q_dtype, kv_dtype)

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Compute attention of the planned step for one layer.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim].
            k_shared, v_shared: [prefix_len, num_kv_heads, head_dim]; "HND" swaps the first two.
            unique_kv_cache: as for BatchPrefillWithPagedKVCacheWrapper.run().
            causal: among a request's own keys; all rows see the whole prefix.
            use_fp16_qk_reduction: a permission that is not used; sums are float32.
            sm_scale: factor on q . k; 1 / sqrt(head_dim) if None.
            rope_scale, rope_theta: without effect, as there is no position encoding.

        Returns:
            [qo_indptr[-1], num_qo_heads, head_dim], dtype of q.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        dtypes = (q.dtype, split_paged_cache("cache", unique_kv_cache, self._kv_layout)[0].dtype)
        if dtypes != self._planned_dtypes:
            self._plan_for(*dtypes)
        out, lse = self._own.forward_return_lse(
            q, unique_kv_cache, causal=causal, sm_scale=sm_scale
        )
        prefix = _prefix_state(
            type(self).__name__, q, k_shared, v_shared, self._kv_layout, sm_scale
        )
        merge_state_in_place(out, lse, *prefix)
        return out

    def end_forward(self) -> None:
        """Do nothing; kept for callers written against older versions."""
