"""Rotary position embedding with FlashInfer's calls.

q [num_tokens, num_qo_heads, head_dim] and k [num_tokens, num_kv_heads, head_dim] are float32,
float16 or bfloat16 with a contiguous last dimension, on the CPU or on CUDA, all tensors of a call
on one device. Angles are reduced in float64, the rotation is in float32 and its result is rounded
once. Index tensors are int32 or int64.

On CUDA a call is one launch on the current stream, and may be captured in a graph once a call with
the same dtype has compiled or loaded the kernel. It never waits for the device, so no value in a
tensor raises an error: tokens that no request owns, or whose position is not in the cos-sin cache,
are not written. Offsets in `indptr` must rise.
"""

from __future__ import annotations

import math

import torch

from fi_backend._rope_ops import COS_SIN, COS_SIN_INPLACE, ROPE, ROPE_INPLACE
from fi_backend.torch_ops import runs_directly

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]

_Pair = tuple[torch.Tensor, torch.Tensor]
# (slope, offset) of the ramp between scaled and unscaled frequencies: without one, all are scaled.
_NO_RAMP = (0.0, 0.0)


def _apply(
    operation: str,
    q: torch.Tensor,
    k: torch.Tensor,
    tokens: dict[str, torch.Tensor],
    rotary_dim: int | None,
    interleave: bool,
    scale_and_theta: tuple[float, float],
    ramp: tuple[float, float],
    inplace: bool,
) -> _Pair:
    directly = runs_directly(operation, q=q, k=k, **tokens)
    arguments = (
        tokens.get("pos_ids"),
        tokens.get("indptr"),
        tokens.get("offsets"),
        q.shape[-1] if rotary_dim is None else rotary_dim,
        interleave,
        *map(float, scale_and_theta),
        *ramp,
    )
    if inplace:
        (ROPE_INPLACE.direct if directly else ROPE_INPLACE.traced)(q, k, *arguments)
        return q, k
    q_rope, k_rope = torch.empty_like(q), torch.empty_like(k)
    (ROPE.direct if directly else ROPE.traced)(q, k, q_rope, k_rope, *arguments)
    return q_rope, k_rope


