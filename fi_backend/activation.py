"""Gated activations with FlashInfer's calls.

Inputs are float32, float16 or bfloat16 with contiguous rows, on the CPU; arithmetic is in float32
and the result is rounded once. `enable_pdl` concerns CUDA launches and changes nothing here.
"""

from __future__ import annotations

import torch

from fi_backend.kernels import activation as kernel
from fi_backend.torch_ops import Op, register, runs_directly

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_KERNEL_RANKS = (1, 2, 3)


def _silu_op(out: torch.Tensor, input: torch.Tensor) -> None:
    kernel.silu_and_mul(out=out, input=input)


def _gelu_op(out: torch.Tensor, input: torch.Tensor) -> None:
    kernel.gelu_and_mul(out=out, input=input)


def _gelu_tanh_op(out: torch.Tensor, input: torch.Tensor) -> None:
    kernel.gelu_tanh_and_mul(out=out, input=input)


_silu = register("silu_and_mul(Tensor(a!) out, Tensor input) -> ()", _silu_op)
_gelu = register("gelu_and_mul(Tensor(a!) out, Tensor input) -> ()", _gelu_op)
_gelu_tanh = register("gelu_tanh_and_mul(Tensor(a!) out, Tensor input) -> ()", _gelu_tanh_op)


def silu_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Return ``silu(input[..., :hidden_size]) * input[..., hidden_size:]``.

    Args:
        input: [..., 2 * hidden_size].
        out: [..., hidden_size], where the result goes. None: a new tensor.
        enable_pdl: for CUDA launches; no effect on the CPU.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed.
    """
    return _gate("silu_and_mul", _silu, input, out)


def gelu_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Return ``gelu(input[..., :hidden_size]) * input[..., hidden_size:]``, GELU by erf.

    Arguments and errors are those of :func:`silu_and_mul`.
    """
    return _gate("gelu_and_mul", _gelu, input, out)


def gelu_tanh_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """Use the tanh approximation of GELU; otherwise as :func:`gelu_and_mul`."""
    return _gate("gelu_tanh_and_mul", _gelu_tanh, input, out)


def _gate(operation: str, op: Op, input: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    directly = runs_directly(operation, input=input)
    if out is None:
        if input.dim() == 0:
            raise ValueError(f"fi_backend: {operation}: input must have a last dimension; got []")
        out = input.new_empty((*input.shape[:-1], input.shape[-1] // 2))
    elif directly:
        directly = runs_directly(operation, out=out)
    run = op.direct if directly else op.traced
    if input.dim() in _KERNEL_RANKS:
        run(out, input)
    else:
        run(out.view(-1, out.shape[-1]), input.reshape(-1, input.shape[-1]))
    return out
