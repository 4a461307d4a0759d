"""The fused step between the qkv projection and attention as torch ops.

On CUDA it is one kernel. The CPU goes through the kernels of its parts, in float32, so that every
result is rounded once there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fi_backend.checks import check_tensor
from fi_backend.kernels import append_kv, norm, rope
from fi_backend.kernels import rope_append as kernel
from fi_backend.torch_ops import register

__all__ = ["ROPE_APPEND_POSITIONS", "ROPE_APPEND_SLOTS"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _Rows(NamedTuple):
    """What a step reads, and where its queries go."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    pos_ids: torch.Tensor
    cos_sin_cache: torch.Tensor


class _Options(NamedTuple):
    """What is the same for all tokens."""

    interleave: bool
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float
    weight_bias: float
    k_scale: float
    v_scale: float
    k_scales: torch.Tensor | None
    v_scales: torch.Tensor | None
    enable_pdl: bool


def _rope_append_slots(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *options: Any,
) -> None:
    rows = _Rows(query, key, value, out, pos_ids, cos_sin_cache)
    table = {"slot_mapping": slot_mapping}
    run = kernel.rope_append_slots, append_kv.append_slots
    _rope_append(*run, rows, (k_cache, v_cache), table, _Options(*options))


def _rope_append_positions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    *options: Any,
) -> None:
    rows = _Rows(query, key, value, out, pos_ids, cos_sin_cache)
    table = {
        "batch_indices": batch_indices,
        "positions": positions,
        "kv_indices": kv_indices,
        "kv_indptr": kv_indptr,
    }
    run = kernel.rope_append_positions, append_kv.append_positions
    _rope_append(*run, rows, (k_cache, v_cache), table, _Options(*options))


def _rope_append(
    fused: Callable[..., None],
    append: Callable[..., None],
    rows: _Rows,
    caches: tuple[torch.Tensor, torch.Tensor],
    table: dict[str, torch.Tensor],
    step: _Options,
) -> None:
    """Run the fused kernel on a GPU; elsewhere rotate in fp32, then append."""
    if rows.query.is_cuda:
        fused(**_cuda_arguments(rows, *caches, step), **table)
        return
    q_rope, k_rope = _rotate(rows, step)
    append(
        key=k_rope,
        value=rows.value.float(),
        key_cache=caches[0],
        value_cache=caches[1],
        k_scale=step.k_scale if step.k_scales is None else step.k_scales,
        v_scale=step.v_scale if step.v_scales is None else step.v_scales,
        **table,
    )
    rows.out.copy_(q_rope)


def _cuda_arguments(
    rows: _Rows, k_cache: torch.Tensor, v_cache: torch.Tensor, step: _Options
) -> dict[str, Any]:
    return {
        "q": rows.query,
        "key": rows.key,
        "value": rows.value,
        "q_out": rows.out,
        "pos_ids": rows.pos_ids,
        "cos_sin_cache": rows.cos_sin_cache,
        "key_cache": k_cache,
        "value_cache": v_cache,
        "interleave": step.interleave,
        "q_weight": step.q_weight,
        "k_weight": step.k_weight,
        "eps": step.eps,
        "weight_bias": step.weight_bias,
        "k_scale": (step.k_scale, step.k_scales),
        "v_scale": (step.v_scale, step.v_scales),
        "enable_pdl": step.enable_pdl,
    }


def _float_angles(rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles in float32, and where in them each token's are.

    A cache of another dtype may be far longer than the step: its rows are converted, not all of it.
    """
    cache, positions = rows.cos_sin_cache, rows.pos_ids
    dtypes = (torch.float32, rows.query.dtype)
    check_tensor("cos_sin_cache", cache, shape=(None, None), dtype=dtypes)
    if cache.dtype == torch.float32:
        return cache, positions
    dtypes = (torch.int32, torch.int64)
    check_tensor("positions", positions, shape=rows.query.shape[:1], dtype=dtypes)
    outside = (positions < 0) | (positions >= len(cache))
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"positions: must be in [0, {len(cache)}), the rows of cos_sin_cache, "
            f"got positions[{at}] = {int(positions[at])}"
        )
    return cache[positions].float(), torch.arange(len(positions))


def _rotate(rows: _Rows, step: _Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k, normalised and rotated, in float32; nothing is written before all is checked.

    Raises:
        TypeError, ValueError: see :func:`fi_backend.rope_append.rope_append_to_cache`.
    """
    dtype, shape = rows.query.dtype, rows.query.shape
    check_tensor("query", rows.query, shape=(None, None, None), dtype=_FLOATS)
    check_tensor("key", rows.key, shape=(shape[0], None, shape[2]), dtype=dtype)
    heads = rows.key.shape[1]
    check_tensor("value", rows.value, shape=(shape[0], heads, None), dtype=dtype)
    check_tensor("out", rows.out, shape=shape, dtype=dtype)
    angles, positions = _float_angles(rows)
    rotated = []
    for name, x, weight in (
        ("q_weight", rows.query, step.q_weight),
        ("k_weight", rows.key, step.k_weight),
    ):
        x = x.to(torch.float32, copy=True)
        if weight is not None:
            check_tensor(name, weight, shape=(shape[2],), dtype=dtype)
            norm.rmsnorm(
                out=x,
                input=x,
                weight=weight.float(),
                residual=None,
                eps=step.eps,
                weight_bias=step.weight_bias,
            )
        rotated.append(x)
    q_rope, k_rope = rotated
    rope.rope_cos_sin(
        q=q_rope,
        k=k_rope,
        q_out=q_rope,
        k_out=k_rope,
        positions=positions,
        cos_sin_cache=angles,
        head_dim=shape[2],
        interleave=step.interleave,
    )
    return q_rope, k_rope


_ROWS = (
    "Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor pos_ids, "
    "Tensor cos_sin_cache, Tensor(b!) k_cache, Tensor(c!) v_cache"
)
_OPTIONS = (
    "bool interleave, Tensor? q_weight, Tensor? k_weight, float eps, float weight_bias, "
    "float k_scale, float v_scale, Tensor? k_scales, Tensor? v_scales, bool enable_pdl"
)

ROPE_APPEND_SLOTS = register(
    f"rope_append_slots({_ROWS}, Tensor slot_mapping, {_OPTIONS}) -> ()", _rope_append_slots
)
ROPE_APPEND_POSITIONS = register(
    f"rope_append_positions({_ROWS}, Tensor batch_indices, Tensor positions, Tensor kv_indices, "
    f"Tensor kv_indptr, {_OPTIONS}) -> ()",
    _rope_append_positions,
)
