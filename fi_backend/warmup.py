"""Which kernels a model needs, told from its layers, its config.json or bare dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from fi_backend.errors import UnsupportedError
from fi_backend.jit import KernelSpec, build
from fi_backend.kernels import (
    activation,
    append_kv,
    attention,
    device_plan,
    host_plan,
    merge,
    norm,
    pack_masks,
    page_table,
    rope,
    rope_append,
)
from fi_backend.spec import AttentionSpec, supports

__all__ = ["attention_kernels", "compile_kernels", "model_layers", "specs_for_model"]

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


def compile_kernels(
    layers: Iterable[AttentionSpec],
    device: torch.device | str = "cpu",
    *,
    step_tables: bool = False,
    merges: bool = False,
) -> None:
    """Compile what attention layers need and is not on disk yet, all of it in parallel.

    Whatever first needs a kernel compiles it too, but then one after the other: the planner, the
    attention of a layer, the write to its cache.

    Args:
        layers: the layers, in any number.
        device: where they run.
        step_tables: compile gather_page_table() and pack_masks(), too.
        merges: compile merge_states() of the layers' outputs, too.

    Raises:
        UnsupportedError: a layer is not supported; the message says what is.
        BuildError, ToolchainError: see fi_backend.jit.build.
    """
    layers = list(layers)
    device_type = torch.device(device).type
    for layer in layers:
        reason = supports(layer, device_type)
        if reason is not None:
            raise UnsupportedError(f"compile_kernels: {reason}")
    kernels = attention_kernels(layers, device_type) if layers else []
    if step_tables:
        kernels += _step_table_kernels(device_type)
    if merges:
        merge_spec = merge.merge_cuda_spec if device_type == "cuda" else merge.merge_spec
        kernels += dict.fromkeys(merge_spec(layer.o_dtype, layer.o_dtype) for layer in layers)
    if kernels:
        build(kernels)


def _step_table_kernels(device_type: str) -> list[KernelSpec]:
    target: Literal["cpu", "cuda"] = "cuda" if device_type == "cuda" else "cpu"
    return [page_table.page_table_spec(target), pack_masks.pack_masks_spec(target)]


def attention_kernels(
    layers: Iterable[AttentionSpec], device_type: str, *, max_qo_len: int | None = None
) -> list[KernelSpec]:
    """List the kernels that plan and run attention layers and write their cache.

    Args:
        layers: layers that `device_type` supports.
        device_type: "cpu" or "cuda".
        max_qo_len: as for PagedAttention().
    """
    on_gpu = device_type == "cuda"
    specs = [device_plan.plan_spec() if on_gpu else host_plan.plan_spec()]
    for layer in layers:
        specs += attention.attention_specs(
            device_type=device_type,
            max_rows=None if max_qo_len is None else max_qo_len * layer.group_size,
            **layer.kernel_types,
        )
        if on_gpu and layer.geometry.shares_prefixes:
            specs.append(attention.group_spec(device_type=device_type, **layer.kernel_types))
        specs.append(
            append_kv.append_cuda_spec(layer.q_dtype, layer.kv_dtype)
            if on_gpu
            else append_kv.append_spec()
        )
    return list(dict.fromkeys(specs))


def specs_for_model(config: Mapping[str, Any], device_type: str = "cpu") -> list[KernelSpec]:
    """List the kernels that serve a model.

    Args:
        config: keys of a Hugging Face config.json: `num_attention_heads`, `num_key_value_heads`,
            `head_dim` or `hidden_size`, `torch_dtype` or `dtype`; and `kv_cache_dtype` ("auto",
            "fp8_e4m3", "fp8_e5m2" or a dtype of _DTYPES).
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: a dimension is missing or the kernels do not support it.
    """
    layers = model_layers(config, device_type)
    dtype, kv_dtype = layers[0].q_dtype, layers[0].kv_dtype
    specs = attention_kernels(layers, device_type) + _step_table_kernels(device_type)
    if device_type == "cuda":
        return [
            *specs,
            merge.merge_cuda_spec(dtype, dtype),
            norm.rmsnorm_cuda_spec(dtype),
            norm.layernorm_cuda_spec(dtype),
            rope.rope_cuda_spec(dtype),
            activation.activation_cuda_spec(dtype),
            rope_append.rope_append_cuda_spec(dtype, kv_dtype),
        ]
    return [
        *specs,
        merge.merge_spec(dtype, dtype),
        norm.norm_spec(dtype),
        rope.rope_spec(dtype),
        activation.activation_spec(dtype),
    ]


def model_layers(config: Mapping[str, Any], device_type: str = "cpu") -> list[AttentionSpec]:
    """Describe a model's attention layers, one for every head size.

    Arguments and errors are those of :func:`specs_for_model`.
    """
    text = _text_config(config)
    dtype = _dtype(text, config)
    kv_dtype = _cache_dtype(config.get("kv_cache_dtype") or "auto", dtype)
    layers = [
        AttentionSpec(
            num_qo_heads=text.get("num_attention_heads") or 1,
            num_kv_heads=text.get("num_key_value_heads") or text.get("num_attention_heads") or 1,
            head_dim_qk=head_dim,
            q_dtype=dtype,
            kv_dtype=kv_dtype,
            share_prefixes=True,  # as engines that cache prefixes do
        )
        for head_dim in _head_dims(text)
    ]
    for layer in layers:
        reason = supports(layer, device_type)
        if reason is not None:
            raise ValueError(f"this model is not supported: {reason}")
    return layers


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
