"""Once a layer and step: write the cache, run attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from fi_backend import AttentionSpec, PagedAttention, append_to_cache, rope_append_to_cache
from fi_backend.errors import UnsupportedError
from fi_backend.integrations.vllm import counters
from fi_backend.integrations.vllm.attentions import attention_for, geometry_key
from fi_backend.integrations.vllm.context_parallel import (
    ShardedAttention,
    cached_spec,
    new_spec,
)
from fi_backend.integrations.vllm.huge_pages import advise_huge_pages
from fi_backend.integrations.vllm.kv_cache import cache_dtype, split_cache
from fi_backend.integrations.vllm.metadata import FIMetadata
from fi_backend.integrations.vllm.selection import caches_prefixes

__all__ = ["FIAttentionImpl"]


@dataclass(slots=True)
class _Bound:
    """What a layer derives from a cache tensor once, and reuses until the tensor changes."""

    kv_cache: torch.Tensor
    data_ptr: int
    causal: bool
    views: tuple[torch.Tensor, torch.Tensor]
    attention: PagedAttention
    plan_key: int
    sharded: ShardedAttention | None

    def fits(self, kv_cache: torch.Tensor, causal: bool) -> bool:
        # Holding the tensor makes identity safe; its memory may still be given back and replaced.
        return (
            kv_cache is self.kv_cache
            and causal is self.causal
            and kv_cache.data_ptr() == self.data_ptr
        )


class FIAttentionImpl(AttentionImpl[FIMetadata]):
    """One attention layer of the model.

    Args:
        num_heads: query heads of this rank.
        head_size: size of a query and key head.
        scale: factor on q . k.
        num_kv_heads: key/value heads of this rank; num_heads if None.
        alibi_slopes: one slope per query head, or None.
        sliding_window: tokens a token sees, itself included; None for all.
        kv_cache_dtype: vLLM's name of the cache's dtype.
        logits_soft_cap: c turns a logit x into c * tanh(x / c); None or 0 for no cap.
        attn_type: one of vLLM's AttentionType.
        kv_sharing_target_layer_name: layer whose cache this one reads instead of its own.
        sinks: [num_heads], a logit per query head that joins the softmax denominator, or None.

    Raises:
        UnsupportedError: a sliding window over an encoder's own tokens, which is two-sided; or
            what decode context parallelism is not served with.
    """

    # What vLLM asks before it serves decode context parallelism, and with drafts.
    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = False
    supports_dcp: bool = True
    supports_mtp_with_cp_non_trivial_interleave_size: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._has_scales = kv_cache_dtype.startswith("fp8")
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.sliding_window = sliding_window
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self._batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        self._encoder_only = attn_type == AttentionType.ENCODER_ONLY
        if self._encoder_only and sliding_window is not None:
            raise UnsupportedError(
                f"sliding_window must be None for attn_type {attn_type}; got {sliding_window}. "
                f"Start without --attention-backend to use vLLM's own"
            )
        # Ranks that share this layer's cache; an encoder has none.
        self.num_shards = 1 if self._encoder_only else self.dcp_world_size
        if self.num_shards > 1:
            self._check_context_parallel()
        self._share_prefixes = self.num_shards == 1 and caches_prefixes()
        self._bound: _Bound | None = None

    def _check_context_parallel(self) -> None:
        for name, asked in (
            ("sliding_window", self.sliding_window is not None),
            ("alibi_slopes", self.alibi_slopes is not None),
            ("kv_sharing_target_layer_name", self.kv_sharing_target_layer_name is not None),
            ("attn_type encoder_decoder", self.attn_type == AttentionType.ENCODER_DECODER),
            ("VLLM_BATCH_INVARIANT", self._batch_invariant),
            ("more than one key/value head of a rank", self.num_kv_heads > 1),
        ):
            if asked:
                raise UnsupportedError(
                    f"fi_backend: {name} is not served with --decode-context-parallel-size "
                    f"{self.dcp_world_size}; start without that option"
                )

    def spec(
        self, *, q_dtype: torch.dtype, page_size: int, head_dim_vo: int, causal: bool
    ) -> AttentionSpec:
        """Return this layer's spec for a cache with pages of `page_size` tokens."""
        return AttentionSpec(
            num_qo_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=self.head_size,
            head_dim_vo=head_dim_vo,
            q_dtype=q_dtype,
            kv_dtype=q_dtype if self._encoder_only else cache_dtype(self.kv_cache_dtype, q_dtype),
            page_size=page_size,
            causal=causal,
            window_left=-1 if self.sliding_window is None else self.sliding_window - 1,
            logits_soft_cap=self.logits_soft_cap,
            sm_scale=self.scale,
            alibi=self.alibi_slopes is not None,
            sinks=self.sinks is not None,
            batch_invariant=self._batch_invariant,
            share_prefixes=self._share_prefixes,
        )

    def parts(self, **arguments: Any) -> list[AttentionSpec]:
        """Return what this layer runs, with the arguments of spec(): its spec, or shards of it."""
        spec = self.spec(**arguments)
        if self.num_shards == 1:
            return [spec]
        return [cached_spec(spec, self.num_shards), new_spec(spec)]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give the sinks, a weight of the model, the dtype that kernels read.

        The weight itself changes, not a copy of it: what an engine loads into it later reaches a
        captured graph too, at the address that the graph knows, with or without another call.
        """
        if self.sinks is not None:
            self.sinks.data = self.sinks.data.to(torch.float32)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FIMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output` with the attention of the step's tokens.

        Args:
            layer: the Attention module, for its scales.
            query: [num_tokens, num_heads, head_size], padding included; may be a strided view.
                Rows of padding are not read, nor are their rows of output written.
            key: [num_tokens, num_kv_heads, head_size]; read by encoder-only layers and under
                decode context parallelism, the others find it in the cache.
            value: as key, with the value head size.
            kv_cache: the layer's cache.
            attn_metadata: the step; None in the engine's dry runs.
            output: [num_tokens, num_heads, head_dim_vo].
            output_scale: must be None; as output_block_scale.

        Raises:
            UnsupportedError: a fused quantisation of the output is asked for.
        """
        if attn_metadata is None:
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("output_scale and output_block_scale must be None; got a tensor")
        counters.count_call()
        if self._encoder_only:
            return self._encode(attn_metadata, query, key, value, output)

        bound = self._bound
        if bound is None or not bound.fits(kv_cache, attn_metadata.causal):
            bound = self._bind(kv_cache, query.dtype, attn_metadata.causal)
        k_scale, v_scale = self._scales(layer)
        if bound.sharded is not None:
            assert key is not None
            assert value is not None
            bound.sharded.run(
                attn_metadata,
                query,
                key,
                value,
                bound.views,
                output,
                sinks=self.sinks,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            return output
        bound.attention.run(
            attn_metadata.plan_for(bound.plan_key, bound.attention.spec),
            query,
            bound.views,
            out=output,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write each token's key and value to its slot of the cache; slot -1 is skipped.

        Args:
            layer: the Attention module, for its scales.
            key: [num_tokens, num_kv_heads, head_size]; rows beyond the slots are padding.
            value: as key, with the value head size.
            kv_cache: the layer's cache.
            slot_mapping: int64 [num_slots], page * page_size + offset.
        """
        if self._encoder_only or kv_cache.numel() == 0:
            return
        append_to_cache(
            key,
            value,
            self._views(kv_cache, key.dtype),
            slot_mapping,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
        )

    def fused_rope_kvcache_supported(self) -> bool:
        """Whether vLLM's compiler may replace rope and the write of a layer by the call below."""
        # Who attends to `key` itself needs it rotated.
        return not self._encoder_only and self.num_shards == 1

    def do_rope_and_kv_cache_update(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache: torch.Tensor,
        layer_slot_mapping: torch.Tensor,
    ) -> None:
        """Rotate queries in place, and keys on their way to the cache; `key` stays as it is.

        Args:
            layer: the Attention module, for its scales.
            query: [num_tokens, num_heads, head_size].
            key: [num_tokens, num_kv_heads, head_size].
            value: as key, with the value head size.
            positions: int64 [num_tokens].
            cos_sin_cache: [max_position, rotary_dim], float32 or the model's dtype.
            is_neox: pairs are a half of rotary_dim apart rather than neighbours.
            kv_cache: the layer's cache.
            layer_slot_mapping: as slot_mapping of do_kv_cache_update.
        """
        if kv_cache.numel() == 0:
            return
        rope_append_to_cache(
            query,
            key,
            value,
            positions,
            cos_sin_cache,
            self._views(kv_cache, key.dtype),
            layer_slot_mapping,
            is_neox=is_neox,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            out=query,
        )

    def _scales(self, layer: Any) -> tuple[float, float]:
        """Return the factors on what the cache holds.

        A layer may have scales that its cache was not written with: a checkpoint brings them along
        for an fp8 cache, also where the user asks for another, or leaves this layer out.
        """
        if not self._has_scales:
            return 1.0, 1.0
        return layer._k_scale_float, layer._v_scale_float

    def _views(
        self, kv_cache: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cache as keys and values, before a step says whether it is causal."""
        bound = self._bound
        if bound is None or not bound.fits(kv_cache, bound.causal):
            bound = self._bind(kv_cache, dtype, self.attn_type == AttentionType.DECODER)
        return bound.views

    def _bind(self, kv_cache: torch.Tensor, dtype: torch.dtype, causal: bool) -> _Bound:
        advise_huge_pages(kv_cache)  # nothing has been written yet
        views = split_cache(kv_cache, self.head_size, cache_dtype(self.kv_cache_dtype, dtype))
        spec = self.spec(
            q_dtype=dtype, page_size=views[0].shape[1], head_dim_vo=views[1].shape[3], causal=causal
        )
        self._bound = _Bound(
            kv_cache=kv_cache,
            data_ptr=kv_cache.data_ptr(),
            causal=causal,
            views=views,
            attention=attention_for(spec, kv_cache.device),
            plan_key=geometry_key(spec),
            sharded=ShardedAttention(spec, kv_cache.device) if self.num_shards > 1 else None,
        )
        return self._bound

    def _encode(
        self,
        metadata: FIMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend to the step's own keys and values, without a cache."""
        assert key is not None
        assert value is not None
        spec = self.spec(
            q_dtype=query.dtype,
            page_size=1,
            head_dim_vo=value.shape[2],
            causal=metadata.causal,
        )
        attention_for(spec, query.device).run(
            metadata.plan_for(geometry_key(spec), spec),
            query,
            (key.unsqueeze(1), value.unsqueeze(1)),
            out=output,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
        )
        return output
