"""Normalisation of rows: RMS norm with an optional residual, and layer norm.

On CUDA each call is one launch on the current stream, which looks at no value of a tensor.
"""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.dtypes import cpp_type, short_name
from fi_backend.kernels.functions import Functions, check_float, cuda_spec

__all__ = [
    "QUANTIZED",
    "layernorm",
    "layernorm_cuda_spec",
    "norm_spec",
    "rmsnorm",
    "rmsnorm_cuda_spec",
]

# Dtypes of outputs that are scaled and saturated.
QUANTIZED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def norm_spec(dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> KernelSpec:
    """Describe the CPU module that normalises rows of `dtype`.

    Args:
        dtype: float32, float16 or bfloat16.
        out_dtype: None for that of the input, or float8_e4m3fn, float8_e5m2 or int8.

    Raises:
        TypeError: a dtype is not allowed.
    """
    out_dtype = _checked(dtype, out_dtype)
    return KernelSpec(
        name="_".join(("norm_cpu", *map(short_name, dict.fromkeys((dtype, out_dtype))))),
        target="cpu",
        templates=("norm_cpu.cc.j2",),
        parameters=(("in_type", cpp_type(dtype, "cpu")), ("out_type", cpp_type(out_dtype, "cpu"))),
    )


def rmsnorm_cuda_spec(dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> KernelSpec:
    """Describe the CUDA module of RMS norms; dtypes and errors as for :func:`norm_spec`."""
    return cuda_spec("rmsnorm", {"in": dtype, "out": _checked(dtype, out_dtype)})


def layernorm_cuda_spec(dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> KernelSpec:
    """Describe the CUDA module of layer norms; dtypes and errors as for :func:`norm_spec`."""
    return cuda_spec("layernorm", {"in": dtype, "out": _checked(dtype, out_dtype)})


def _checked(dtype: torch.dtype, out_dtype: torch.dtype | None) -> torch.dtype:
    check_float("norm", dtype)
    if out_dtype is None:
        return dtype
    if out_dtype not in QUANTIZED:
        allowed = ", ".join(map(str, QUANTIZED))
        raise TypeError(f"norm: dtype of a quantised out must be one of {allowed}; got {out_dtype}")
    return out_dtype


# By (dtype, out_dtype), the latter None where the output has the type of the input.
_rmsnorm = Functions("rmsnorm", lambda dtypes: norm_spec(*dtypes))
_rmsnorm_cuda = Functions("rmsnorm", lambda dtypes: rmsnorm_cuda_spec(*dtypes))
_layernorm = Functions("layernorm", lambda dtypes: norm_spec(*dtypes))
_layernorm_cuda = Functions("layernorm", lambda dtypes: layernorm_cuda_spec(*dtypes))


def rmsnorm(
    *,
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_bias: float = 0.0,
    scale: float | torch.Tensor | None = None,
    enable_pdl: bool = True,
) -> None:
    """Write the RMS norm of `input`, or of `input + residual`, to `out`.

    Args:
        out: [.., hidden_size], rank 1 to 3, like `input`; may be `input`.
        input: [.., hidden_size], last dimension contiguous.
        weight: [hidden_size], the dtype of `input`.
        residual: like `input`; becomes `input + residual`. None: normalise `input`.
        eps: added to the mean square.
        weight_bias: added to `weight`: 1.0 for Gemma's convention, else 0.0.
        scale: `out` is fp8 or int8 and stores ``saturate(norm / scale)``; a float, or float32 [] or
            [1]. None: `out` has the dtype of `input`.
        enable_pdl: on CUDA, launch as a programmatic dependent of the kernel before.
    """
    dtypes = input.dtype, None if scale is None else out.dtype
    tensor, value = _split_scale(scale)
    option: int
    if input.is_cuda:
        run, option = _rmsnorm_cuda[dtypes], enable_pdl
    else:
        run, option = _rmsnorm[dtypes], torch.get_num_threads()
    run(input, weight, out, residual, tensor, value, eps, weight_bias, option)


def layernorm(
    *,
    out: torch.Tensor,
    input: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    scale: float | torch.Tensor | None = None,
    enable_pdl: bool = True,
) -> None:
    """Write the layer norm of `input` [.., hidden_size] to `out`; gamma and beta are float32.

    `out`, `scale` and `enable_pdl` are as for :func:`rmsnorm`.
    """
    dtypes = input.dtype, None if scale is None else out.dtype
    tensor, value = _split_scale(scale)
    option: int
    if input.is_cuda:
        run, option = _layernorm_cuda[dtypes], enable_pdl
    else:
        run, option = _layernorm[dtypes], torch.get_num_threads()
    run(input, gamma, beta, out, tensor, value, eps, option)


def _split_scale(scale: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    if isinstance(scale, torch.Tensor):
        return scale, 1.0
    return None, 1.0 if scale is None else scale
