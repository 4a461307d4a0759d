"""The batch prefill wrapper over a paged cache."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend._arguments import PagedCache, refuse, split_paged_cache
from fi_backend._page_table import check_page_table, page_lens, to_device
from fi_backend._prefill_options import PrefillOptions
from fi_backend._prefill_wrapper import PrefillStep, PrefillWrapper
from fi_backend._wrapper import Scale

__all__ = ["BatchPrefillWithPagedKVCacheWrapper"]

_NAMES = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
_Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # in this order


class BatchPrefillWithPagedKVCacheWrapper(PrefillWrapper):
    """Prefill or append attention over a paged cache: plan() once a step, run() once a layer.

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
        paged_kv_indptr_buf: int32 [batch_size + 1], with use_cuda_graph.
        paged_kv_indices_buf: int32 [most pages of a step], with use_cuda_graph.
        paged_kv_last_page_len_buf: int32 [batch_size], with use_cuda_graph.
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
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
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
        self._buffers = self._fixed_buffers(
            qo_indptr_buf=qo_indptr_buf,
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
        )
        if self._buffers:
            qo_indptr, kv_indptr, _, last_page_len = self._buffers
            for name, buffer, size in (
                ("paged_kv_indptr_buf", kv_indptr, qo_indptr.shape[0]),
                ("paged_kv_last_page_len_buf", last_page_len, qo_indptr.shape[0] - 1),
            ):
                if buffer.shape[0] != size:
                    raise ValueError(
                        f"The length of {name} should be {size}, as qo_indptr_buf says; "
                        f"got {buffer.shape[0]}"
                    )

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
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
        o_data_type: str | torch.dtype | None = None,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> tuple[int, int]:
        """Bytes of the float and integer workspaces that plan() with these arguments needs.

        The bound does not depend on the lengths of the requests. Arguments as for plan().
        """
        options = PrefillOptions.from_arguments(locals())
        table = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._check_plan(options, qo_indptr, table, page_size)
        spec = options.spec(num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        return self._workspace_size(spec, paged_kv_last_page_len.shape[0])

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
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
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Plan a step. Every layer with these heads and this cache form then shares the plan.

        Args:
            qo_indptr: int32 [batch_size + 1], first query row of each request. This and the next
                three are each on the host, and copied, or on the wrapper's GPU, where run() reads
                them in place without use_cuda_graph.
            paged_kv_indptr: int32 [batch_size + 1], first entry of each request in the next.
            paged_kv_indices: int32 [num_pages_used], page ids.
            paged_kv_last_page_len: int32 [batch_size], tokens in each request's last page.
            num_qo_heads: query heads, a multiple of num_kv_heads.
            num_kv_heads: key/value heads.
            head_dim_qk: size of a query and key head.
            page_size: tokens a page holds.
            head_dim_vo: size of a value and output head; head_dim_qk if None.
            custom_mask: bool, qo_len x kv_len of every request in turn; True is seen. Takes the
                place of `causal`.
            packed_custom_mask: uint8, the same as bits, lowest first, every request at a byte of
                its own (segment_packbits with bitorder="little"); takes precedence.
            causal: row i of a request sees keys up to i + kv_len - qo_len.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI". "ROPE_LLAMA" rotates q and keys that
                are not rotated in the cache. On a GPU each run does so in copies of the step's keys
                and values, so engines rotate keys once, before they append them.
            use_fp16_qk_reduction: a permission that is not used; sums are float32.
            sm_scale: factor on q . k; 1 / sqrt(head_dim_qk) if None.
            window_left: keys left of its own position that a row sees; -1 for all.
            logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
            rope_scale, rope_theta: for "ROPE_LLAMA"; 1.0 and 1e4 if None.
            q_data_type: dtype of q; float16 by default.
            kv_data_type, o_data_type: dtypes of cache and output; q_data_type if None.
            non_blocking: do not wait for copies from the host; pinned memory among them must
                then stay as it is until the device has read it.
            seq_lens, seq_lens_q: int [batch_size], checked against the page table and qo_indptr
                where these are on the host.
            max_token_per_sequence, max_sequence_kv: checked to bound lengths given on the host.
            fixed_split_size: pages at whose multiples a request's keys are cut, which makes its
                bits independent of its batch mates.
            disable_split_kv: never cut a request's keys.
            prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr,
                block_tables: must be left at their defaults.

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
            UnsupportedError: the combination is not served.
        """
        options = PrefillOptions.from_arguments(locals())
        table = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self._plan_step(self._check_arguments(options, qo_indptr, table, heads, page_size))

    begin_forward = plan

    def _check_arguments(
        self,
        options: PrefillOptions,
        qo_indptr: torch.Tensor,
        table: _Table,
        heads: tuple[int, int, int],
        page_size: int,
    ) -> PrefillStep:
        """Check all that plan() is given; `heads` are its next three arguments."""
        qo_lens, kv_lens = self._check_plan(options, qo_indptr, table, page_size)
        if kv_lens is None:
            indptr = to_device(_NAMES[0], table[0], self._device)
            last_page_len = to_device(_NAMES[2], table[2], self._device)
            kv_lens = page_lens(indptr, last_page_len, page_size)
        metadata = dict(zip(("qo_indptr", *_NAMES), (qo_indptr, *table), strict=True))
        spec = options.spec(*heads, page_size)
        return self._check_step(options, spec, metadata, qo_lens, kv_lens)

    def _check_plan(
        self,
        options: PrefillOptions,
        qo_indptr: torch.Tensor,
        table: _Table,
        page_size: int,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Check a step; return each request's query rows and tokens where the host knows them."""
        kv_lens = check_page_table(_NAMES, *table, page_size, self._device)
        qo_lens = self._check_qo_indptr(qo_indptr, table[2].shape[0])
        options.check(self._name, qo_lens, kv_lens)
        return qo_lens, kv_lens

    def _take_extra(
        self, args: tuple[Any, ...], sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, float | None]:
        """Turn run()'s extra positional arguments into (sinks, sm_scale)."""
        refuse(self._name, args=args)
        return sinks, None

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: PagedCache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of the planned step for one layer.

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk], q_data_type.
            paged_kv_cache: kv_data_type; one tensor [num_pages, 2, page_size, num_kv_heads,
                head_dim], or a pair [num_pages, page_size, num_kv_heads, head_dim]; "HND" swaps
                page_size and num_kv_heads. Any strides but the last.
            args: tensors and scalars of the variant in jit_args, in the order it names them.
            q_scale, k_scale, v_scale: factors on q, k and v: a float, or a float tensor of 1 or
                num_kv_heads elements.
            out: [qo_indptr[-1], num_qo_heads, head_dim_vo], o_data_type; allocated if None.
            lse: float32 [qo_indptr[-1], num_qo_heads]; allocated if None and return_lse.
            return_lse: return (out, lse); lse has base 2 and is -inf where a row sees no key.
            enable_pdl: a hint, without effect on the result.
            window_left: what plan() was given, if not None.
            sinks: float32 [num_qo_heads], logits that join the softmax denominators (and lse).
            kv_cache_sf, skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress:
                must be left at their defaults.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        refuse(
            self._name,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )
        values = None if self._variant is None else self._take_values(args)
        sinks, sm_scale = self._take_extra(args if values is None else (), sinks)
        self._check_rows(q)
        self._check_window(window_left)
        return self._run(
            q,
            split_paged_cache("paged_kv_cache", paged_kv_cache, self._kv_layout),
            out=out,
            lse=lse,
            return_lse=return_lse,
            sinks=sinks,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            sm_scale=sm_scale,
            variant_values=values,
        )

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Replace options of plan() by these and run; the older form of run()."""
        return self.forward_return_lse(
            q,
            paged_kv_cache,
            causal,
            pos_encoding_mode,
            use_fp16_qk_reduction,
            k_scale,
            v_scale,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
        )[0]

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
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
        return self.run(  # type: ignore[return-value]
            q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=True
        )
