"""Attention as one torch op, which torch.compile and fake tensors see."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.kernels import attention as attention_kernels
from fi_backend.torch_ops import register

__all__ = ["run_traced"]


def _attention(
    plan_buffer: torch.Tensor,
    partials: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    **arguments: Any,
) -> None:
    types: dict[str, Any] = dict(
        device_type=q.device.type,
        q_dtype=q.dtype,
        kv_dtype=k_cache.dtype,
        head_dim_qk=q.shape[2],
        head_dim_vo=out.shape[2],
    )
    many_rows_only = arguments.pop("many_rows_only", False)
    max_rows = arguments["max_qo_len"]
    if max_rows is not None:
        max_rows *= q.shape[1] // k_cache.shape[2]
    if arguments.get("q_rows") is None:
        kernels = attention_kernels.load(
            **types, o_dtype=out.dtype, many_rows_only=many_rows_only, max_rows=max_rows
        )
    else:
        kernels = attention_kernels.load_groups(**types)
    for name in ("k_scale", "v_scale"):
        scales = arguments.pop(f"{name}s")
        arguments[name] = arguments[name] if scales is None else scales
    kernels.run(
        plan_buffer=plan_buffer,
        partials=partials,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        out=out,
        **arguments,
    )


_op = register(
    "attention(Tensor plan_buffer, Tensor(a!) partials, Tensor q, Tensor k_cache, Tensor v_cache, "
    "Tensor(b!) out, *, Tensor(c!)? lse, Tensor qo_indptr, Tensor kv_lens, Tensor? page_indptr, "
    "Tensor? page_indices, Tensor? block_table, Tensor? request_rows, int? max_qo_len, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? custom_mask, Tensor? mask_indptr, "
    "Tensor? q_rows=None, Tensor? first_pages=None, Tensor? first_rows=None, "
    "Tensor? prior_out=None, Tensor? prior_lse=None, Tensor? prior_parts=None, "
    "Tensor? k_scales, Tensor? v_scales, "
    "float k_scale, float v_scale, float sm_scale, float logits_soft_cap, int window_left, "
    "bool causal, float rope_scale, float rope_theta, int num_workers, "
    "bool many_rows_only=False) -> ()",
    _attention,
)


def run_traced(
    *,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
    members: tuple[()],
    **arguments: Any,
) -> None:
    """Run through the op; arguments as `kernels.attention_line.LineKernels.run` takes them.

    A schema keeps tensors and floats apart, so each scale travels as two arguments; and it has no
    place for the members of a variant.
    """
    k_is_tensor, v_is_tensor = isinstance(k_scale, torch.Tensor), isinstance(v_scale, torch.Tensor)
    _op.traced(
        k_scales=k_scale if k_is_tensor else None,
        v_scales=v_scale if v_is_tensor else None,
        k_scale=1.0 if k_is_tensor else k_scale,
        v_scale=1.0 if v_is_tensor else v_scale,
        **arguments,
    )
