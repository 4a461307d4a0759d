"""The batch decode wrapper: a few new tokens of every request over a paged cache."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fi_backend._arguments import PagedCache, refuse, split_paged_cache
from fi_backend._decode_options import DecodeOptions, merge_positional
from fi_backend._page_table import check_lens, check_page_table, page_lens
from fi_backend._wrapper import AttentionWrapper, Scale
from fi_backend.batch import PagedBatch

__all__ = ["BatchDecodeWithPagedKVCacheWrapper"]

_NAMES = ("indptr", "indices", "last_page_len")


class BatchDecodeWithPagedKVCacheWrapper(AttentionWrapper):
    """Decode attention of a batch over a paged cache: plan() once a step, run() once a layer.

    It works where float_workspace_buffer is, on the CPU or on a GPU. On a GPU run() only launches;
    so does plan() if it gets tensors of that GPU, which it checks by shape alone.

    Args:
        float_workspace_buffer: scratch of any dtype, 16-byte aligned; one that is too small is
            replaced by memory of the wrapper's own, so it cannot overflow.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: plan() copies into the three buffers below, whose sizes fix the batch size;
            the first plan() fixes all its arguments but the page table. A run() that a CUDA graph
            has captured then follows every later plan().
        use_tensor_cores: needed for q_len_per_req > 1; otherwise without effect on the result.
        paged_kv_indptr_buffer: int32 [batch_size + 1], with use_cuda_graph.
        paged_kv_indices_buffer: int32 [most pages of a step], with use_cuda_graph.
        paged_kv_last_page_len_buffer: int32 [batch_size], with use_cuda_graph.
        backend: "auto", "fa2" or "fa3"; one implementation serves all.
        jit_args: [AttentionVariant], or None.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._q_len_per_req: int | None = None
        self._qo_indptr: torch.Tensor | None = None
        self._rows_made = (0, 0)  # batch_size and q_len_per_req of self._qo_indptr
        self._buffers = self._fixed_buffers(
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
        )
        if self._buffers:
            indptr, _, last_page_len = self._buffers
            if indptr.shape[0] != last_page_len.shape[0] + 1:
                raise ValueError(
                    "The size of paged_kv_indptr_buffer should be batch_size + 1, one more than "
                    f"paged_kv_last_page_len_buffer's {last_page_len.shape[0]}; "
                    f"got {indptr.shape[0]}"
                )

    @property
    def use_tensor_cores(self) -> bool:
        """As given to the constructor."""
        return self._use_tensor_cores

    def workspace_size(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> tuple[int, int]:
        """Bytes of the float and integer workspaces that plan() with these arguments needs.

        The bound does not depend on the lengths of the requests. Arguments as for plan().
        """
        options = DecodeOptions.from_arguments(locals())
        self._check_plan(options, indptr, indices, last_page_len, page_size)
        spec = options.spec(num_qo_heads, num_kv_heads, head_dim, page_size)
        return self._workspace_size(spec, last_page_len.shape[0])

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        **kwargs: Any,
    ) -> None:
        """Plan a step. Every layer with these heads and this cache form then shares the plan.

        Args:
            indptr: int32 [batch_size + 1], first entry of each request in `indices`. This and the
                next two are each on the host, and copied, or on the wrapper's GPU, where run()
                reads them in place without use_cuda_graph.
            indices: int32 [num_pages_used], page ids.
            last_page_len: int32 [batch_size], tokens in each request's last page.
            num_qo_heads: query heads, a multiple of num_kv_heads.
            num_kv_heads: key/value heads.
            head_dim: size of a head.
            page_size: tokens a page holds.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI". This and what follows are keywords.
                "ROPE_LLAMA" rotates q and keys that are not rotated in the cache. On a GPU each run
                does so in copies of the step's keys and values, so engines rotate keys once, before
                they append them.
            window_left: keys left of its own position that a token sees, -1 for all.
            logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
            q_data_type, kv_data_type, o_data_type: "float16", q_data_type and q_data_type.
            data_type: q_data_type and kv_data_type, where those are left out.
            sm_scale: factor on q . k, 1 / sqrt(head_dim) if None.
            rope_scale, rope_theta: for "ROPE_LLAMA", 1.0 and 1e4 if None.
            non_blocking: do not wait for copies from the host; pinned memory among them must
                then stay as it is until the device has read it.
            block_tables: must be None.
            seq_lens: int [batch_size], checked against the page table where both are on the host.
            fixed_split_size: pages at whose multiples a request's keys are cut, which makes its
                bits independent of its batch mates.
            disable_split_kv: never cut a request's keys.
            q_len_per_req: new tokens of every request.

        Raises:
            TypeError, ValueError: an argument is malformed; the message names it.
            UnsupportedError: the combination is not served.
        """
        if deprecated_positional_args:
            kwargs = merge_positional(self._name, deprecated_positional_args, kwargs)
            warnings.warn(
                f"{self._name}.plan: passing arguments after page_size by position is deprecated; "
                f"pass them by keyword",
                DeprecationWarning,
                stacklevel=2,
            )
        options = DecodeOptions.from_keywords(self._name, kwargs)
        lens = self._check_plan(options, indptr, indices, last_page_len, page_size)
        spec = options.spec(num_qo_heads, num_kv_heads, head_dim, page_size)
        batch_size, q_len = last_page_len.shape[0], options.q_len_per_req
        metadata = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        self._check_spec(spec, options.split_tokens(page_size))
        if self._buffers:
            self._check_batch_size(batch_size, self._buffers[-1].shape[0])
            self._check_staging(metadata)
        indptr, indices, last_page_len = self._stage(options.non_blocking, **metadata)
        if lens is None:
            lens = page_lens(indptr, last_page_len, page_size)
        self._plan_batch(
            spec,
            PagedBatch(
                self._uniform_rows(batch_size, q_len),
                self._stage_lens(lens),
                page_indptr=indptr,
                page_indices=indices,
                max_qo_len=q_len,
            ),
            num_tokens=batch_size * q_len,
            split_tokens=options.split_tokens(page_size),
            max_qo_len=q_len,
        )
        self._q_len_per_req = q_len

    begin_forward = plan

    def _check_plan(
        self,
        options: DecodeOptions,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor | None:
        """Check a step's arguments; return each request's tokens, if the host knows them."""
        options.check(self._name)
        lens = check_page_table(_NAMES, indptr, indices, last_page_len, page_size, self._device)
        check_lens("seq_lens", options.seq_lens, lens, "the page table")
        q_len = options.q_len_per_req
        if q_len > 1 and not self._use_tensor_cores:
            raise ValueError(f"q_len_per_req must be 1 without use_tensor_cores=True; got {q_len}")
        frozen = self._q_len_per_req if self.is_cuda_graph_enabled else None
        if frozen not in (None, q_len):
            raise ValueError(
                f"q_len_per_req is frozen at {frozen} by the first plan() with use_cuda_graph; "
                f"got {q_len}. Use a wrapper for each value"
            )
        if q_len > 1 and lens is not None and lens.numel() and int(lens.min()) < q_len:
            raise ValueError(
                f"indptr and last_page_len must give every request at least q_len_per_req = "
                f"{q_len} cached tokens, its new ones included; got {int(lens.min())}, which "
                f"leaves its first rows an empty KV range"
            )
        return lens

    def _uniform_rows(self, batch_size: int, q_len: int) -> torch.Tensor:
        """Return the qo_indptr of requests with `q_len` rows each, kept from plan to plan."""
        if self._qo_indptr is None or self._rows_made != (batch_size, q_len):
            requests = torch.arange(batch_size + 1, dtype=torch.int32, device=self._device)
            self._qo_indptr, self._rows_made = requests * q_len, (batch_size, q_len)
        return self._qo_indptr

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: PagedCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of the planned step for one layer.

        Args:
            q: [batch_size * q_len_per_req, num_qo_heads, head_dim], q_data_type.
            paged_kv_cache: kv_data_type; one tensor [num_pages, 2, page_size, num_kv_heads,
                head_dim], or a pair [num_pages, page_size, num_kv_heads, head_dim]; "HND" swaps
                page_size and num_kv_heads. Any strides but the last.
            args: tensors and scalars of the variant in jit_args, in the order it names them.
            q_scale, k_scale, v_scale: factors on q, k and v: a float, or a float tensor of 1 or
                num_kv_heads elements.
            out: like q, o_data_type; allocated if None.
            lse: float32 [rows of q, num_qo_heads]; allocated if None and return_lse.
            return_lse: return (out, lse); lse has base 2 and is -inf where a row sees no key.
            enable_pdl: a hint, without effect on the result.
            window_left: what plan() was given, if not None.
            sinks: float32 [num_qo_heads], logits that join the softmax denominators (and lse).
            q_len_per_req: deprecated; what plan() was given.
            skip_softmax_threshold_scale_factor, kv_cache_sf: must be None.

        Raises:
            TypeError, ValueError: an argument does not fit the plan; the message names it.
        """
        values = self._take_values(args)
        refuse(
            self._name,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )
        _, step = self._planned()
        if q_len_per_req is not None:
            warnings.warn(
                f"{self._name}.run: q_len_per_req is deprecated; pass it to plan()",
                DeprecationWarning,
                stacklevel=2,
            )
        if q_len_per_req not in (None, self._q_len_per_req) or q.shape[0] != step.num_tokens:
            raise ValueError(
                f"q must have batch_size * q_len_per_req rows as planned "
                f"({step.batch.num_requests} * {self._q_len_per_req}); got "
                f"q.shape[0] = {q.shape[0]}, q_len_per_req = {q_len_per_req}. Plan again to change"
            )
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
            variant_values=values,
        )

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            pos_encoding_mode,
            q_scale,
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
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            causal=True,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(  # type: ignore[return-value]
            q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True
        )
