"""Attention of mixed batches with FlashInfer's calls, and attention with sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fi_backend._arguments import (
    PagedCache,
    check_device,
    check_layout,
    combine_scales,
    layer_spec,
    planned_arguments,
    refuse,
    split_paged_cache,
    to_dtype,
)
from fi_backend._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_backend._page_table import check_entries, check_indptr, check_metadata, own_copy
from fi_backend.attention import PagedAttention
from fi_backend.batch import PagedBatch
from fi_backend.planning import Plan, plan
from fi_backend.spec import AttentionSpec
from fi_backend.workspace import Workspace

__all__ = ["BatchAttention", "BatchAttentionWithAttentionSinkWrapper"]


class BatchAttention:
    """Attention of any mix of prefill and decode over a paged cache, with its own workspace.

    Args:
        kv_layout: "NHD" or "HND".
        device: where tensors live: "cpu", or a GPU. On a GPU run() only launches; so does plan() if
            it gets tensors of that GPU, which it checks by shape alone.
    """

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda") -> None:
        check_layout("kv_layout", kv_layout)
        check_device("BatchAttention", torch.device(device))
        self._kv_layout = kv_layout
        self._workspace = Workspace(device)
        self._layer: PagedAttention | None = None
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Plan a step. Every layer with these heads and this cache form then shares the plan.

        Args:
            qo_indptr: int32 [batch_size + 1], first query row of each request. This and the next
                three are each on the host, and copied, or on the GPU, where run() reads them in
                place. Pinned memory among them must stay as it is until the GPU has read it.
            kv_indptr: int32 [batch_size + 1], first entry of each request in `kv_indices`.
            kv_indices: int32 [num_pages_used], page ids.
            kv_len_arr: int32 [batch_size], cached tokens of each request.
            num_qo_heads: query heads, a multiple of num_kv_heads.
            num_kv_heads: key/value heads.
            head_dim_qk, head_dim_vo: sizes of a query and of a value head.
            page_size: tokens a page holds.
            causal: row i of a request sees keys up to i + kv_len - qo_len.
            sm_scale: factor on q . k; 1 / sqrt(head_dim_qk) if None.
            logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
            q_data_type, kv_data_type: dtypes of q (and the output) and of the cache.
            use_profiler: must be False.

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
            UnsupportedError: the combination is not served.
        """
        name = "BatchAttention"
        refuse(name, use_profiler=use_profiler)
        device = self._workspace.device
        qo_indptr = check_indptr("qo_indptr", qo_indptr, device, start_at_zero=True)
        num_tokens = int(qo_indptr[-1]) if qo_indptr.is_cpu else None
        batch_size = qo_indptr.shape[0] - 1
        kv_indptr = check_indptr("kv_indptr", kv_indptr, device, batch_size=batch_size)
        check_entries(("kv_indptr", "kv_indices"), kv_indptr, kv_indices, device)
        check_metadata("kv_len_arr", kv_len_arr, device, shape=(batch_size,))
        if kv_indptr.is_cpu and kv_len_arr.is_cpu:
            _check_kv_lens(kv_len_arr, kv_indptr, page_size)
        q_dtype = to_dtype("q_data_type", q_data_type, torch.bfloat16)
        spec = layer_spec(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=to_dtype("kv_data_type", kv_data_type, torch.bfloat16),
            o_dtype=q_dtype,
            causal=causal,
            pos_encoding_mode="NONE",
            window_left=-1,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=None,
            rope_theta=None,
        )
        layer = self._layer
        if layer is None or layer.spec != spec:
            layer = PagedAttention(spec, device)
        batch = PagedBatch(
            own_copy("qo_indptr", qo_indptr, device),
            own_copy("kv_len_arr", kv_len_arr, device),
            page_indptr=own_copy("kv_indptr", kv_indptr, device),
            page_indices=own_copy("kv_indices", kv_indices, device),
        )
        step = plan(spec, batch, self._workspace, into=self._plan, share_prefixes=False)
        self._plan = replace(step, num_tokens=num_tokens)
        self._layer = layer

    def run(
        self,
        q: torch.Tensor,
        kv_cache: PagedCache,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: PagedCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of the planned step for one layer.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk], q_data_type.
            kv_cache: one tensor [num_pages, 2, page_size, num_kv_heads, head_dim], or a pair
                [num_pages, page_size, num_kv_heads, head_dim]; "HND" swaps page_size and
                num_kv_heads.
            out: [qo_indptr[-1], num_qo_heads, head_dim_vo], q_data_type; allocated if None.
            lse: float32 [qo_indptr[-1], num_qo_heads]; allocated if None.
            k_scale, v_scale: factors on k and v: a float, or a float tensor of 1 or num_kv_heads
                elements.
            logits_soft_cap: 0, or what plan() was given.
            profiler_buffer, kv_cache_sf: must be None.

        Returns:
            (out, lse); lse has base 2 and is -inf where a row sees no key.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        refuse("BatchAttention", profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        if self._layer is None or self._plan is None:
            raise RuntimeError("BatchAttention: call plan() before run()")
        spec = self._layer.spec
        if not (logits_soft_cap <= 0.0 or logits_soft_cap == spec.logits_soft_cap):
            raise ValueError(
                f"logits_soft_cap must be what plan() was given, {spec.logits_soft_cap}; "
                f"got {logits_soft_cap}. Plan again to change it"
            )
        num_tokens = self._plan.num_tokens
        if num_tokens is not None and q.shape[0] != num_tokens:
            raise ValueError(
                f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({num_tokens})"
            )
        result = self._layer.run(
            self._plan,
            q,
            split_paged_cache("kv_cache", kv_cache, self._kv_layout),
            out=out,
            lse=lse,
            return_lse=True,
            k_scale=combine_scales((("k_scale", k_scale),), spec.num_kv_heads),
            v_scale=combine_scales((("v_scale", v_scale),), spec.num_kv_heads),
        )
        assert isinstance(result, tuple)
        return result


def _check_kv_lens(kv_lens: torch.Tensor, indptr: torch.Tensor, page_size: int) -> None:
    """Check that the pages of each request hold its tokens; tensors on the host."""
    most = (indptr[1:] - indptr[:-1]) * page_size
    bad = (kv_lens < 0) | (kv_lens > most)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"kv_len_arr[{at}] must lie between 0 and {int(most[at])}, the tokens that its pages "
            f"hold; got {int(kv_lens[at])}"
        )


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The paged prefill wrapper whose run() takes sinks: run(q, cache, sink, sm_scale).

    `sink` is float32 [num_qo_heads], one logit per head that joins the softmax denominator (and
    lse) but has no value. `sm_scale` may be left out; plan() then says it. `sinks=` does the same.

    Args:
        pos_encoding_mode, q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left: what
            plan() will be given; it checks that they agree.

    The other arguments are those of BatchPrefillWithPagedKVCacheWrapper.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
        )
        self._promised = {
            "pos_encoding_mode": pos_encoding_mode,
            "q_data_type": to_dtype("q_data_type", q_data_type, torch.bfloat16),
            "kv_data_type": to_dtype("kv_data_type", kv_data_type, torch.bfloat16),
            "head_dim_qk": head_dim_qk,
            "head_dim_vo": head_dim_vo,
            "window_left": window_left,
        }

    def _check_spec(self, spec: AttentionSpec, split_tokens: int) -> None:
        planned = planned_arguments(spec, split_tokens)
        for name, promised in self._promised.items():
            if planned[name] != promised:
                raise ValueError(
                    f"{name} of plan() must be what the constructor was given, {promised}; "
                    f"got {planned[name]}"
                )
        super()._check_spec(spec, split_tokens)

    def _take_extra(
        self, args: tuple[Any, ...], sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, float | None]:
        if len(args) > 2 or (args and sinks is not None):
            raise TypeError(
                f"{self._name}.run takes (q, paged_kv_cache, sink, sm_scale), or sinks= in place "
                f"of sink; got {len(args)} extra arguments and "
                f"sinks={'None' if sinks is None else 'a tensor'}"
            )
        sink = args[0] if args else sinks
        if sink is None:
            raise ValueError(
                f"{self._name}.run: sink must be a float32 tensor [num_qo_heads]; got None. "
                f"Without sinks, use BatchPrefillWithPagedKVCacheWrapper"
            )
        return sink, args[1] if len(args) == 2 else None
