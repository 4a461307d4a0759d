"""Rotary position embedding."""

from __future__ import annotations

import torch

from fi_backend.trace.template import Scalar, Tensor, TraceTemplate

__all__ = ["TEMPLATES"]


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleave: bool
) -> torch.Tensor:
    """Rotate the leading values of heads; x is [num_tokens, num_heads, head_dim], float32."""
    rotary_dim = 2 * cosine.shape[-1]
    pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2) if interleave else (2, -1))
    first, second = pairs.unbind(-1 if interleave else -2)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    rotated = torch.stack(turned, -1 if interleave else -2).flatten(-2)
    return torch.cat([rotated, x[..., rotary_dim:]], -1)


def rotate_pair(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    frequency: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by position times frequency."""
    angle = positions.double()[:, None] * frequency
    cosine, sine = angle.cos().float(), angle.sin().float()
    return (
        rotate(q.float(), cosine, sine, interleave).to(q.dtype),
        rotate(k.float(), cosine, sine, interleave).to(k.dtype),
    )


def frequencies(rotary_dim: int, rope_theta: float, device: torch.device) -> torch.Tensor:
    """Angle of each pair at position 1, float64 [rotary_dim / 2]."""
    index = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    return rope_theta ** (-index / rotary_dim)


def llama31_frequencies(
    rotary_dim: int,
    rope_theta: float,
    rope_scale: float,
    low_freq_factor: float,
    high_freq_factor: float,
    old_context_len: int,
    device: torch.device,
) -> torch.Tensor:
    """Frequencies of which the low ones are divided by rope_scale, with a linear blend between."""
    frequency = frequencies(rotary_dim, rope_theta, device)
    wavelengths = old_context_len * frequency / (2 * torch.pi)  # in the old context
    width = high_freq_factor - low_freq_factor
    share = ((wavelengths - low_freq_factor) / width).clamp(0, 1)
    return share * frequency + (1 - share) * frequency / rope_scale


def ragged_positions(indptr: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Positions of ragged tokens: request b's begin at offsets[b]."""
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=indptr.device)
    for b in range(len(offsets)):
        first, last = int(indptr[b]), int(indptr[b + 1])
        positions[first:last] = torch.arange(last - first, device=indptr.device) + offsets[b]
    return positions


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate ragged q and k."""
    frequency = frequencies(rotary_dim or q.shape[-1], rope_theta, q.device) / rope_scale
    positions = ragged_positions(indptr, offsets, len(q))
    return rotate_pair(q, k, positions, frequency, interleave)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, token t at pos_ids[t]."""
    frequency = frequencies(rotary_dim or q.shape[-1], rope_theta, q.device) / rope_scale
    return rotate_pair(q, k, pos_ids, frequency, interleave)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate ragged q and k, frequencies scaled as Llama 3.1 does."""
    factors = (low_freq_factor, high_freq_factor, old_context_len)
    size = rotary_dim or q.shape[-1]
    frequency = llama31_frequencies(size, rope_theta, rope_scale, *factors, q.device)
    positions = ragged_positions(indptr, offsets, len(q))
    return rotate_pair(q, k, positions, frequency, interleave)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, token t at pos_ids[t], frequencies scaled as Llama 3.1 does."""
    factors = (low_freq_factor, high_freq_factor, old_context_len)
    size = rotary_dim or q.shape[-1]
    frequency = llama31_frequencies(size, rope_theta, rope_scale, *factors, q.device)
    return rotate_pair(q, k, pos_ids, frequency, interleave)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key [num_tokens, num_heads * head_size] by angles of a cache."""
    cosine, sine = cos_sin_cache[positions.long()].chunk(2, -1)
    heads = [x.float().unflatten(1, (-1, head_size)) for x in (query, key)]
    q, k = (rotate(x, cosine, sine, not is_neox).flatten(1) for x in heads)
    return q.to(query.dtype), k.to(key.dtype)


_Q = Tensor(("num_tokens", "num_qo_heads", "head_dim"), "q")
_K = Tensor(("num_tokens", "num_kv_heads", "head_dim"), "q")
_QUERY = Tensor(("num_tokens", "query_size"), "query")
_KEY = Tensor(("num_tokens", "key_size"), "query")
_TOKENS = Tensor(("num_tokens",), "int32")
_HEADS = ("num_qo_heads", "num_kv_heads", "head_dim")
_RAGGED = {
    "indptr": Tensor(("num_indptr",), "int32"),
    "offsets": Tensor(("num_requests",), "int32"),
}
_OPTIONS = {
    "rotary_dim": Scalar("int32"),
    "interleave": Scalar("bool"),
    "rope_scale": Scalar("float32"),
    "rope_theta": Scalar("float32"),
}
_LLAMA31 = {
    "low_freq_factor": Scalar("float32"),
    "high_freq_factor": Scalar("float32"),
    "old_context_len": Scalar("int32"),
}
_HELPERS = (rotate, rotate_pair, frequencies)

TEMPLATES = (
    *(
        TraceTemplate(
            op_type=reference.__name__,
            calls=(reference.__name__, f"{reference.__name__}_inplace"),
            const_axes=_HEADS,
            inputs={"q": _Q, "k": _K, **tokens, **_OPTIONS, **more},
            outputs={"q_rope": _Q, "k_rope": _K},
            reference=reference,
            helpers=(*_HELPERS, *helpers),
        )
        for reference, tokens, more, helpers in (
            (apply_rope, _RAGGED, {}, (ragged_positions,)),
            (apply_rope_pos_ids, {"pos_ids": _TOKENS}, {}, ()),
            (apply_llama31_rope, _RAGGED, _LLAMA31, (llama31_frequencies, ragged_positions)),
            (apply_llama31_rope_pos_ids, {"pos_ids": _TOKENS}, _LLAMA31, (llama31_frequencies,)),
        )
    ),
    TraceTemplate(
        op_type="apply_rope_with_cos_sin_cache",
        calls=("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace"),
        const_axes=("query_size", "key_size", "rotary_dim"),
        inputs={
            "positions": _TOKENS,
            "query": _QUERY,
            "key": _KEY,
            "head_size": Scalar("int32"),
            "cos_sin_cache": Tensor(("max_position", "rotary_dim"), "float32"),
            "is_neox": Scalar("bool"),
        },
        outputs={"query_rope": _QUERY, "key_rope": _KEY},
        reference=apply_rope_with_cos_sin_cache,
        helpers=(rotate,),
    ),
)
