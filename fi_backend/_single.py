"""Attention of one request whose keys lie in one piece: plan and run in one call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fi_backend._arguments import (
    alibi_slopes,
    check_device,
    check_layout,
    combine_scales,
    layer_spec,
    ragged_cache,
)
from fi_backend._custom_mask import resolve_mask
from fi_backend._rotated_keys import split_rotation
from fi_backend.attention import PagedAttention
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_tensor
from fi_backend.planning import plan
from fi_backend.torch_ops import register, runs_directly
from fi_backend.variants import AttentionVariant
from fi_backend.workspace import Workspace

__all__ = ["single_attention", "single_variant_attention"]


class _HostScratch(threading.local):
    """Scratch memory that the calls of one thread share."""

    def __init__(self) -> None:
        self.workspace = Workspace()


_host_scratch = _HostScratch()


def _workspace(device: torch.device) -> Workspace:
    """Return scratch memory for one call.

    On a GPU it is new: torch's allocator reuses memory in the order of the stream, and a CUDA graph
    that captures the call gets memory that nobody else uses.
    """
    return _host_scratch.workspace if device.type == "cpu" else Workspace(device)


def single_attention(
    operation: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_layout: str,
    return_lse: bool,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from q [qo_len, num_qo_heads, head_dim] to the keys of one request.

    Args:
        options: keyword arguments of _attend().
    """
    check_tensor("q", q, shape=(None, None, None))
    check_device(operation, q.device)
    check_layout("kv_layout", kv_layout)
    keys = ragged_cache("k", k, kv_layout)
    values = ragged_cache("v", v, kv_layout)
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"v must have as many tokens and heads as k; got {list(v.shape)} and {list(k.shape)}"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"v must have the dtype of k, {k.dtype}; got {v.dtype}")
    out = q.new_empty((*q.shape[:2], values.shape[3]), dtype=o_dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None
    # A schema has no place for a variant, whose call torch.compile has to leave alone.
    directly = "variant" in options or runs_directly(operation, q=q, k=k, v=v)
    attend = _attend if directly else _attend_op.traced
    attend(q, keys, values, out, lse, custom_mask, packed_custom_mask, **options)
    return out if lse is None else (out, lse)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    *,
    causal: bool,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    variant: AttentionVariant | None = None,
    variant_values: dict[str, Any] | None = None,
) -> None:
    """Plan and run; keys and values are [kv_len, 1, num_kv_heads, head_dim]."""
    kv_len, num_kv_heads = keys.shape[0], keys.shape[2]
    spec = layer_spec(
        num_qo_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim_qk=q.shape[2],
        head_dim_vo=values.shape[3],
        page_size=1,
        q_dtype=q.dtype,
        kv_dtype=keys.dtype,
        o_dtype=out.dtype,
        causal=causal,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        custom_mask=custom_mask is not None or packed_custom_mask is not None,
    )
    if variant is not None:
        spec = replace(spec, variant=variant)
    kernel_spec, rotation = split_rotation(spec, q.device)
    # A prefill of any length is as likely as this one; a decode comes with many of its kind.
    max_qo_len = 1 if q.shape[0] == 1 else None
    layer = PagedAttention(kernel_spec, q.device, max_qo_len=max_qo_len)
    # Made on the device, so that a CUDA graph can hold the call: it cannot copy from the host.
    zero_and_one = torch.arange(2, dtype=torch.int32, device=q.device)
    batch = PagedBatch.ragged(zero_and_one * q.shape[0], zero_and_one * kv_len)
    batch = replace(batch, max_qo_len=max_qo_len)
    mask, mask_indptr = resolve_mask(
        custom_mask,
        packed_custom_mask,
        torch.tensor([q.shape[0]], device="cpu"),
        torch.tensor([kv_len], device="cpu"),
        q.device,
    )
    step = plan(kernel_spec, batch, _workspace(q.device))
    step = replace(step, num_tokens=q.shape[0], num_ragged_rows=kv_len)
    cache = (keys, values)
    if rotation is not None:
        step, q, cache = rotation.apply(step, q, cache)
    layer.run(
        step,
        q,
        cache,
        out=out,
        lse=lse,
        alibi_slopes=alibi_slopes(spec.num_qo_heads, q.device) if spec.alibi else None,
        custom_mask=mask,
        mask_indptr=mask_indptr,
        k_scale=combine_scales((("q_scale", q_scale), ("k_scale", k_scale)), num_kv_heads),
        v_scale=combine_scales((("v_scale", v_scale),), num_kv_heads),
        variant_values=variant_values,
    )


# Planning reads values and loads kernels, so that torch.compile has to see all of it as one op.
_attend_op = register(
    "single_attention(Tensor q, Tensor keys, Tensor values, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor? custom_mask, Tensor? packed_custom_mask, *, bool causal, str pos_encoding_mode, "
    "int window_left, float? logits_soft_cap, float? sm_scale, float? rope_scale, "
    "float? rope_theta, float? q_scale, float? k_scale, float? v_scale) -> ()",
    _attend,
)


def single_variant_attention(
    operation: str,
    variant: AttentionVariant,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    values: Sequence[Any],
    *,
    kv_layout: str,
    causal: bool,
    window_left: int,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as `variant` says, all of whose values are given in order."""
    if not isinstance(variant, AttentionVariant):
        raise TypeError(
            f"jit_module must be a fi_backend.AttentionVariant; got {type(variant).__name__}"
        )
    return single_attention(
        operation,
        *qkv,
        kv_layout=kv_layout,
        causal=causal,
        pos_encoding_mode="NONE",
        window_left=window_left,
        logits_soft_cap=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        return_lse=return_lse,
        variant=variant,
        variant_values=variant.values_by_name(values),
    )
