"""Prefill attention with FlashInfer's calls: many new tokens per request."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fi_backend._arguments import check_backend, refuse
from fi_backend._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_backend._block_table_calls import trtllm_batch_context_with_kv_cache
from fi_backend._single import single_attention, single_variant_attention
from fi_backend.ragged import BatchPrefillWithRaggedKVCacheWrapper
from fi_backend.variants import AttentionVariant

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "single_prefill_with_kv_cache_with_jit_module",
    "trtllm_batch_context_with_kv_cache",
]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[torch.Tensor, torch.Tensor] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the new tokens of one request to its keys.

    Args:
        q: [qo_len, num_qo_heads, head_dim_qk]; float32, bfloat16 or float16.
        k: [kv_len, num_kv_heads, head_dim_qk], or [num_kv_heads, kv_len, head_dim_qk] for "HND";
            dtype as q, or fp8.
        v: as k, with head_dim_vo.
        scale_q, scale_k, scale_v, kv_cache_sf: must be None.
        o_dtype: dtype of the output; that of q if None.
        custom_mask: bool [qo_len, kv_len], True is seen; takes the place of `causal`.
        packed_custom_mask: uint8 [ceil(qo_len * kv_len / 8)], the same as bits, lowest first;
            takes precedence.
        causal: row i sees keys up to i + kv_len - qo_len.
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated here, on a GPU in copies) or
            "ALIBI".
        use_fp16_qk_reduction: a permission that is not used; sums are float32.
        sm_scale: factor on q . k; 1 / sqrt(head_dim_qk) if None.
        window_left: keys left of its own position that a row sees; -1 for all.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
        rope_scale, rope_theta: for "ROPE_LLAMA"; 1.0 and 1e4 if None.
        backend: "auto", "fa2" or "fa3"; one implementation serves all.
        return_lse: return (out, lse), lse being float32 [qo_len, num_qo_heads], base 2.
        k_scale, v_scale: factors on k and v.

    Returns:
        [qo_len, num_qo_heads, head_dim_vo], o_dtype.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
    """
    operation = "single_prefill_with_kv_cache"
    check_backend(operation, backend)
    refuse(operation, scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, kv_cache_sf=kv_cache_sf)
    return single_attention(
        operation,
        q,
        k,
        v,
        kv_layout=kv_layout,
        causal=causal,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        q_scale=None,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
        o_dtype=o_dtype,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
    )


single_prefill_with_kv_cache_return_lse = functools.partial(
    single_prefill_with_kv_cache, return_lse=True
)


_CAUSAL_BY_MASK_MODE = {0: False, 1: True}  # FlashInfer's MaskMode.NON_CAUSAL and CAUSAL


def single_prefill_with_kv_cache_with_jit_module(
    jit_module: AttentionVariant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    kv_layout: str = "NHD",
    mask_mode: int = 0,
    window_left: int = -1,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the new tokens of one request to its keys, as a variant says.

    Args:
        jit_module: the variant.
        q, k, v, kv_layout, window_left: as for single_prefill_with_kv_cache().
        args: tensors and scalars of the variant, in the order it names them.
        mask_mode: 0, every row sees every key, or 1, causal. Other masks are the variant's.
        return_lse: as there; False for a variant that does not use softmax.

    Returns:
        [qo_len, num_qo_heads, head_dim_vo], dtype of q.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
        UnsupportedError: the combination is not served.
        BuildError: the variant does not compile.
    """
    if mask_mode not in _CAUSAL_BY_MASK_MODE:
        raise ValueError(f"mask_mode must be 0 (all keys) or 1 (causal); got {mask_mode}")
    return single_variant_attention(
        "single_prefill_with_kv_cache_with_jit_module",
        jit_module,
        (q, k, v),
        args,
        kv_layout=kv_layout,
        causal=_CAUSAL_BY_MASK_MODE[mask_mode],
        window_left=window_left,
        return_lse=return_lse,
    )
