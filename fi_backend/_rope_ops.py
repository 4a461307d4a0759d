"""The rotary kernels as torch ops, in place and not, with angles computed or from a cache."""

from __future__ import annotations

import torch

from fi_backend.kernels import rope as kernel
from fi_backend.torch_ops import register

__all__ = ["COS_SIN", "COS_SIN_INPLACE", "ROPE", "ROPE_INPLACE"]


def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
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
    kernel.rope(
        q=q,
        k=k,
        q_out=q_rope,
        k_out=k_rope,
        pos_ids=pos_ids,
        indptr=indptr,
        offsets=offsets,
        rotary_dim=rotary_dim,
        interleave=interleave,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        smooth_slope=smooth_slope,
        smooth_offset=smooth_offset,
    )


def _rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor | None,
    indptr: torch.Tensor | None,
    offsets: torch.Tensor | None,
    rotary_dim: int,
    interleave: bool,
    *frequencies: float,
) -> None:
    _rope(q, k, q, k, pos_ids, indptr, offsets, rotary_dim, interleave, *frequencies)


def _cos_sin(
    q: torch.Tensor,
    k: torch.Tensor,
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    interleave: bool,
) -> None:
    kernel.rope_cos_sin(
        q=q,
        k=k,
        q_out=q_rope,
        k_out=k_rope,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        head_dim=head_size,
        interleave=interleave,
    )


def _cos_sin_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    interleave: bool,
) -> None:
    _cos_sin(q, k, q, k, positions, cos_sin_cache, head_size, interleave)


_TO = "Tensor q, Tensor k, Tensor(a!) q_rope, Tensor(b!) k_rope"
_IN = "Tensor(a!) q, Tensor(b!) k"
_ROPE = (
    "Tensor? pos_ids, Tensor? indptr, Tensor? offsets, int rotary_dim, bool interleave, "
    "float rope_scale, float rope_theta, float smooth_slope, float smooth_offset"
)
_COS_SIN = "Tensor positions, Tensor cos_sin_cache, int head_size, bool interleave"

ROPE = register(f"rope({_TO}, {_ROPE}) -> ()", _rope)
ROPE_INPLACE = register(f"rope_inplace({_IN}, {_ROPE}) -> ()", _rope_inplace)
COS_SIN = register(f"rope_cos_sin({_TO}, {_COS_SIN}) -> ()", _cos_sin)
COS_SIN_INPLACE = register(f"rope_cos_sin_inplace({_IN}, {_COS_SIN}) -> ()", _cos_sin_inplace)
