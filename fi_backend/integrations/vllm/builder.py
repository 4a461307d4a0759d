"""Once a step and group of layers: vLLM's metadata -> plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec as KVCacheSpec
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec

from fi_backend import AttentionSpec, compile_kernels
from fi_backend.errors import UnsupportedError
from fi_backend.integrations.vllm import counters
from fi_backend.integrations.vllm.attentions import attention_for, geometry_key
from fi_backend.integrations.vllm.context_parallel import Shard
from fi_backend.integrations.vllm.impl import FIAttentionImpl
from fi_backend.integrations.vllm.metadata import FIMetadata, to_batch
from fi_backend.integrations.vllm.reservation import Reservation

__all__ = ["FIMetadataBuilder"]


def _ours(layers: Iterable[Any]) -> list[FIAttentionImpl]:
    impls = (getattr(layer, "impl", None) for layer in layers)
    return [impl for impl in impls if isinstance(impl, FIAttentionImpl)]


class FIMetadataBuilder(AttentionMetadataBuilder[FIMetadata]):
    """Plans each step once for every geometry that the group's layers have.

    The window is a property of a layer, not of its group: with vLLM's hybrid cache manager off, one
    group mixes windowed and full layers.

    On a GPU build() is one launch per geometry and reads nothing back.
    """

    # Grids follow from capacities alone and every length is read on the device, so the graph of a
    # batch serves any other that is padded to as many requests and tokens. What it refers to is
    # either the engine's, at fixed addresses, or was reserved before the capture.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    # vLLM 0.32 on: a graph of draft steps may hold their planning too.
    supports_draft_decode_metadata_update: bool = True

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._encoder_only = isinstance(kv_cache_spec, EncoderOnlyAttentionSpec)
        self._rows_are_bounded = True
        impls = self._impls()
        self._num_layers = len(impls)
        max_reqs = vllm_config.scheduler_config.max_num_seqs
        self._specs = {causal: self._distinct_specs(impls, causal) for causal in (True, False)}
        is_sharded = any(impl.num_shards > 1 for impl in impls)
        compile_kernels(self._model_specs(), device, merges=is_sharded)
        for spec in self._specs[not self._encoder_only].values():
            attention_for(spec, device)  # loads the kernels before the first step
        self._reservation = Reservation(
            {key: spec for specs in self._specs.values() for key, spec in specs.items()},
            device,
            max_reqs=max_reqs,
            # Not the configuration itself, of which a drafter has another.
            engine=None
            if vllm_config.parallel_config.use_ubatching
            else vllm_config.compilation_config.static_forward_context,
        )
        self._shard = None
        if is_sharded:
            self._shard = Shard(
                impls[0].num_shards,
                impls[0].dcp_rank,
                vllm_config.parallel_config.cp_kv_cache_interleave_size,
                max_reqs,
                device,
            )

    def _impls(self) -> list[FIAttentionImpl]:
        layers = self.vllm_config.compilation_config.static_forward_context
        return _ours(layers.get(name) for name in self.layer_names)

    def _model_specs(self) -> list[AttentionSpec]:
        """What the kernels of all our layers depend on, those of other groups included."""
        if self.vllm_config.model_config is None:
            return []
        layers = self.vllm_config.compilation_config.static_forward_context
        return [
            spec
            for impl in _ours(layers.values())
            for spec in impl.parts(
                q_dtype=self.vllm_config.model_config.dtype,
                page_size=1,
                head_dim_vo=impl.head_size,
                causal=True,
            )
        ]

    def _distinct_specs(
        self, impls: list[FIAttentionImpl], causal: bool
    ) -> dict[int, AttentionSpec]:
        """One spec per geometry; empty if the layers are unknown, which then plan on first use."""
        if self.vllm_config.model_config is None:
            return {}
        cache: Any = self.kv_cache_spec
        specs = (
            impl.parts(
                q_dtype=self.vllm_config.model_config.dtype,
                page_size=1 if self._encoder_only else cache.block_size,
                head_dim_vo=getattr(cache, "head_size_v", cache.head_size),
                causal=causal,
            )
            for impl in impls
        )
        return {geometry_key(spec): spec for parts in specs for spec in parts}

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
    ) -> FIMetadata:
        """Translate one step and plan it.

        Raises:
            UnsupportedError: causality differs between requests.
        """
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise UnsupportedError(
                "fi_backend: attention that is causal for some requests only is not supported; "
                "start without --attention-backend to use vLLM's own"
            )
        metadata = FIMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal),
            batch=to_batch(
                common,
                encoder_only=self._encoder_only,
                max_qo_len=int(common.max_query_len) if self._rows_are_bounded else None,
            ),
            seq_lens=common.seq_lens,
            reservation=self._reservation,
            plans={},
        )
        if self._shard is not None:
            self._shard.split(metadata)
        self._plan(metadata)
        counters.count_step(self._num_layers)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> FIMetadata:
        """Translate and plan the dummy step that a graph is captured with."""
        # A graph for mixed steps is captured with fewer tokens a request than it will see. Where
        # only decode steps are in full graphs, each is of one number of tokens a request.
        mode = self.vllm_config.compilation_config.cudagraph_mode
        self._rows_are_bounded = mode.mixed_mode() != CUDAGraphMode.FULL
        try:  # by build(), which vLLM's wrappers of builders override
            return self.build(0, common_attn_metadata)
        finally:
            self._rows_are_bounded = True

    def update_draft_decode_metadata(self, metadata: FIMetadata) -> None:
        """Plan `metadata` again, for the lengths that its tensors have by now.

        It only launches, and plans into the same memory: a graph may hold it.
        """
        metadata.plans.clear()
        if self._shard is not None:
            self._shard.split(metadata)
        self._plan(metadata)

    def _plan(self, metadata: FIMetadata) -> None:
        for key, spec in self._specs[metadata.causal].items():
            metadata.plan_for(key, spec)