def _llama31_ramp(
    low_freq_factor: float, high_freq_factor: float, old_context_len: int
) -> tuple[float, float]:
    """Slope and offset of (old_context_len / wavelength - low) / (high - low) in the frequency."""
    width = high_freq_factor - low_freq_factor
    if not width > 0:
        raise ValueError(
            f"high_freq_factor must be above low_freq_factor; got {high_freq_factor} and "
            f"{low_freq_factor}"
        )
    return old_context_len / (2 * math.pi * width), -low_freq_factor / width


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> _Pair:
    """Return rotated copies of ragged q and k.

    Args:
        q: [num_tokens, num_qo_heads, head_dim].
        k: [num_tokens, num_kv_heads, head_dim].
        indptr: [num_requests + 1]; request b owns tokens ``indptr[b]`` to ``indptr[b + 1]``. Rows
            that no request owns are undefined in the result.
        offsets: [num_requests], the position of each request's first token.
        rotary_dim: leading values of a head that are rotated; the others are copied. None: all.
        interleave: pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2).
        rope_scale: divides the frequencies.
        rope_theta: base of the frequencies.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride, device, index or number is not allowed. (On CUDA indices are
            not looked at.)
    """
    tokens = {"indptr": indptr, "offsets": offsets}
    scaling = (rope_scale, rope_theta)
    return _apply("apply_rope", q, k, tokens, rotary_dim, interleave, scaling, _NO_RAMP, False)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate q and k in place; otherwise as :func:`apply_rope`."""
    tokens = {"indptr": indptr, "offsets": offsets}
    scaling = (rope_scale, rope_theta)
    _apply("apply_rope_inplace", q, k, tokens, rotary_dim, interleave, scaling, _NO_RAMP, True)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> _Pair:
    """Return rotated copies of q and k, token t at ``pos_ids[t]``; else as :func:`apply_rope`."""
    tokens = {"pos_ids": pos_ids}
    scaling = (rope_scale, rope_theta)
    operation = "apply_rope_pos_ids"
    return _apply(operation, q, k, tokens, rotary_dim, interleave, scaling, _NO_RAMP, False)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate q and k in place; otherwise as :func:`apply_rope_pos_ids`."""
    tokens = {"pos_ids": pos_ids}
    scaling = (rope_scale, rope_theta)
    operation = "apply_rope_pos_ids_inplace"
    _apply(operation, q, k, tokens, rotary_dim, interleave, scaling, _NO_RAMP, True)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> _Pair:
    """Return rotated copies of ragged q and k, frequencies scaled as Llama 3.1 does.

    Frequencies whose wavelength is below ``old_context_len / high_freq_factor`` stay, those above
    ``old_context_len / low_freq_factor`` are divided by `rope_scale`, between them is a linear
    blend. Other arguments and errors are those of :func:`apply_rope`.
    """
    tokens = {"indptr": indptr, "offsets": offsets}
    ramp = _llama31_ramp(low_freq_factor, high_freq_factor, old_context_len)
    scaling = (rope_scale, rope_theta)
    return _apply("apply_llama31_rope", q, k, tokens, rotary_dim, interleave, scaling, ramp, False)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """Rotate q and k in place; otherwise as :func:`apply_llama31_rope`."""
    tokens = {"indptr": indptr, "offsets": offsets}
    ramp = _llama31_ramp(low_freq_factor, high_freq_factor, old_context_len)
    scaling = (rope_scale, rope_theta)
    operation = "apply_llama31_rope_inplace"
    _apply(operation, q, k, tokens, rotary_dim, interleave, scaling, ramp, True)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> _Pair:
    """Take token t's position from ``pos_ids[t]``; otherwise as :func:`apply_llama31_rope`."""
    tokens = {"pos_ids": pos_ids}
    ramp = _llama31_ramp(low_freq_factor, high_freq_factor, old_context_len)
    scaling = (rope_scale, rope_theta)
    operation = "apply_llama31_rope_pos_ids"
    return _apply(operation, q, k, tokens, rotary_dim, interleave, scaling, ramp, False)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """Rotate q and k in place; otherwise as :func:`apply_llama31_rope_pos_ids`."""
    tokens = {"pos_ids": pos_ids}
    ramp = _llama31_ramp(low_freq_factor, high_freq_factor, old_context_len)
    scaling = (rope_scale, rope_theta)
    operation = "apply_llama31_rope_pos_ids_inplace"
    _apply(operation, q, k, tokens, rotary_dim, interleave, scaling, ramp, True)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> _Pair:
    """Return copies of query and key, rotated by angles read from a cache.

    Args:
        positions: [num_tokens], rows of the cache.
        query: [num_tokens, num_qo_heads * head_size] (or [num_tokens, num_qo_heads, head_size]).
        key: [num_tokens, num_kv_heads * head_size], likewise.
        head_size: values of a head; those behind the rotary_dim of the cache are copied.
        cos_sin_cache: float32 [max_position, rotary_dim], cosines then sines.
        is_neox: pairs are (i, i + rotary_dim / 2) rather than (2i, 2i + 1).

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride, device or position is not allowed, or the cache not float32.
            (On CUDA positions are not looked at.)
    """
    directly = _check_cache(positions, query, key, cos_sin_cache)
    query_rope, key_rope = torch.empty_like(query), torch.empty_like(key)
    run = COS_SIN.direct if directly else COS_SIN.traced
    run(query, key, query_rope, key_rope, positions, cos_sin_cache, head_size, not is_neox)
    return query_rope, key_rope


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate query and key in place; otherwise as :func:`apply_rope_with_cos_sin_cache`."""
    directly = _check_cache(positions, query, key, cos_sin_cache)
    run = COS_SIN_INPLACE.direct if directly else COS_SIN_INPLACE.traced
    run(query, key, positions, cos_sin_cache, head_size, not is_neox)


def _check_cache(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin_cache: torch.Tensor
) -> bool:
    directly = runs_directly(
        "apply_rope_with_cos_sin_cache",
        positions=positions,
        query=query,
        key=key,
        cos_sin_cache=cos_sin_cache,
    )
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache must be float32; got {cos_sin_cache.dtype}")
    return directly
