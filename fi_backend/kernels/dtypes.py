"""The one table from torch dtypes to the C++ types that templates name."""

from __future__ import annotations

import torch

__all__ = ["cpp_type", "short_name"]

# torch dtype -> (C++ type of host code, C++ type of device code, name used in module names)
_TYPES = {
    torch.float32: ("float", "float", "f32"),
    torch.float16: ("fi::half", "__half", "f16"),
    torch.bfloat16: ("fi::bf16", "__nv_bfloat16", "bf16"),
    torch.float8_e4m3fn: ("fi::e4m3", "__nv_fp8_e4m3", "e4m3"),
    torch.float8_e5m2: ("fi::e5m2", "__nv_fp8_e5m2", "e5m2"),
    torch.int8: ("int8_t", "int8_t", "i8"),
}


def _row(dtype: torch.dtype) -> tuple[str, str, str]:
    try:
        return _TYPES[dtype]
    except KeyError:
        allowed = ", ".join(str(known) for known in _TYPES)
        raise ValueError(f"dtype must be one of {allowed}; got {dtype}") from None


def cpp_type(dtype: torch.dtype, target: str) -> str:
    """Name the C++ type that stores `dtype` in code for `target` ("cpu" or "cuda")."""
    host, device, _ = _row(dtype)
    return host if target == "cpu" else device


def short_name(dtype: torch.dtype) -> str:
    """Name `dtype` the way module names do: "f32", "f16", "bf16", "e4m3", "e5m2", "i8"."""
    return _row(dtype)[2]
