"""Normalisation with FlashInfer's calls: RMS norm and layer norm, with their quantised forms.

Inputs are float32, float16 or bfloat16 with contiguous rows, on the CPU or on CUDA, all tensors of
a call on one device; arithmetic is in float32 and each result is rounded once. On CUDA a call is
one launch on the current stream, and may be captured in a graph once a call with the same dtypes
has compiled or loaded the kernel.
"""

from __future__ import annotations

import torch

from fi_backend.kernels import norm as kernel
from fi_backend.torch_ops import register, runs_directly

__all__ = [
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_quant",
]


def _rmsnorm_op(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    enable_pdl: bool = True,
) -> None:
    kernel.rmsnorm(
        out=out,
        input=input,
        weight=weight,
        residual=None,
        eps=eps,
        weight_bias=weight_bias,
        enable_pdl=enable_pdl,
    )


def _fused_add_rmsnorm_op(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    enable_pdl: bool = True,
) -> None:
    kernel.rmsnorm(
        out=input,
        input=input,
        weight=weight,
        residual=residual,
        eps=eps,
        weight_bias=weight_bias,
        enable_pdl=enable_pdl,
    )


def _rmsnorm_quant_op(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    scales: torch.Tensor | None,
    eps: float,
    enable_pdl: bool = True,
) -> None:
    kernel.rmsnorm(
        out=out,
        input=input,
        weight=weight,
        residual=residual,
        eps=eps,
        scale=scale if scales is None else scales,
        enable_pdl=enable_pdl,
    )


def _layernorm_op(
    out: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> None:
    kernel.layernorm(out=out, input=input, gamma=gamma, beta=beta, eps=eps)


def _layernorm_quant_op(
    out: torch.Tensor,
    input: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    scale: float | torch.Tensor,
    scales: torch.Tensor | None,
    eps: float,
) -> None:
    scale = scale if scales is None else scales
    kernel.layernorm(out=out, input=input, gamma=gamma, beta=beta, eps=eps, scale=scale)


_rmsnorm = register(
    "rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps, float weight_bias, "
    "bool enable_pdl=True) -> ()",
    _rmsnorm_op,
)
_fused_add_rmsnorm = register(
    "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, "
    "float weight_bias, bool enable_pdl=True) -> ()",
    _fused_add_rmsnorm_op,
)
_rmsnorm_quant = register(
    "rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!)? residual, Tensor weight, "
    "float scale, Tensor? scales, float eps, bool enable_pdl=True) -> ()",
    _rmsnorm_quant_op,
)
_layernorm = register(
    "layernorm(Tensor(a!) out, Tensor input, Tensor gamma, Tensor beta, float eps) -> ()",
    _layernorm_op,
)
_layernorm_quant = register(
    "layernorm_quant(Tensor(a!) out, Tensor input, Tensor gamma, Tensor beta, float scale, "
    "Tensor? scales, float eps) -> ()",
    _layernorm_quant_op,
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
        enable_pdl: on CUDA, launch as a programmatic dependent of the kernel before. None: where
            the GPU can (compute capability 9.0 and later). Results do not depend on it.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape, stride or device is not allowed.
    """
    return _norm_to("rmsnorm", input, weight, eps, out, 0.0, enable_pdl is not False)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Return ``input / rms(input) * (weight + 1)``; otherwise as :func:`rmsnorm`."""
    return _norm_to("gemma_rmsnorm", input, weight, eps, out, 1.0, enable_pdl is not False)


def _norm_to(
    operation: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    weight_bias: float,
    enable_pdl: bool,
) -> torch.Tensor:
    directly = runs_directly(operation, input=input, weight=weight)
    if out is None:
        out = torch.empty_like(input)
    elif directly:
        directly = runs_directly(operation, out=out)
    run = _rmsnorm.direct if directly else _rmsnorm.traced
    run(out, input, weight, eps, weight_bias, enable_pdl)
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
        enable_pdl: as for :func:`rmsnorm`.

    Raises:
        TypeError, ValueError: as :func:`rmsnorm`.
    """
    directly = runs_directly("fused_add_rmsnorm", input=input, residual=residual, weight=weight)
    run = _fused_add_rmsnorm.direct if directly else _fused_add_rmsnorm.traced
    run(input, residual, weight, eps, 0.0, enable_pdl is not False)


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
    run(input, residual, weight, eps, 1.0, enable_pdl is not False)


def rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Write ``saturate(rmsnorm(input) / scale)`` to `out`.

    Args:
        out: like `input`, but float8_e4m3fn, float8_e5m2 or int8.
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, hidden_size].
        weight: [hidden_size], the dtype of `input`.
        scale: a float above 0, or a float32 tensor [] or [1] on the device of `input`, whose value
            is not looked at.
        eps: added to the mean square.
        enable_pdl: as for :func:`rmsnorm`.

    Raises:
        TypeError, ValueError: as :func:`rmsnorm`; or the scale is not above 0.
    """
    _rmsnorm_quant_to("rmsnorm_quant", out, input, None, weight, scale, eps, enable_pdl)


def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """Add `input` to `residual` in place, and write ``saturate(norm of the sum / scale)`` to `out`.

    `residual` is like `input`, which stays. Other arguments and errors are those of
    :func:`rmsnorm_quant`.
    """
    operation = "fused_add_rmsnorm_quant"
    _rmsnorm_quant_to(operation, out, input, residual, weight, scale, eps, enable_pdl)


def _rmsnorm_quant_to(
    operation: str,
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    directly = runs_directly(operation, out=out, input=input, weight=weight)
    if residual is not None:
        directly &= runs_directly(operation, residual=residual)
    value, tensor = _split_scale(scale)
    run = _rmsnorm_quant.direct if directly else _rmsnorm_quant.traced
    run(out, input, residual, weight, value, tensor, eps, enable_pdl is not False)


def _split_scale(scale: float | torch.Tensor) -> tuple[float, torch.Tensor | None]:
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)


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


def layernorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
) -> None:
    """Write ``saturate(layernorm(input) / scale)`` to `out`.

    `out` and `scale` are as for :func:`rmsnorm_quant`, `gamma` and `beta` as for :func:`layernorm`.

    Raises:
        TypeError, ValueError: as :func:`rmsnorm_quant`.
    """
    directly = runs_directly("layernorm_quant", out=out, input=input, gamma=gamma, beta=beta)
    value, tensor = _split_scale(scale)
    run = _layernorm_quant.direct if directly else _layernorm_quant.traced
    run(out, input, gamma, beta, value, tensor, eps)
