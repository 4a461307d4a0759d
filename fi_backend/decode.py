"""Decode attention with FlashInfer's calls."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend._batch_decode import BatchDecodeWithPagedKVCacheWrapper
from fi_backend._block_table_calls import (
    trtllm_batch_decode_with_kv_cache,
    xqa_batch_decode_with_kv_cache,
)
from fi_backend._page_table import check_lens
from fi_backend._single import single_attention, single_variant_attention
from fi_backend.checks import check_tensor
from fi_backend.variants import AttentionVariant

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
    "single_decode_with_kv_cache_with_jit_module",
    "trtllm_batch_decode_with_kv_cache",
    "xqa_batch_decode_with_kv_cache",
]


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from one new token of one request to its keys.

    Args:
        q: [num_qo_heads, head_dim]; float32, bfloat16 or float16.
        k: [kv_len, num_kv_heads, head_dim], or [num_kv_heads, kv_len, head_dim] for "HND"; dtype
            as q, or fp8.
        v: as k; its head_dim may differ.
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated here, on a GPU in copies) or
            "ALIBI".
        use_tensor_cores: a hint, without effect on the result.
        q_scale, k_scale, v_scale: factors on q, k and v.
        window_left: keys left of its own position that the token sees; -1 for all.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
        sm_scale: factor on q . k; 1 / sqrt(head_dim) if None.
        rope_scale, rope_theta: for "ROPE_LLAMA"; 1.0 and 1e4 if None.
        return_lse: return (out, lse), lse being float32 [num_qo_heads], base 2.

    Returns:
        [num_qo_heads, head_dim of v], dtype of q.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
    """
    check_tensor("q", q, shape=(None, None))
    result = single_attention(
        "single_decode_with_kv_cache",
        q.unsqueeze(0),
        k,
        v,
        kv_layout=kv_layout,
        causal=False,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
    )
    if isinstance(result, tuple):
        return result[0].squeeze(0), result[1].squeeze(0)
    return result.squeeze(0)


def single_decode_with_kv_cache_with_jit_module(
    jit_module: AttentionVariant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    kv_layout: str = "NHD",
    window_left: int = -1,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from one new token of one request to its keys, as a variant says.

    Args:
        jit_module: the variant.
        q, k, v, kv_layout, window_left: as for single_decode_with_kv_cache().
        args: tensors and scalars of the variant, in the order it names them.
        return_lse: as there; False for a variant that does not use softmax.

    Returns:
        [num_qo_heads, head_dim of v], dtype of q.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
        BuildError: the variant does not compile.
    """
    check_tensor("q", q, shape=(None, None))
    result = single_variant_attention(
        "single_decode_with_kv_cache_with_jit_module",
        jit_module,
        (q.unsqueeze(0), k, v),
        args,
        kv_layout=kv_layout,
        causal=False,
        window_left=window_left,
        return_lse=return_lse,
    )
    if isinstance(result, tuple):
        return result[0].squeeze(0), result[1].squeeze(0)
    return result.squeeze(0)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The batch decode wrapper with use_cuda_graph, whose page table lives in fixed buffers.

    Args:
        workspace_buffer: scratch of any dtype, 16-byte aligned.
        indptr_buffer: int32 [batch_size + 1].
        indices_buffer: int32 [most pages of a step].
        last_page_len_buffer: int32 [batch_size].
        kv_layout: "NHD" or "HND".
        use_tensor_cores: needed for q_len_per_req > 1.
    """

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
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
    q_data_type: str | torch.dtype | None = None,
    kv_data_type: str | torch.dtype | None = None,
    data_type: str | torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """Plan a step of a decode wrapper; engines put this in the place of its begin_forward().

    Our plan() waits for nothing that this could save, so both do the same.

    Args:
        self: the wrapper. The others are those of BatchDecodeWithPagedKVCacheWrapper.plan(), and
        global_override_indptr_cpu: int32 [batch_size + 1], a host copy of `indptr`; it must agree,
            which is checked where `indptr` is on the host.

    Raises:
        TypeError, ValueError: as plan(); also if q_len_per_req > 1 and no plan() came before.
    """
    if q_len_per_req > 1 and self._plan is None:
        raise ValueError(
            f"q_len_per_req must be 1 without a prior plan() of this wrapper; got {q_len_per_req}"
        )
    check_lens("global_override_indptr_cpu", global_override_indptr_cpu, indptr, "indptr")
    # The class's own: callers put partial(fast_decode_plan, wrapper) in the place of wrapper.plan.
    type(self).plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        q_data_type=q_data_type,
        kv_data_type=kv_data_type,
        data_type=data_type,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        non_blocking=non_blocking,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
        q_len_per_req=q_len_per_req,
    )
