"""fi_backend: a serving-side attention backend with FlashInfer's calls.

Public names are resolved on first use, so that importing the package loads no compiler machinery,
touches no GPU and makes no directory.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from fi_backend import env
from fi_backend.errors import FiBackendError

_MODULE_OF = {
    # The engine-facing core.
    "AttentionSpec": "spec",
    "AttentionVariant": "variants",
    "OuterLevels": "outer_levels",
    "PagedAttention": "attention",
    "PagedBatch": "batch",
    "Plan": "planning",
    "Workspace": "workspace",
    "append_to_cache": "page",
    "compile_kernels": "warmup",
    "gather_page_table": "step_tables",
    "is_backend_supported": "capabilities",
    "is_compute_capability_supported": "capabilities",
    "pack_masks": "step_tables",
    "plan": "planning",
    "rope_append_paged_kv_cache": "rope_append",
    "rope_append_to_cache": "rope_append",
    "runtime_counters": "attention",
    "supports": "spec",
    "workspace_bytes": "planning",
    # FlashInfer's calls.
    "BatchAttention": "batch_attention",
    "BatchAttentionWithAttentionSinkWrapper": "batch_attention",
    "BatchDecodeWithPagedKVCacheWrapper": "decode",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "cascade",
    "BatchPrefillWithPagedKVCacheWrapper": "prefill",
    "BatchPrefillWithRaggedKVCacheWrapper": "prefill",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "cascade",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "decode",
    "MultiLevelCascadeAttentionWrapper": "cascade",
    "append_paged_kv_cache": "page",
    "append_paged_mla_kv_cache": "page",
    "apply_llama31_rope": "rope",
    "apply_llama31_rope_inplace": "rope",
    "apply_llama31_rope_pos_ids": "rope",
    "apply_llama31_rope_pos_ids_inplace": "rope",
    "apply_rope": "rope",
    "apply_rope_inplace": "rope",
    "apply_rope_pos_ids": "rope",
    "apply_rope_pos_ids_inplace": "rope",
    "apply_rope_with_cos_sin_cache": "rope",
    "apply_rope_with_cos_sin_cache_inplace": "rope",
    "fast_decode_plan": "decode",
    "fused_add_rmsnorm": "norm",
    "fused_add_rmsnorm_quant": "norm",
    "gelu_and_mul": "activation",
    "gelu_tanh_and_mul": "activation",
    "gemma_fused_add_rmsnorm": "norm",
    "gemma_rmsnorm": "norm",
    "get_batch_indices_positions": "page",
    "get_seq_lens": "page",
    "layernorm": "norm",
    "layernorm_quant": "norm",
    "merge_state": "cascade",
    "merge_state_in_place": "cascade",
    "merge_states": "cascade",
    "packbits": "quantization",
    "rmsnorm": "norm",
    "rmsnorm_quant": "norm",
    "segment_packbits": "quantization",
    "silu_and_mul": "activation",
    "single_decode_with_kv_cache": "decode",
    "single_decode_with_kv_cache_with_jit_module": "decode",
    "single_prefill_with_kv_cache": "prefill",
    "single_prefill_with_kv_cache_return_lse": "prefill",
    "single_prefill_with_kv_cache_with_jit_module": "prefill",
    "trtllm_batch_context_with_kv_cache": "prefill",
    "trtllm_batch_decode_with_kv_cache": "decode",
    "xqa_batch_decode_with_kv_cache": "decode",
}

# Reached as attributes too, as in fi_backend.decode.fast_decode_plan.
_MODULES = frozenset(_MODULE_OF.values())
# Of FlashInfer's modules: what is in them can be asked which GPUs and backends it supports.
_QUERIED = frozenset(
    [
        "activation",
        "batch_attention",
        "cascade",
        "decode",
        "norm",
        "page",
        "prefill",
        "quantization",
        "rope",
        "rope_append",
    ]
)

__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"fi_backend.{_MODULE_OF[name]}"), name)
        if _MODULE_OF[name] in _QUERIED:
            from fi_backend import capabilities

            capabilities.add_queries(name, value)
        globals()[name] = value  # the next access does not come here
        return value
    if name in _MODULES:
        return importlib.import_module(f"fi_backend.{name}")
    raise AttributeError(f"module 'fi_backend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _observe_calls() -> None:
    """Wrap the public calls if the environment wants them seen, else leave them alone."""
    try:
        trace_dir, level = env.TRACE_DIR.get(), env.LOGLEVEL.get()
        if trace_dir is not None:
            from fi_backend.trace import calls

            calls.install(_MODULE_OF, trace_dir)
        if level:
            from fi_backend import api_logging

            api_logging.install(_MODULE_OF)
    except (FiBackendError, OSError) as error:  # no reason to stop a server
        warnings.warn(f"fi_backend: API calls are not logged or traced: {error}", stacklevel=2)


_observe_calls()
