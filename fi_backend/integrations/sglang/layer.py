"""One RadixAttention of the model, as the core sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType

from fi_backend import AttentionSpec, PagedAttention
from fi_backend.errors import UnsupportedError
from fi_backend.integrations.sglang import kv_cache

__all__ = ["BoundLayer", "layer_spec"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def layer_spec(
    layer: Any,
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page_size: int,
    share_prefixes: bool,
    sinks: bool = False,
    custom_mask: bool = False,
) -> AttentionSpec:
    """Return the spec of a RadixAttention.

    Args:
        layer: the RadixAttention.
        q_dtype: of its queries.
        kv_dtype: of its cache.
        page_size: tokens of a page.
        share_prefixes: whether requests may have pages in common.
        sinks: whether its runs get sinks.
        custom_mask: whether they get a mask.

    Raises:
        UnsupportedError: the layer asks for something that no spec can say.
    """
    encoder_only = layer.attn_type == AttentionType.ENCODER_ONLY
    if layer.is_cross_attention:
        raise UnsupportedError(_refusal(layer, "is_cross_attention", "False", True))
    if encoder_only and layer.sliding_window_size >= 0:
        window = layer.sliding_window_size
        raise UnsupportedError(_refusal(layer, "sliding_window_size", "-1 in an encoder", window))
    if layer.xai_temperature_len > 0:
        length = layer.xai_temperature_len
        raise UnsupportedError(_refusal(layer, "xai_temperature_len", "-1", length))
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        method = layer.logit_capping_method
        raise UnsupportedError(_refusal(layer, "logit_capping_method", "tanh", method))
    return AttentionSpec(
        num_qo_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_dim_qk=layer.qk_head_dim,
        head_dim_vo=layer.v_head_dim,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        page_size=page_size,
        causal=not encoder_only,
        window_left=layer.sliding_window_size,
        logits_soft_cap=layer.logit_cap,
        sm_scale=layer.scaling,
        sinks=sinks,
        custom_mask=custom_mask,
        share_prefixes=share_prefixes,
    )


def _refusal(layer: Any, name: str, allowed: str, value: Any) -> str:
    return (
        f"layer {layer.layer_id}: {name} must be {allowed}; got {value}. "
        f"Start with another --attention-backend"
    )


@dataclass(frozen=True, slots=True)
class BoundLayer:
    """What a layer needs at every step, derived once.

    Attributes:
        attention: the kernels.
        in_window_pool: whether its cache is in the window pool of a hybrid pool.
        scales_count: whether the cache is fp8, so that the layer's scales mean something.
    """

    attention: PagedAttention
    in_window_pool: bool
    scales_count: bool

    @classmethod
    def bind(
        cls,
        layer: Any,
        pool: Any,
        *,
        q_dtype: torch.dtype,
        page_size: int,
        share_prefixes: bool,
        sinks: bool,
        custom_mask: bool,
    ) -> BoundLayer:
        """Load the kernels of a layer.

        Raises:
            UnsupportedError: we have no kernels for it; the message says why.
        """
        k, _ = kv_cache.paged_views(pool, layer.layer_id, page_size)
        spec = layer_spec(
            layer,
            q_dtype=q_dtype,
            kv_dtype=k.dtype,
            page_size=page_size,
            share_prefixes=share_prefixes,
            sinks=sinks,
            custom_mask=custom_mask,
        )
        return cls(
            attention=PagedAttention(spec, k.device),
            in_window_pool=kv_cache.in_window_pool(pool, layer.layer_id),
            scales_count=spec.kv_dtype in _FP8,
        )
