"""Rotary position embedding of queries and keys.

On CUDA each call is one launch on the current stream, which raises no error for a value in a
tensor: tokens that no request owns, or whose position is not in the cache, are not written.
"""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions, float_cuda_spec, float_spec

__all__ = ["rope", "rope_cos_sin", "rope_cuda_spec", "rope_spec"]

# FlashInfer's calls have no argument for it; results do not depend on it.
_ENABLE_PDL = True


def rope_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the CPU module that rotates rows of `dtype` (float32, float16 or bfloat16)."""
    return float_spec("rope", dtype)


def rope_cuda_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the CUDA module that rotates rows of `dtype` (float32, float16 or bfloat16)."""
    return float_cuda_spec("rope", dtype)


_rope = Functions("rope", rope_spec)
_rope_cuda = Functions("rope", rope_cuda_spec)
_rope_cos_sin = Functions("rope_cos_sin", rope_spec)
_rope_cos_sin_cuda = Functions("rope_cos_sin", rope_cuda_spec)


def rope(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    pos_ids: torch.Tensor | None,
    indptr: torch.Tensor | None,
    offsets: torch.Tensor | None,
    rotary_dim: int,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
    smooth_slope: float,
    smooth_offset: float,
) -> None:
    """Rotate by angles computed from positions.

    Args:
        q: [num_tokens, num_qo_heads, head_dim], last dimension contiguous.
        k: [num_tokens, num_kv_heads, head_dim].
        q_out: like `q`; may be `q`.
        k_out: like `k`; may be `k`.
        pos_ids: int32 or int64 [num_tokens]. None: token t of request b, which owns the tokens
            from ``indptr[b]`` to ``indptr[b + 1]``, is at ``offsets[b] + t - indptr[b]``.
        indptr: int32 or int64 [num_requests + 1].
        offsets: int32 or int64 [num_requests].
        rotary_dim: leading values of a head that are rotated; the others are copied.
        interleave: pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2).
        rope_scale: divides the frequencies.
        rope_theta: base of the frequencies.
        smooth_slope: with `smooth_offset`, the ramp ``frequency * slope + offset`` of Llama 3.1
            between scaled (0) and unscaled (1) frequencies. Both 0: all are scaled.
        smooth_offset: see `smooth_slope`.
    """
    option: int
    if q.is_cuda:
        run, option = _rope_cuda[q.dtype], _ENABLE_PDL
    else:
        run, option = _rope[q.dtype], torch.get_num_threads()
    run(
        q,
        k,
        q_out,
        k_out,
        pos_ids,
        indptr,
        offsets,
        rotary_dim,
        interleave,
        rope_scale,
        rope_theta,
        smooth_slope,
        smooth_offset,
        option,
    )


def rope_cos_sin(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_dim: int,
    interleave: bool,
) -> None:
    """Rotate by angles read from a cache.

    Args:
        q: [num_tokens, num_qo_heads * head_dim] or [num_tokens, num_qo_heads, head_dim].
        k: the same for num_kv_heads.
        q_out: like `q`; may be `q`.
        k_out: like `k`; may be `k`.
        positions: int32 or int64 [num_tokens], rows of the cache.
        cos_sin_cache: float32 [max_position, rotary_dim], cosines then sines.
        head_dim: values of a head.
        interleave: pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2).
    """
    option: int
    if q.is_cuda:
        run, option = _rope_cos_sin_cuda[q.dtype], _ENABLE_PDL
    else:
        run, option = _rope_cos_sin[q.dtype], torch.get_num_threads()
    run(q, k, q_out, k_out, positions, cos_sin_cache, head_dim, interleave, option)
