"""Norms and gated activations."""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks.routines.routine import Bind, Bound, Inputs, Options, Routine, num_bytes, to_dtype

__all__ = ["ROUTINES"]

_SHAPE = ("batch_size", "hidden_size", "q_dtype")
_SCALE = 0.05


def _rows(options: Options, width: int = 1) -> torch.Tensor:
    return torch.randn(options.batch_size, width * options.hidden_size).to(
        to_dtype(options.q_dtype)
    )


def _weight(options: Options) -> torch.Tensor:
    return torch.randn(options.hidden_size).to(to_dtype(options.q_dtype))


def _make_norm(options: Options) -> Inputs:
    return {"input": _rows(options), "weight": _weight(options)}


def _make_added_norm(options: Options) -> Inputs:
    return {"input": _rows(options), "residual": _rows(options), "weight": _weight(options)}


def _quantised(options: Options, x: Inputs) -> Inputs:
    out = torch.empty_like(x["input"], dtype=to_dtype(options.out_dtype))
    return {"out": out, **x, "scale": _SCALE}


def _make_norm_quant(options: Options) -> Inputs:
    return _quantised(options, _make_norm(options))


def _make_added_norm_quant(options: Options) -> Inputs:
    return _quantised(options, _make_added_norm(options))


def _make_layernorm(options: Options) -> Inputs:
    gamma, beta = torch.randn(2, options.hidden_size).unbind()
    return {"input": _rows(options), "gamma": gamma, "beta": beta}


def _make_layernorm_quant(options: Options) -> Inputs:
    return _quantised(options, _make_layernorm(options))


def _make_gate(options: Options) -> Inputs:
    return {"input": _rows(options, 2)}


def _bind(name: str) -> Bind:
    """Bind a function that takes the inputs in order, and writes those that are outputs."""

    def bind(library: ModuleType, x: Inputs, backend: str) -> Bound:
        function = getattr(library, name)
        written = [key for key in ("out", "input", "residual") if key in x]
        if "out" in x:
            written.remove("input")

        def call(*arguments: object) -> tuple[torch.Tensor, ...]:
            result = function(*arguments)
            if isinstance(result, torch.Tensor):
                return (result,)
            named = dict(zip(x, arguments, strict=True))
            return tuple(named[key] for key in written)

        return Bound(call, tuple(x.values()))

    return bind


def _work(options: Options, x: Inputs) -> tuple[int, int]:
    """Rows read and written, a residual read and written too; weights once."""
    tensors = [value for name, value in x.items() if isinstance(value, torch.Tensor)]
    moved = num_bytes(*tensors)
    if "out" not in x:  # the result is as large as the rows, or as a gate's half of them
        moved += options.batch_size * options.hidden_size * x["input"].element_size()
    return moved + (num_bytes(x["residual"]) if "residual" in x else 0), 0


ROUTINES = tuple(
    Routine(name, name, (*_SHAPE, "out_dtype") if "quant" in name else _SHAPE, make, bind, _work)
    for name, make, bind in (
        (name, make, _bind(name))
        for name, make in (
            ("rmsnorm", _make_norm),
            ("gemma_rmsnorm", _make_norm),
            ("fused_add_rmsnorm", _make_added_norm),
            ("gemma_fused_add_rmsnorm", _make_added_norm),
            ("rmsnorm_quant", _make_norm_quant),
            ("fused_add_rmsnorm_quant", _make_added_norm_quant),
            ("layernorm", _make_layernorm),
            ("layernorm_quant", _make_layernorm_quant),
            ("silu_and_mul", _make_gate),
            ("gelu_and_mul", _make_gate),
            ("gelu_tanh_and_mul", _make_gate),
        )
    )
)
