"""Attention by its definition, one request at a time: the judge of every kernel.

`attention` computes in float64. `torch_attention` is what torch itself computes in the kernel's own
dtype; its error against `attention` is the yardstick of tests/tolerance.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what is done to logits; the same names as the kernels'."""

    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None  # [Hq]
    sinks: torch.Tensor | None = None  # [Hq], natural units
    custom_mask: torch.Tensor | None = None  # bool [qo_len, kv_len]
    rope_scale: float = 1.0
    rope_theta: float = 0.0


def visible(mask: Mask, qo_len: int, kv_len: int) -> torch.Tensor:
    """Return bool [qo_len, kv_len]: causal is bottom-right aligned, the window inclusive."""
    query = torch.arange(qo_len)[:, None] + (kv_len - qo_len)
    key = torch.arange(kv_len)[None, :]
    seen = torch.ones(qo_len, kv_len, dtype=torch.bool)
    if mask.causal:
        seen &= key <= query
    if mask.window_left >= 0:
        seen &= key >= query - mask.window_left
    if mask.custom_mask is not None:
        seen &= mask.custom_mask
    return seen


def rotate_half(
    x: torch.Tensor, positions: torch.Tensor, scale: float, theta: float
) -> torch.Tensor:
    """Rotate x [n, heads, D] by its positions [n], pairs (d, d + D / 2)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions.double()[:, None] / scale * frequency)[:, None, :]
    low, high = x[..., :half], x[..., half:]
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast, rotate, and repeat kv heads: three tensors [heads, rows, dim]."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask.rope_theta:
        qo_len, kv_len = q.shape[0], k.shape[0]
        rope = (mask.rope_scale, mask.rope_theta)
        q = rotate_half(q, torch.arange(qo_len) + (kv_len - qo_len), *rope)
        k = rotate_half(k, torch.arange(kv_len), *rope)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _alibi(mask: Mask, qo_len: int, kv_len: int, dtype: torch.dtype) -> torch.Tensor | None:
    if mask.alibi_slopes is None:
        return None
    distance = torch.arange(kv_len)[None, :] - torch.arange(qo_len)[:, None]
    return (mask.alibi_slopes.double()[:, None, None] * distance).to(dtype)


def _by_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    qo_len, kv_len = q.shape[0], k.shape[0]
    heads, keys, values = _prepare(q, k, v, mask, dtype)
    logits = heads @ keys.transpose(1, 2) * scale
    if mask.logits_soft_cap > 0:
        logits = mask.logits_soft_cap * torch.tanh(logits / mask.logits_soft_cap)
    alibi = _alibi(mask, qo_len, kv_len, dtype)
    if alibi is not None:
        logits = logits + alibi
    logits = logits.masked_fill(~visible(mask, qo_len, kv_len), -math.inf)
    empty = (logits == -math.inf).all(-1)  # also where kv_len is 0
    if mask.sinks is not None:
        sink = mask.sinks.to(dtype)[:, None, None].expand(-1, qo_len, 1)
        logits = torch.cat([logits, sink], dim=-1)
        values = torch.cat(
            [
                values,
                torch.zeros_like(values[:, :1])
                if kv_len
                else values.new_zeros(values.shape[0], 1, values.shape[2]),
            ],
            dim=1,
        )
    weights = torch.softmax(logits, dim=-1).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(logits.double(), -1) / math.log(2)
    lse = lse.masked_fill(empty, -math.inf)
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    sm_scale: float,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in float64.

    Args:
        q: [qo_len, Hq, Dqk].
        k: [kv_len, Hkv, Dqk].
        v: [kv_len, Hkv, Dvo].
        mask: masks and logit transforms.
        sm_scale: factor on logits.
        k_scale: factor on keys, a float or [Hkv].
        v_scale: factor on values, a float or [Hkv].

    Returns:
        out [qo_len, Hq, Dvo] and lse [qo_len, Hq] in base 2; (0, -inf) where no key is seen.
    """
    k, v = k.double(), v.double()
    k = k * (k_scale.double()[:, None] if isinstance(k_scale, torch.Tensor) else k_scale)
    v = v * (v_scale.double()[:, None] if isinstance(v_scale, torch.Tensor) else v_scale)
    return _by_formula(q, k, v, mask, sm_scale, torch.float64)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, *, sm_scale: float
) -> torch.Tensor:
    """Attend in q's own dtype with torch: its fused kernel, or the formula where it has none."""
    if mask.logits_soft_cap > 0 or mask.sinks is not None or mask.rope_theta or k.shape[0] == 0:
        return _by_formula(q, k, v, mask, sm_scale, q.dtype)[0]
    qo_len, kv_len = q.shape[0], k.shape[0]
    heads, keys, values = _prepare(q, k, v, mask, q.dtype)
    seen = visible(mask, qo_len, kv_len)
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -math.inf)
    alibi = _alibi(mask, qo_len, kv_len, q.dtype)
    bias = (bias if alibi is None else bias + alibi).expand(heads.shape[0], -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        heads[None], keys[None], values[None], attn_mask=bias[None], scale=sm_scale
    )[0]
    out = out.masked_fill(~seen.any(-1)[None, :, None], 0.0)
    return out.transpose(0, 1)
