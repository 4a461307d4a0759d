"""Normalisation with FlashInfer's calls: RMS norm, its Gemma and residual forms, layer norm.

Inputs are float32, float16 or bfloat16 with contiguous rows, on the CPU; arithmetic is in float32
and each result is rounded once. `enable_pdl` concerns CUDA launches and changes nothing here.
"""

from __future__ import annotations

import torch

from fi_backend.kernels import norm as kernel
from fi_backend.torch_ops import register, runs_directly

__all__ = [
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "rmsnorm",
]


def _rmsnorm_op(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    kernel.rmsnorm(
        out=out, input=input, weight=weight, residual=None, eps=eps, weight_bias=weight_bias
    )


def _fused_add_rmsnorm_op(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
) -> None:
    kernel.rmsnorm(
        out=input, input=input, weight=weight, residual=residual, eps=eps, weight_bias=weight_bias
    )


def _layernorm_op(
    out: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> None:
    kernel.layernorm(out=out, input=input, gamma=gamma, beta=beta, eps=eps)


_rmsnorm = register(
    "rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps, float weight_bias) -> ()",
    _rmsnorm_op,
)
_fused_add_rmsnorm = register(
    "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, "
    "float weight_bias) -> ()",
    _fused_add_rmsnorm_op,
)
_layernorm = register(
    "layernorm(Tensor(a!) out, Tensor input, Tensor gamma, Tensor beta, float eps) -> ()",
    _layernorm_op,
)


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Return ``input / rms(input) * weight``, rms over the last dimension.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, hidden_size].
        weight: [hidden_size], the dtype of `input`.
        eps: added to the mean square.
        out: where the result goes, like `input`; may be `input`. None: a new tensor.
        enable_pdl: for CUDA launches; no effect on the CPU.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed.
    """
    return _norm_to("rmsnorm", input, weight, eps, out, 0.0)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Return ``input / rms(input) * (weight + 1)``; otherwise as :func:`rmsnorm`."""
    return _norm_to("gemma_rmsnorm", input, weight, eps, out, 1.0)


def _norm_to(
    operation: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    weight_bias: float,
) -> torch.Tensor:
    directly = runs_directly(operation, input=input, weight=weight)
    if out is None:
        out = torch.empty_like(input)
    elif directly:
        directly = runs_directly(operation, out=out)
    run = _rmsnorm.direct if directly else _rmsnorm.traced
    run(out, input, weight, eps, weight_bias)
    return out


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add `input` to `residual` in place, then overwrite `input` with the RMS norm of the sum.

    The norm sees the sum before it is rounded to the dtype of `residual`.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, hidden_size], overwritten.
        residual: like `input`, overwritten.
        weight: [hidden_size], the dtype of `input`.
        eps: added to the mean square.
        enable_pdl: for CUDA launches; no effect on the CPU.

    Raises:
        TypeError, ValueError: as :func:`rmsnorm`.
    """
    directly = runs_directly("fused_add_rmsnorm", input=input, residual=residual, weight=weight)
    run = _fused_add_rmsnorm.direct if directly else _fused_add_rmsnorm.traced
    run(input, residual, weight, eps, 0.0)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Scale by ``weight + 1``; otherwise as :func:`fused_add_rmsnorm`."""
    directly = runs_directly(
        "gemma_fused_add_rmsnorm", input=input, residual=residual, weight=weight
    )
    run = _fused_add_rmsnorm.direct if directly else _fused_add_rmsnorm.traced
    run(input, residual, weight, eps, 1.0)


def layernorm(
    input: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Return ``(input - mean) / sqrt(variance + eps) * gamma + beta`` over the last dimension.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, hidden_size].
        gamma: float32 [hidden_size].
        beta: float32 [hidden_size].
        eps: added to the variance.

    Raises:
        TypeError, ValueError: as :func:`rmsnorm`.
    """
    directly = runs_directly("layernorm", input=input, gamma=gamma, beta=beta)
    out = torch.empty_like(input)
    run = _layernorm.direct if directly else _layernorm.traced
    run(out, input, gamma, beta, eps)
    return out
