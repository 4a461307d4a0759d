"""Prefill attention with FlashInfer's calls over ragged keys and values: no cache, no pages."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend._arguments import PagedCache, ragged_cache, refuse
from fi_backend._page_table import check_indptr, check_lens
from fi_backend._prefill_options import PrefillOptions
from fi_backend._prefill_wrapper import PrefillWrapper

__all__ = ["BatchPrefillWithRaggedKVCacheWrapper"]


class BatchPrefillWithRaggedKVCacheWrapper(PrefillWrapper):
    """Prefill attention where the keys of the requests lie one after the other in one tensor.

    It works where float_workspace_buffer is, on the CPU or on a GPU. On a GPU run() only launches;
    so does plan() if it gets tensors of that GPU, which it checks by shape alone.

    Args:
        float_workspace_buffer: scratch of any dtype, 16-byte aligned; one that is too small is
            replaced by memory of the wrapper's own, so it cannot overflow.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: plan() copies into the buffers below, whose sizes fix the batch size; the
            first plan() fixes the most rows, and all its arguments but offsets, page table and
            what a mask holds. A run() that a CUDA graph has captured then follows later plans.
        qo_indptr_buf: int32 [batch_size + 1], with use_cuda_graph.
        kv_indptr_buf: int32 [batch_size + 1], with use_cuda_graph.
        custom_mask_buf: uint8 [most mask bytes], with use_cuda_graph and custom masks; one byte
            more a request for masks that plan() packs by lengths on a GPU.
        mask_indptr_buf: int32 [batch_size + 1], with use_cuda_graph and custom masks.
        backend: "auto", "fa2" or "fa3"; one implementation serves all.
        jit_args: [AttentionVariant], or None.
        jit_kwargs: must be None.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            backend,
            jit_args,
            jit_kwargs,
            custom_mask_buf,
            mask_indptr_buf,
        )
        self._num_keys = 0  # of the planned step, as far as the host knows
        self._buffers = self._fixed_buffers(
            qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf
        )
        if self._buffers and self._buffers[0].shape != self._buffers[1].shape:
            raise ValueError(
                f"The length of kv_indptr_buf ({self._buffers[1].shape[0]}) should be the same as "
                f"qo_indptr_buf ({self._buffers[0].shape[0]})"
            )

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
    ) -> None:
        """Plan a step. Every layer with these heads then shares the plan.

        Args:
            qo_indptr: int32 [batch_size + 1], first query row of each request. This and the next
                are each on the host, and copied, or on the wrapper's GPU, where run() reads them
                in place without use_cuda_graph.
            kv_indptr: int32 [batch_size + 1], first key of each request.
            num_qo_heads: query heads, a multiple of num_kv_heads.
            num_kv_heads: key/value heads.
            head_dim_qk: size of a query and key head.
            head_dim_vo: size of a value and output head; head_dim_qk if None.
            fixed_split_size: tokens at whose multiples a request's keys are cut, which makes its
                bits independent of its batch mates.
            v_indptr, o_indptr: kv_indptr and qo_indptr, if not None.

        The other arguments are those of BatchPrefillWithPagedKVCacheWrapper.plan().

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
            UnsupportedError: the combination is not served.
        """
        options = PrefillOptions.from_arguments(locals())
        kv_indptr = check_indptr("kv_indptr", kv_indptr, self._device)
        batch_size = kv_indptr.shape[0] - 1
        kv_lens = kv_indptr[1:] - kv_indptr[:-1] if kv_indptr.is_cpu else None
        num_keys = int(kv_indptr[-1]) if kv_indptr.is_cpu else 0
        qo_lens = self._check_qo_indptr(qo_indptr, batch_size)
        options.check(self._name, qo_lens, kv_lens)
        check_lens("v_indptr", v_indptr, kv_indptr, "kv_indptr")
        check_lens("o_indptr", o_indptr, qo_indptr, "qo_indptr")
        spec = options.spec(num_qo_heads, num_kv_heads, head_dim_qk, page_size=1)
        metadata = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr}
        lens = kv_indptr.diff() if kv_lens is None else kv_lens
        self._plan_step(self._check_step(options, spec, metadata, qo_lens, lens))
        self._num_keys = num_keys

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: PagedCache | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of the planned step for one layer.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk], q_data_type.
            k: [kv_indptr[-1], num_kv_heads, head_dim_qk], kv_data_type; "HND" swaps the first two
                dimensions. Any strides but the last.
            v: as k, with head_dim_vo.
            args: tensors and scalars of the variant in jit_args, in the order it names them.
            q_scale, k_scale, v_scale: factors on q, k and v.
            out: [qo_indptr[-1], num_qo_heads, head_dim_vo], o_data_type; allocated if None.
            lse: float32 [qo_indptr[-1], num_qo_heads]; allocated if None and return_lse.
            return_lse: return (out, lse); lse has base 2 and is -inf where a row sees no key.
            enable_pdl: a hint, without effect on the result.
            o_scale, kv_cache_sf: must be None.
            sinks: float32 [num_qo_heads], logits that join the softmax denominators (and lse).

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        values = self._take_values(args)
        refuse(self._name, o_scale=o_scale, kv_cache_sf=kv_cache_sf)
        self._check_rows(q)
        cache = (ragged_cache("k", k, self._kv_layout), ragged_cache("v", v, self._kv_layout))
        for name, tensor in zip(("k", "v"), cache, strict=True):
            if tensor.shape[0] < self._num_keys:
                raise ValueError(
                    f"{name} must have at least kv_indptr[-1] = {self._num_keys} tokens; "
                    f"got {tensor.shape[0]}"
                )
        if cache[0].shape[0] != cache[1].shape[0]:
            raise ValueError(
                f"v must have as many tokens as k, {cache[0].shape[0]}; got {cache[1].shape[0]}"
            )
        return self._run(
            q,
            cache,
            out=out,
            lse=lse,
            return_lse=return_lse,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            sinks=sinks,
            variant_values=values,
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Replace options of plan() by these and run; the older form of run()."""
        return self.forward_return_lse(
            q,
            k,
            v,
            causal,
            pos_encoding_mode,
            use_fp16_qk_reduction,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
        )[0]

    def forward_return_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace options of plan() by these and run; the older form of run_return_lse()."""
        self._replan(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, k, v, return_lse=True)  # type: ignore[return-value]
