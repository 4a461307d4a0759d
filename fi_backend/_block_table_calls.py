"""Attention over tables of cache pages, under the names that FlashInfer has for it.

A call plans and runs: on a GPU that is one launch more for each layer than a wrapper takes, whose
plan serves all layers of a step.
"""

from __future__ import annotations

import math

import torch

from fi_backend._arguments import PagedCache, check_backend, refuse
from fi_backend._block_tables import BlockTableStep
from fi_backend.checks import check_tensor
from fi_backend.errors import UnsupportedError

__all__ = [
    "trtllm_batch_context_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache",
    "xqa_batch_decode_with_kv_cache",
]


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    bmm1_scale_log2: torch.Tensor | None = None,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    enable_block_sparse_attention: bool = False,
    bf16q_fp8kv_transform_mode: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the newest tokens of each request to its pages, as a block table names them.

    Row i of a request with n rows sees keys up to i + seq_len - n. On a GPU the call only launches,
    and may be captured in a CUDA graph, which holds its replays to the same shapes, scales that are
    floats, and most rows of a request.

    Args:
        query: [num_rows, num_qo_heads, head_dim]; float32, bfloat16 or float16 (on a GPU one of the
            latter two). A request's rows follow one another.
        kv_cache: one tensor [num_pages, 2, num_kv_heads, page_size, head_dim], or a pair
            [num_pages, num_kv_heads, page_size, head_dim]; "NHD" swaps page_size and num_kv_heads.
            dtype as query, or fp8.
        workspace_buffer: scratch of any dtype on the device, contiguous, 16-byte aligned. One that
            is too small, even an empty one, is not used. Calls that share one must run one after
            the other.
        block_tables: int32 [batch_size, max_pages], page ids; those past a length are not read.
        seq_lens: int32 or uint32 [batch_size], keys of each request, its newest tokens included.
        max_seq_len: most of `seq_lens`.
        bmm1_scale: factor on q . k, 1 / sqrt(head_dim) and the scale of an fp8 cache included; a
            float, or a float32 tensor of 1 or num_kv_heads elements.
        bmm2_scale: factor on the result; the same.
        window_left: keys left of its own position that a row sees; -1 for all.
        out: [num_rows, num_qo_heads, head_dim]; allocated if None.
        out_dtype: that of `out`; dtype of query if None.
        o_sf_scale, o_sf_vec_size, skip_softmax_threshold_scale_factor, kv_cache_sf: must be None.
        sinks: float32 [num_qo_heads], logits that join the softmax denominator, or None.
        kv_layout: "HND" or "NHD".
        enable_pdl, bf16q_fp8kv_transform_mode: hints, without effect on the result.
        backend: "auto", "trtllm-gen" or "xqa", all of which name the same kernels.
        q_len_per_req: rows of every request; 1 if None.
        o_scale: must be 1.0.
        mask: must be None, but with backend "trtllm-gen", for which it says nothing.
        max_q_len: most rows of a request. This and the next are given together, in the place of
            q_len_per_req, where requests differ in them.
        cum_seq_lens_q: int32 [batch_size + 1], first row of each request. Rows of `query` from the
            last entry on are padding: `out` and `lse` are left alone there if given, else 0.
        uses_shared_paged_kv_idx: must be True: keys and values lie in the same pages.
        lse: float32 [num_rows, num_qo_heads], written if it is given.
        return_lse: return (out, lse); lse has base 2, and is -inf where a row sees no key.
        bmm1_scale_log2: float32 [1], log2(e) times the factor on q . k, in the place of bmm1_scale.
        multi_ctas_kv_counter_buffer: not needed, and left alone.
        enable_block_sparse_attention: must be False.

    Returns:
        `out`, or (out, lse).

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
    """
    name = "trtllm_batch_decode_with_kv_cache"
    check_backend(name, backend)
    refuse(
        name,
        o_sf_scale=o_sf_scale,
        o_sf_vec_size=o_sf_vec_size,
        o_scale=None if o_scale == 1.0 else o_scale,
        # Which FlashInfer's kernels of that name do not look at either.
        mask=None if backend == "trtllm-gen" else mask,
        skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        kv_cache_sf=kv_cache_sf,
        enable_block_sparse_attention=enable_block_sparse_attention,
    )
    _check_shared_pages(name, uses_shared_paged_kv_idx)
    if bmm1_scale_log2 is not None:
        bmm1_scale = bmm1_scale_log2 * math.log(2.0)
    step = BlockTableStep(
        name,
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        sinks,
        kv_layout,
        out_dtype=out_dtype,
        lse=lse,
        return_lse=return_lse,
    )
    step.check()
    if (max_q_len is None) != (cum_seq_lens_q is None):
        raise ValueError("give max_q_len and cum_seq_lens_q, or neither; got one of them")
    if cum_seq_lens_q is None or max_q_len is None:
        most = 1 if q_len_per_req is None else q_len_per_req
        rows = step.uniform_rows(most)
    else:
        most, rows = max_q_len, step.given_rows("cum_seq_lens_q", cum_seq_lens_q)
    return step.attend(
        rows,
        max_qo_len=most,
        max_kv_len=max_seq_len,
        max_layer_rows=most,
        may_be_padded=cum_seq_lens_q is not None,
    )


def xqa_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    enable_pdl: bool | None = None,
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    kv_cache_sf: PagedCache | None = None,
    q_cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as trtllm_batch_decode_with_kv_cache() does, whose layout by default is another.

    Args:
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale,
            bmm2_scale, window_left, out, sinks, enable_pdl: as there.
        kv_layout: "NHD" or "HND".
        q_len_per_req: rows of every request; with q_cu_seq_lens, the most of a request.
        o_scale: must be 1.0.
        mask, kv_cache_sf: must be None.
        q_cu_seq_lens: int32 [batch_size + 1], first row of each request, where requests differ in
            their rows.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
    """
    name = "xqa_batch_decode_with_kv_cache"
    refuse(
        name,
        o_scale=None if o_scale == 1.0 else o_scale,
        mask=mask,
        kv_cache_sf=kv_cache_sf,
    )
    step = BlockTableStep(
        name,
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        sinks,
        kv_layout,
    )
    step.check()
    most = 1 if q_len_per_req is None else q_len_per_req
    if q_cu_seq_lens is None:
        rows = step.uniform_rows(most)
    else:
        rows = step.given_rows("q_cu_seq_lens", q_cu_seq_lens)
    result = step.attend(
        rows,
        max_qo_len=most,
        max_kv_len=max_seq_len,
        max_layer_rows=most,
        may_be_padded=q_cu_seq_lens is not None,
    )
    assert isinstance(result, torch.Tensor)
    return result


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: PagedCache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float | torch.Tensor,
    bmm2_scale: float | torch.Tensor,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    sinks: torch.Tensor | None = None,
    kv_cache_sf: PagedCache | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    use_fp16_softmax: bool | None = None,
    uses_spcompress: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from chunks of prompts to their requests' pages, as a block table names them.

    Args:
        query, kv_cache, workspace_buffer, block_tables, seq_lens, bmm1_scale, bmm2_scale, out,
            out_dtype, sinks, kv_layout, enable_pdl, lse, return_lse, multi_ctas_kv_counter_buffer,
            uses_shared_paged_kv_idx: as for trtllm_batch_decode_with_kv_cache().
        max_q_len: most rows of a request.
        max_kv_len: most of `seq_lens`.
        batch_size: requests.
        cum_seq_lens_q: int32 [batch_size + 1], first row of each request.
        cum_seq_lens_kv: int32 [batch_size + 1]. It says nothing that seq_lens does not, and is not
            read.
        window_left: as there; with -1 alone if not causal.
        causal: row i of a request with n rows sees keys up to i + seq_len - n, else all.
        o_sf_scale, o_sf_vec_size, kv_cache_sf, skip_softmax_threshold_scale_factor,
            use_fp16_softmax, uses_spcompress: must be None.

    Returns:
        `out`, or (out, lse).

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
    """
    name = "trtllm_batch_context_with_kv_cache"
    refuse(
        name,
        o_sf_scale=o_sf_scale,
        o_sf_vec_size=o_sf_vec_size,
        kv_cache_sf=kv_cache_sf,
        skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        use_fp16_softmax=use_fp16_softmax,
        uses_spcompress=uses_spcompress,
    )
    _check_shared_pages(name, uses_shared_paged_kv_idx)
    if not causal and window_left >= 0:
        raise UnsupportedError(
            f"{name}: window_left must be -1 without causal; got {window_left}. "
            f"BatchPrefillWithPagedKVCacheWrapper takes both"
        )
    step = BlockTableStep(
        name,
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        sinks,
        kv_layout,
        out_dtype=out_dtype,
        lse=lse,
        return_lse=return_lse,
    )
    step.check()
    if batch_size != step.batch_size:
        raise ValueError(
            f"batch_size must be that of seq_lens, {step.batch_size}; got {batch_size}"
        )
    check_tensor("cum_seq_lens_kv", cum_seq_lens_kv, shape=(batch_size + 1,))
    rows = step.given_rows("cum_seq_lens_q", cum_seq_lens_q)
    return step.attend(
        rows, max_qo_len=max_q_len, max_kv_len=max_kv_len, causal=causal, may_be_padded=True
    )


def _check_shared_pages(operation: str, uses_shared_paged_kv_idx: bool) -> None:
    if not uses_shared_paged_kv_idx:
        raise UnsupportedError(
            f"{operation}: uses_shared_paged_kv_idx must be True; got False. Number pages "
            f"such that a key and its value have one id"
        )
