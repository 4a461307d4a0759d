"""Gated activations with FlashInfer's calls.

Inputs are float32, float16 or bfloat16 with contiguous rows, on the CPU or on CUDA; arithmetic is
in float32 and the result is rounded once. On CUDA a call is one launch on the current stream, and
may be captured in a graph once a call with the same dtype has compiled or loaded the kernel.
"""

from __future__ import annotations

import torch

from fi_backend.kernels import activation as kernel
from fi_backend.torch_ops import Op, register, runs_directly

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_KERNEL_RANKS = (1, 2, 3)


def _silu_op(out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    kernel.silu_and_mul(out=out, input=input, enable_pdl=enable_pdl)


def _gelu_op(out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    kernel.gelu_and_mul(out=out, input=input, enable_pdl=enable_pdl)


def _gelu_tanh_op(out: torch.Tensor, input: torch.Tensor, enable_pdl: bool = True) -> None:
    kernel.gelu_tanh_and_mul(out=out, input=input, enable_pdl=enable_pdl)


_ARGUMENTS = "(Tensor(a!) out, Tensor input, bool enable_pdl=True) -> ()"

_silu = register(f"silu_and_mul{_ARGUMENTS}", _silu_op)
_gelu = register(f"gelu_and_mul{_ARGUMENTS}", _gelu_op)
_gelu_tanh = register(f"gelu_tanh_and_mul{_ARGUMENTS}", _gelu_tanh_op)


def silu_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Return ``silu(input[..., :hidden_size]) * input[..., hidden_size:]``.

    Args:
        input: [..., 2 * hidden_size].
        out: [..., hidden_size], where the result goes. None: a new tensor.
        enable_pdl: on CUDA, launch as a programmatic dependent of the kernel before. None: where
            the GPU can (compute capability 9.0 and later). Results do not depend on it.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed.
    """
    return _gate("silu_and_mul", _silu, input, out, enable_pdl is not False)


def gelu_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Return ``gelu(input[..., :hidden_size]) * input[..., hidden_size:]``, GELU by erf.

    Arguments and errors are those of :func:`silu_and_mul`.
    """
    return _gate("gelu_and_mul", _gelu, input, out, enable_pdl is not False)


def gelu_tanh_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Use the tanh approximation of GELU; otherwise as :func:`gelu_and_mul`."""
    return _gate("gelu_tanh_and_mul", _gelu_tanh, input, out, enable_pdl is not False)


def _gate(
    operation: str, op: Op, input: torch.Tensor, out: torch.Tensor | None, enable_pdl: bool
) -> torch.Tensor:
    directly = runs_directly(operation, input=input)
    if out is None:
        if input.dim() == 0:
            raise ValueError(f"fi_backend: {operation}: input must have a last dimension; got []")
        out = input.new_empty((*input.shape[:-1], input.shape[-1] // 2))
    elif directly:
        directly = runs_directly(operation, out=out)
    run = op.direct if directly else op.traced
    if input.dim() in _KERNEL_RANKS:
        run(out, input, enable_pdl)
    else:
        run(out.view(-1, out.shape[-1]), input.reshape(-1, input.shape[-1]), enable_pdl)
    return out
