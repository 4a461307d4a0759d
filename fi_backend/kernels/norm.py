"""Normalisation of rows on the CPU: RMS norm with an optional residual, and layer norm."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions, float_spec

__all__ = ["layernorm", "norm_spec", "rmsnorm"]


def norm_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the module that normalises rows of `dtype` (float32, float16 or bfloat16)."""
    return float_spec("norm", dtype)


_rmsnorm = Functions("rmsnorm", norm_spec)
_layernorm = Functions("layernorm", norm_spec)


def rmsnorm(
    *,
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_bias: float,
) -> None:
    """Write the RMS norm of `input`, or of `input + residual`, to `out`.

    Args:
        out: [.., hidden_size], rank 1 to 3, like `input`; may be `input`.
        input: [.., hidden_size], last dimension contiguous.
        weight: [hidden_size], the dtype of `input`.
        residual: like `input`; becomes `input + residual`. None: normalise `input`.
        eps: added to the mean square.
        weight_bias: added to `weight`: 1.0 for Gemma's convention, else 0.0.
    """
    _rmsnorm[input.dtype](input, weight, out, residual, eps, weight_bias, torch.get_num_threads())


def layernorm(
    *,
    out: torch.Tensor,
    input: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
) -> None:
    """Write the layer norm of `input` [.., hidden_size] to `out`; gamma and beta are float32."""
    _layernorm[input.dtype](input, gamma, beta, out, eps, torch.get_num_threads())
