"""The fused step between the qkv projection and attention: norm of q and k, rope, append.

On CUDA a call is one launch on the current stream that reads q, k and v once and writes q, and K
and V to their pages, once; it may be captured in a graph once a call with the same dtypes has
compiled or loaded the kernel. It never waits for the device, so no value in a tensor raises an
error: K and V without a place in the cache are skipped, and so is the whole of a token whose
position is not in the cos-sin cache, where the CPU refuses the call. On the CPU the step goes
through the kernels of its parts. Either way arithmetic is in float32 and each result, K in an fp8
cache too, is rounded once.
"""

from __future__ import annotations

import torch

from fi_backend._page_ops import unbind_cache
from fi_backend._rope_append_ops import ROPE_APPEND_POSITIONS, ROPE_APPEND_SLOTS
from fi_backend.torch_ops import runs_directly

__all__ = ["rope_append_paged_kv_cache", "rope_append_to_cache"]


def rope_append_to_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    is_neox: bool = True,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, write K and V to slots of a paged cache, and return the queries.

    Args:
        query: [num_tokens, num_qo_heads, head_dim]; float32, float16 or bfloat16. Views of any
            strides but a contiguous last dimension, as all rows here.
        key: [num_tokens, num_kv_heads, head_dim], the dtype of `query`.
        value: [num_tokens, num_kv_heads, head_dim_vo], the dtype of `query`.
        positions: int32 or int64 [num_tokens], rows of `cos_sin_cache`.
        cos_sin_cache: [max_position, rotary_dim], float32 or the dtype of `query`; cosines then
            sines. Values of a head behind rotary_dim are not rotated.
        kv_cache: (k, v), each [num_pages, page_size, num_kv_heads, head_dim], views of any strides
            but a contiguous last dimension; float32, float16, bfloat16, float8_e4m3fn or
            float8_e5m2.
        slot_mapping: int32 or int64 [num_slots], at most num_tokens of them counting; slot =
            page * page_size + offset. K and V of a token without a slot, or with a negative one,
            are not written.
        is_neox: pairs are (i, i + rotary_dim / 2) rather than (2i, 2i + 1).
        q_weight: [head_dim], the dtype of `query`: each head of it is RMS-normalised, and scaled by
            this, before it is rotated. None: it is not.
        k_weight: the same for `key`.
        eps: added to the mean square of a head.
        weight_bias: added to the weights: 1.0 for Gemma's convention.
        k_scale: an fp8 cache stores ``saturate(key / k_scale)``; a float, or a float32 tensor of
            one element or one per kv head. Caches of other dtypes ignore it.
        v_scale: the same for `value`.
        out: where queries go, like `query`; may be `query`. None: a new tensor.
        enable_pdl: on CUDA, launch as a programmatic dependent of the kernel before. None: where
            the GPU can (compute capability 9.0 and later). Results do not depend on it.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed, head_dim is above 512 (CUDA), a
            position or slot is outside its cache, or a scale is not above 0. (On CUDA positions,
            slots, and scales in tensors, are not looked at.)
    """
    k_cache, v_cache = kv_cache
    directly = runs_directly(
        "rope_append_to_cache",
        query=query,
        key=key,
        value=value,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
    )
    if out is None:
        out = torch.empty_like(query)
    run = ROPE_APPEND_SLOTS.direct if directly else ROPE_APPEND_SLOTS.traced
    run(
        query,
        key,
        value,
        out,
        positions,
        cos_sin_cache,
        k_cache,
        v_cache,
        slot_mapping,
        not is_neox,
        q_weight,
        k_weight,
        eps,
        weight_bias,
        *_split_scales(k_scale, v_scale),
        enable_pdl is not False,
    )
    return out


def rope_append_paged_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_layout: str = "NHD",
    *,
    is_neox: bool = True,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Write K and V at positions of their requests; otherwise as :func:`rope_append_to_cache`.

    Args:
        query: [num_tokens, num_qo_heads, head_dim].
        key: [num_tokens, num_kv_heads, head_dim].
        value: [num_tokens, num_kv_heads, head_dim].
        pos_ids: int32 or int64 [num_tokens], rows of `cos_sin_cache`.
        cos_sin_cache: [max_position, rotary_dim], float32 or the dtype of `query`.
        batch_indices: int32 [num_tokens], the request of each token; K and V of a token with a
            negative one are not written.
        positions: int32 [num_tokens], where in its request each token goes.
        paged_kv_cache: one tensor or a pair, as :func:`fi_backend.append_paged_kv_cache` takes it.
        kv_indices: int32 [kv_indptr[-1]], page ids.
        kv_indptr: int32 [num_requests + 1], where each request's pages begin in `kv_indices`.
        kv_layout: "NHD" or "HND".
    """
    k_cache, v_cache = unbind_cache(paged_kv_cache, kv_layout)
    directly = runs_directly(
        "rope_append_paged_kv_cache",
        query=query,
        key=key,
        value=value,
        pos_ids=pos_ids,
        cos_sin_cache=cos_sin_cache,
        batch_indices=batch_indices,
        positions=positions,
        k_cache=k_cache,
        v_cache=v_cache,
        kv_indices=kv_indices,
        kv_indptr=kv_indptr,
    )
    if out is None:
        out = torch.empty_like(query)
    run = ROPE_APPEND_POSITIONS.direct if directly else ROPE_APPEND_POSITIONS.traced
    run(
        query,
        key,
        value,
        out,
        pos_ids,
        cos_sin_cache,
        k_cache,
        v_cache,
        batch_indices,
        positions,
        kv_indices,
        kv_indptr,
        not is_neox,
        q_weight,
        k_weight,
        eps,
        weight_bias,
        *_split_scales(k_scale, v_scale),
        enable_pdl is not False,
    )
    return out


def _split_scales(
    k_scale: float | torch.Tensor, v_scale: float | torch.Tensor
) -> tuple[float, float, torch.Tensor | None, torch.Tensor | None]:
    """Return both as numbers, then both as tensors: what an op's schema can say."""
    k_scales = k_scale if isinstance(k_scale, torch.Tensor) else None
    v_scales = v_scale if isinstance(v_scale, torch.Tensor) else None
    return (
        1.0 if isinstance(k_scale, torch.Tensor) else k_scale,
        1.0 if isinstance(v_scale, torch.Tensor) else v_scale,
        k_scales,
        v_scales,
    )
