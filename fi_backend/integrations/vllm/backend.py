"""What fi_backend supports, in the form vLLM asks: one class for 0.25 to 0.33.

vLLM's FlashInfer backend is never subclassed: importing its module needs the flashinfer package.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from fi_backend import AttentionSpec, is_compute_capability_supported, supports
from fi_backend.integrations.vllm.builder import FIMetadataBuilder
from fi_backend.integrations.vllm.impl import FIAttentionImpl
from fi_backend.integrations.vllm.kv_cache import cache_dtype

__all__ = ["FIAttentionBackend", "FICustomBackend"]

_ATTENTION_TYPES = (
    AttentionType.DECODER,
    AttentionType.ENCODER_ONLY,
    AttentionType.ENCODER_DECODER,
)


class FIAttentionBackend(AttentionBackend):
    """Attention by fi_backend, in the place of vLLM's FLASHINFER."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"

    @staticmethod
    def get_impl_cls() -> type[FIAttentionImpl]:
        return FIAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FIMetadataBuilder]:
        return FIMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in _ATTENTION_TYPES

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Whether a GPU of this compute capability does; None stands for a CPU."""
        return capability is None or is_compute_capability_supported(
            "BatchPrefillWithPagedKVCacheWrapper", 10 * capability.major + capability.minor
        )

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """Ask the core; head counts are not known here and do not matter."""
        from vllm.platforms import current_platform

        if not cls.supports_kv_cache_dtype(kv_cache_dtype):
            return None  # vLLM has said so already
        spec = AttentionSpec(
            num_qo_heads=1,
            num_kv_heads=1,
            head_dim_qk=head_size,
            q_dtype=dtype,
            kv_dtype=cache_dtype(kv_cache_dtype or "auto", dtype),
            page_size=block_size or 16,
        )
        return supports(spec, current_platform.device_type)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
        """vLLM 0.32 on: any layout does; on the CPU a head's tokens are best kept together."""
        from vllm.platforms import current_platform
        from vllm.v1.kv_cache_interface import KVCacheLayout

        if not current_platform.is_cpu():
            return None
        first = KVCacheLayout.LBHNC
        return (first, *(layout for layout in KVCacheLayout if layout is not first))

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """vLLM 0.25: the logical shape of a layer's cache, as FlashInfer's and FlashAttention's."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """vLLM 0.25: physical order of the dimensions, by the layout the engine resolved."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        head_major = get_kv_cache_layout() == "HND"
        if include_num_layers_dimension:
            return (1, 2, 4, 0, 3, 5) if head_major else (1, 0, 2, 3, 4, 5)
        return (0, 1, 3, 2, 4) if head_major else (0, 1, 2, 3, 4)


class FICustomBackend(FIAttentionBackend):
    """The same under vLLM's name for third-party backends, which nothing else answers to."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"
