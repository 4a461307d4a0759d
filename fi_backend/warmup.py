"""Which kernels a model needs, told from its config.json or from bare dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import (
    activation,
    append_kv,
    attention,
    host_plan,
    merge,
    norm,
    rope,
)
from fi_backend.spec import AttentionSpec, supports

__all__ = ["specs_for_model"]

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
_CACHE_DTYPES = _DTYPES | {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Multimodal configs keep the language model's dimensions in a part of this name.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")


def specs_for_model(config: Mapping[str, Any]) -> list[KernelSpec]:
    """List the CPU kernels that serve a model.

    Args:
        config: keys of a Hugging Face config.json: `num_attention_heads`, `num_key_value_heads`,
            `head_dim` or `hidden_size`, `torch_dtype` or `dtype`; and `kv_cache_dtype` ("auto",
            "fp8_e4m3", "fp8_e5m2" or a dtype of _DTYPES).

    Raises:
        ValueError: a dimension is missing or the kernels do not support it.
    """
    text = _text_config(config)
    dtype = _dtype(text, config)
    kv_dtype = _cache_dtype(config.get("kv_cache_dtype") or "auto", dtype)
    specs = [host_plan.plan_spec()]
    for head_dim in _head_dims(text):
        spec = AttentionSpec(
            num_qo_heads=text.get("num_attention_heads") or 1,
            num_kv_heads=text.get("num_key_value_heads") or text.get("num_attention_heads") or 1,
            head_dim_qk=head_dim,
            q_dtype=dtype,
            kv_dtype=kv_dtype,
        )
        reason = supports(spec)
        if reason is not None:
            raise ValueError(f"this model is not supported: {reason}")
        types: dict[str, Any] = {
            "q_dtype": dtype,
            "kv_dtype": kv_dtype,
            "o_dtype": dtype,
            "head_dim_qk": head_dim,
            "head_dim_vo": head_dim,
        }
        specs += attention.attention_specs(**types)
    specs += [
        append_kv.append_spec(),
        merge.merge_spec(dtype, dtype),
        norm.norm_spec(dtype),
        rope.rope_spec(dtype),
        activation.activation_spec(dtype),
    ]
    return specs


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in _TEXT_PARTS:
        if isinstance(config.get(part), Mapping):
            return {**config, **config[part]}
    return config


def _dtype(text: Mapping[str, Any], config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("torch_dtype") or config.get("dtype")
    name = name or text.get("torch_dtype") or text.get("dtype") or "bfloat16"
    name = str(name).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {name}")
    return _DTYPES[name]


def _cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return dtype
    if name not in _CACHE_DTYPES:
        allowed = ", ".join(("auto", *_CACHE_DTYPES))
        raise ValueError(f"kv_cache_dtype must be one of {allowed}; got {name}")
    return _CACHE_DTYPES[name]


def _head_dims(text: Mapping[str, Any]) -> list[int]:
    """Every head size that the model's layers use."""
    if text.get("kv_lora_rank"):
        raise ValueError(
            "this model uses multi-head latent attention (kv_lora_rank), which is not "
            "supported; serve it with the engine's own backend"
        )
    sizes = [text.get("head_dim"), text.get("global_head_dim"), text.get("swa_head_dim")]
    found = sorted({int(size) for size in sizes if size})
    if found:
        return found
    if text.get("hidden_size") and text.get("num_attention_heads"):
        return [int(text["hidden_size"]) // int(text["num_attention_heads"])]
    raise ValueError(
        "the head size is unknown: give head_dim, or hidden_size and num_attention_heads; "
        f"got the keys {', '.join(sorted(text)) or 'none'}"
    )
