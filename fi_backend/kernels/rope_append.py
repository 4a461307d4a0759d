"""From qkv to the paged cache in one launch: norm of q and k, rope, append. CUDA only."""

from __future__ import annotations

from dataclasses import replace

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.append_kv import append_cuda_spec
from fi_backend.kernels.functions import Functions, check_float, cuda_spec

__all__ = ["rope_append_cuda_spec", "rope_append_positions", "rope_append_slots"]

# Exports of so many arguments take g++ longer than the kernels take nvcc: a file for each.
_TEMPLATES = (
    "rope_append_cuda.cu.j2",
    "rope_append_cuda_slots.cc.j2",
    "rope_append_cuda_positions.cc.j2",
)


def rope_append_cuda_spec(dtype: torch.dtype, cache_dtype: torch.dtype) -> KernelSpec:
    """Describe the module for q, k and v of `dtype` and a cache of `cache_dtype`.

    Args:
        dtype: float32, float16 or bfloat16.
        cache_dtype: one of those, float8_e4m3fn or float8_e5m2.

    Raises:
        TypeError: a dtype is not allowed.
    """
    check_float("rope_append", dtype)
    append_cuda_spec(dtype, cache_dtype)  # checks the cache's dtype
    spec = cuda_spec("rope_append", {"in": dtype, "cache": cache_dtype})
    return replace(spec, templates=_TEMPLATES)


_rope_append_slots = Functions("rope_append_slots", lambda dtypes: rope_append_cuda_spec(*dtypes))
_rope_append_positions = Functions(
    "rope_append_positions", lambda dtypes: rope_append_cuda_spec(*dtypes)
)


def rope_append_slots(
    *,
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_out: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    interleave: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    k_scale: tuple[float, torch.Tensor | None],
    v_scale: tuple[float, torch.Tensor | None],
    enable_pdl: bool,
) -> None:
    """Normalise and rotate q and key, write q to `q_out` and key and value to slots of a cache.

    No value of a tensor is looked at: a slot outside the cache is skipped, and so is the whole of a
    token whose position is not in `cos_sin_cache`.

    Args:
        q: [num_tokens, num_qo_heads, head_dim], float32, float16 or bfloat16.
        key: [num_tokens, num_kv_heads, head_dim], the dtype of `q`.
        value: [num_tokens, num_kv_heads, head_dim_vo], the dtype of `q`.
        q_out: like `q`; may be `q`.
        pos_ids: int32 or int64 [num_tokens], rows of `cos_sin_cache`.
        cos_sin_cache: [max_position, rotary_dim], float32 or the dtype of `q`; cosines then sines.
        key_cache: [num_pages, page_size, num_kv_heads, head_dim], any strides but the last.
        value_cache: [num_pages, page_size, num_kv_heads, head_dim_vo].
        slot_mapping: int32 or int64 [num_slots]; slot = page * page_size + offset. Tokens past its
            end have no slot.
        interleave: pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2).
        q_weight: [head_dim], the dtype of `q`. None: q is not normalised.
        k_weight: the same for key.
        eps: added to the mean square of a head.
        weight_bias: added to the weights.
        k_scale: an fp8 cache stores ``saturate(key / scale)``, scale being the tensor, float32 [],
            [1] or [num_kv_heads], or without one the number.
        v_scale: the same for value.
        enable_pdl: launch as a programmatic dependent of the kernel before.
    """
    _rope_append_slots[q.dtype, key_cache.dtype](
        q,
        key,
        value,
        q_out,
        pos_ids,
        cos_sin_cache,
        key_cache,
        value_cache,
        slot_mapping,
        interleave,
        q_weight,
        k_weight,
        eps,
        weight_bias,
        k_scale[1],
        v_scale[1],
        k_scale[0],
        v_scale[0],
        enable_pdl,
    )


def rope_append_positions(
    *,
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_out: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    interleave: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    k_scale: tuple[float, torch.Tensor | None],
    v_scale: tuple[float, torch.Tensor | None],
    enable_pdl: bool,
) -> None:
    """Write token i to position ``positions[i]`` of request ``batch_indices[i]``.

    Index tensors of the page table are int32, as for :func:`append_kv.append_positions`; everything
    else is as for :func:`rope_append_slots`.
    """
    _rope_append_positions[q.dtype, key_cache.dtype](
        q,
        key,
        value,
        q_out,
        pos_ids,
        cos_sin_cache,
        key_cache,
        value_cache,
        batch_indices,
        positions,
        kv_indices,
        kv_indptr,
        interleave,
        q_weight,
        k_weight,
        eps,
        weight_bias,
        k_scale[1],
        v_scale[1],
        k_scale[0],
        v_scale[0],
        enable_pdl,
    )
