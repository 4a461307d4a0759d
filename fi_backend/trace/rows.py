"""Calls that treat rows one by one: norms, gated activations, packing of booleans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fi_backend.trace.template import Scalar, Tensor, TraceTemplate

__all__ = ["TEMPLATES"]


def saturate(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to a dtype of few bits, values outside its range to its largest."""
    if dtype == torch.int8:
        return x.round().clamp(-128, 127).to(dtype)
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def scaled_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide rows by their root mean square and multiply them by a weight, in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMS norm over the last dimension."""
    return scaled_rows(input.float(), weight, eps).to(input.dtype)


def gemma_rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMS norm over the last dimension, scaled by weight + 1."""
    return scaled_rows(input.float(), weight.float() + 1, eps).to(input.dtype)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add input to residual, and replace input by the RMS norm of the sum."""
    total = input.float() + residual.float()
    return scaled_rows(total, weight, eps).to(input.dtype), total.to(residual.dtype)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add input to residual, and replace input by the norm of the sum, scaled by weight + 1."""
    total = input.float() + residual.float()
    return scaled_rows(total, weight.float() + 1, eps).to(input.dtype), total.to(residual.dtype)


def rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMS norm over the last dimension, divided by scale and saturated to the dtype of out."""
    return saturate(scaled_rows(input.float(), weight, eps) / scale, out.dtype)


def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add input to residual; RMS norm of the sum, divided by scale and saturated."""
    total = input.float() + residual.float()
    return (
        saturate(scaled_rows(total, weight, eps) / scale, out.dtype),
        total.to(residual.dtype),
    )


def centred_rows(
    input: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> torch.Tensor:
    """Layer norm over the last dimension, in float32."""
    x = input.float()
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * gamma + beta


def layernorm(
    input: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Layer norm over the last dimension."""
    return centred_rows(input, gamma, beta, eps).to(input.dtype)


def layernorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    scale: float | torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Layer norm over the last dimension, divided by scale and saturated to the dtype of out."""
    return saturate(centred_rows(input, gamma, beta, eps) / scale, out.dtype)


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of each row, times the second half."""
    gate, factor = input.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * factor).to(input.dtype)


def gelu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """GELU of the first half of each row, times the second half."""
    gate, factor = input.float().chunk(2, -1)
    return (torch.nn.functional.gelu(gate) * factor).to(input.dtype)


def gelu_tanh_and_mul(input: torch.Tensor) -> torch.Tensor:
    """GELU, approximated with tanh, of the first half of each row, times the second half."""
    gate, factor = input.float().chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * factor).to(input.dtype)


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack 8 values into each byte; the last byte is padded with zero bits."""
    bits = torch.zeros(math.ceil(len(x) / 8) * 8, dtype=torch.int32, device=x.device)
    bits[: len(x)] = x.bool().int()
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=x.device)
    if bitorder == "big":
        weights = weights.flip(0)
    return (bits.view(-1, 8) * weights).sum(1).to(torch.uint8)


_ROWS = Tensor(("num_tokens", "hidden_size"), "input")
_WEIGHT = Tensor(("hidden_size",), "input")
_FLOAT_WEIGHT = Tensor(("hidden_size",), "float32")
_QUANTISED = Tensor(("num_tokens", "hidden_size"), "out")
_NUMBER = Scalar("float32")
_Values = dict[str, Tensor | Scalar]
_RMS: _Values = {"weight": _WEIGHT, "eps": _NUMBER}
_LAYER: _Values = {"gamma": _FLOAT_WEIGHT, "beta": _FLOAT_WEIGHT}
_SCALE: _Values = {"scale": _NUMBER, "eps": _NUMBER}
_HIDDEN = ("hidden_size",)


def _norm(
    reference: Callable[..., Any],
    inputs: _Values,
    outputs: dict[str, Tensor],
    *helpers: Callable[..., Any],
) -> TraceTemplate:
    name = reference.__name__
    return TraceTemplate(name, (name,), _HIDDEN, inputs, outputs, reference, helpers)


def _gate(reference: Callable[..., Any]) -> TraceTemplate:
    name = reference.__name__
    return TraceTemplate(
        op_type=name,
        calls=(name,),
        const_axes=("double_hidden_size", "hidden_size"),
        inputs={"input": Tensor(("num_tokens", "double_hidden_size"), "input")},
        outputs={"out": _ROWS},
        reference=reference,
        derived={"hidden_size": ("double_hidden_size", 2)},
    )


TEMPLATES = (
    *(
        _norm(reference, {"input": _ROWS, **_RMS}, {"out": _ROWS}, scaled_rows)
        for reference in (rmsnorm, gemma_rmsnorm)
    ),
    *(
        _norm(
            reference,
            {"input": _ROWS, "residual": _ROWS, **_RMS},
            {"input": _ROWS, "residual": _ROWS},
            scaled_rows,
        )
        for reference in (fused_add_rmsnorm, gemma_fused_add_rmsnorm)
    ),
    _norm(
        rmsnorm_quant,
        {"out": _QUANTISED, "input": _ROWS, "weight": _WEIGHT, **_SCALE},
        {"out": _QUANTISED},
        saturate,
        scaled_rows,
    ),
    _norm(
        fused_add_rmsnorm_quant,
        {"out": _QUANTISED, "input": _ROWS, "residual": _ROWS, "weight": _WEIGHT, **_SCALE},
        {"out": _QUANTISED, "residual": _ROWS},
        saturate,
        scaled_rows,
    ),
    _norm(
        layernorm,
        {"input": _ROWS, **_LAYER, "eps": _NUMBER},
        {"out": _ROWS},
        centred_rows,
    ),
    _norm(
        layernorm_quant,
        {"out": _QUANTISED, "input": _ROWS, **_LAYER, **_SCALE},
        {"out": _QUANTISED},
        saturate,
        centred_rows,
    ),
    _gate(silu_and_mul),
    _gate(gelu_and_mul),
    _gate(gelu_tanh_and_mul),
    TraceTemplate(
        op_type="packbits",
        calls=("packbits",),
        const_axes=(),
        inputs={"x": Tensor(("num_bits",), "x"), "bitorder": Scalar("string")},
        outputs={"packed": Tensor(("num_bytes",), "uint8")},
        reference=packbits,
    ),
)
