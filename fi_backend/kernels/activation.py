"""Gated activations on the CPU: gate(first half of a row) times its second half."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions, float_spec

__all__ = ["activation_spec", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]


def activation_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the module that gates rows of `dtype` (float32, float16 or bfloat16)."""
    return float_spec("activation", dtype)


_silu = Functions("silu_and_mul", activation_spec)
_gelu = Functions("gelu_and_mul", activation_spec)
_gelu_tanh = Functions("gelu_tanh_and_mul", activation_spec)


def silu_and_mul(*, out: torch.Tensor, input: torch.Tensor) -> None:
    """Write ``x * sigmoid(x) * y`` to `out`, for rows ``x | y`` of `input`.

    Args:
        out: [.., hidden_size], rank 1 to 3.
        input: [.., 2 * hidden_size], last dimension contiguous.
    """
    _silu[input.dtype](input, out, torch.get_num_threads())


def gelu_and_mul(*, out: torch.Tensor, input: torch.Tensor) -> None:
    """Write ``x * Phi(x) * y`` to `out`; otherwise as :func:`silu_and_mul`."""
    _gelu[input.dtype](input, out, torch.get_num_threads())


def gelu_tanh_and_mul(*, out: torch.Tensor, input: torch.Tensor) -> None:
    """Use the tanh approximation of GELU; otherwise as :func:`silu_and_mul`."""
    _gelu_tanh[input.dtype](input, out, torch.get_num_threads())
