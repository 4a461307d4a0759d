"""Gated activations: gate(first half of a row) times its second half.

On CUDA each call is one launch on the current stream.
"""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions, float_cuda_spec, float_spec

__all__ = [
    "activation_cuda_spec",
    "activation_spec",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "silu_and_mul",
]


def activation_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the CPU module that gates rows of `dtype` (float32, float16 or bfloat16)."""
    return float_spec("activation", dtype)


def activation_cuda_spec(dtype: torch.dtype) -> KernelSpec:
    """Describe the CUDA module that gates rows of `dtype` (float32, float16 or bfloat16)."""
    return float_cuda_spec("activation", dtype)


class _Gate:
    """One gate's functions on both targets."""

    def __init__(self, name: str) -> None:
        self._cpu = Functions(name, activation_spec)
        self._cuda = Functions(name, activation_cuda_spec)

    def run(self, input: torch.Tensor, out: torch.Tensor, enable_pdl: bool) -> None:
        if input.is_cuda:
            self._cuda[input.dtype](input, out, enable_pdl)
        else:
            self._cpu[input.dtype](input, out, torch.get_num_threads())


_silu = _Gate("silu_and_mul")
_gelu = _Gate("gelu_and_mul")
_gelu_tanh = _Gate("gelu_tanh_and_mul")


def silu_and_mul(*, out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    """Write ``x * sigmoid(x) * y`` to `out`, for rows ``x | y`` of `input`.

    Args:
        out: [.., hidden_size], rank 1 to 3.
        input: [.., 2 * hidden_size], last dimension contiguous.
        enable_pdl: on CUDA, launch as a programmatic dependent of the kernel before.
    """
    _silu.run(input, out, enable_pdl)


def gelu_and_mul(*, out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    """Write ``x * Phi(x) * y`` to `out`; otherwise as :func:`silu_and_mul`."""
    _gelu.run(input, out, enable_pdl)


def gelu_tanh_and_mul(*, out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    """Use the tanh approximation of GELU; otherwise as :func:`silu_and_mul`."""
    _gelu_tanh.run(input, out, enable_pdl)
