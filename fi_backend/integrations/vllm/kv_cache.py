"""vLLM's cache tensor of one layer as the two strided views that our kernels read."""

from __future__ import annotations

import torch

__all__ = ["cache_dtype", "split_cache"]

_CACHE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that vLLM's --kv-cache-dtype `name` means; "auto" is the model's.

    Raises:
        ValueError: we have no kernels for that dtype.
    """
    if name == "auto":
        return model_dtype
    if name not in _CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype must be one of auto, {', '.join(_CACHE_DTYPES)}; got {name}"
        )
    return _CACHE_DTYPES[name]


def split_cache(
    kv_cache: torch.Tensor, head_dim_qk: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (k, v), each [num_pages, page_size, num_kv_heads, head_dim], without copying.

    Args:
        kv_cache: vLLM 0.25's [num_pages, 2, page_size, num_kv_heads, head_dim], or from 0.32 on
            [num_pages, num_kv_heads, page_size, head_dim_qk + head_dim_vo]; any strides. An fp8
            cache is uint8.
        head_dim_qk: size of a key head.
        dtype: what the bytes are.

    Raises:
        ValueError: the tensor has neither form.
    """
    if kv_cache.dtype == torch.uint8:
        kv_cache = kv_cache.view(dtype)
    if kv_cache.dim() == 5 and kv_cache.shape[1] == 2:
        return kv_cache[:, 0], kv_cache[:, 1]
    if kv_cache.dim() == 4:
        token_major = kv_cache.transpose(1, 2)
        return token_major[..., :head_dim_qk], token_major[..., head_dim_qk:]
    raise ValueError(
        "kv_cache must be [pages, 2, page_size, heads, head_dim] or "
        f"[pages, heads, page_size, head_dim_qk + head_dim_vo]; got shape {list(kv_cache.shape)}"
    )
