"""TraceTemplate: what a public call computes, as data and as a few lines of torch.

A template and the arguments of one call give a *definition*: a JSON object with axes (constant for
a model, or varying from step to step), inputs and outputs with their shapes and dtypes, and the
source of a reference that needs nothing but torch.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Scalar", "Tensor", "TraceTemplate", "dtype_name"]

_IMPORTS = "import math\n\nimport torch\n"
# How axes appear in names of definitions.
_SHORT = {
    "num_qo_heads": "h",
    "num_kv_heads": "kv",
    "num_heads": "h",
    "head_dim": "d",
    "head_dim_vo": "dv",
    "hidden_size": "n",
    "double_hidden_size": "in",
    "page_size": "ps",
    "rotary_dim": "rot",
}
# Axes that names leave out where they are as large as another.
_LIKE = {"head_dim_vo": "head_dim", "rotary_dim": "head_dim"}


@dataclass(frozen=True)
class Tensor:
    """A tensor: the names of its axes, and its dtype.

    Attributes:
        shape: axis names.
        dtype: a dtype's name, or that of the input whose dtype it has.
        optional: whether a call may leave it out.
    """

    shape: tuple[str, ...]
    dtype: str
    optional: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number, of the C type that holds it."""

    dtype: str


@dataclass(frozen=True)
class TraceTemplate:
    """What calls of one kind compute.

    Attributes:
        op_type: name of the kind.
        calls: public names that it describes; a method as "Class.method".
        const_axes: axes that a model fixes; all others vary.
        inputs: by name; the parameters of the reference.
        outputs: by name; what the reference returns, in order. What a call overwrites is an output.
        reference: computes the outputs from the inputs, with torch alone.
        helpers: functions that the reference calls.
        renames: inputs by the arguments that give them, where their names differ.
        caches: arguments that hold the pair k_cache and v_cache.
        excludes: arguments that the reference does not know, with the values that ask for nothing;
            a call with another value has no definition.
        derived: axes of outputs that no input has: name to (other axis, divisor).
    """

    op_type: str
    calls: tuple[str, ...]
    const_axes: tuple[str, ...]
    inputs: Mapping[str, Tensor | Scalar]
    outputs: Mapping[str, Tensor]
    reference: Callable[..., Any]
    helpers: tuple[Callable[..., Any], ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    excludes: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    derived: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def definition(self, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> dict[str, Any]:
        """Return the JSON-ready definition for a model.

        Args:
            sizes: of the constant axes.
            dtypes: names of inputs' dtypes, where the template leaves them open or a call differs.

        Raises:
            ValueError: the size of a constant axis, or a dtype, is missing.
        """
        missing = [axis for axis in self.const_axes if axis not in sizes]
        if missing:
            raise ValueError(f"{self.op_type}: sizes of {', '.join(missing)} are missing")
        values = (*self.inputs.values(), *self.outputs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        axes = dict.fromkeys(axis for tensor in tensors for axis in tensor.shape)
        inputs, outputs = (
            {name: _entry(value, self._dtype(name, value, dtypes)) for name, value in part.items()}
            for part in (self.inputs, self.outputs)
        )
        return {
            "name": self.name(sizes, dtypes),
            "op_type": self.op_type,
            "fi_api": [f"fi_backend.{call}" for call in self.calls],
            "description": inspect.getdoc(self.reference),
            "axes": {
                axis: {"type": "const", "value": sizes[axis]}
                if axis in self.const_axes
                else {"type": "var"}
                for axis in axes
            },
            "inputs": inputs,
            "outputs": outputs,
            "reference": self.source(),
        }

    def form_of(self, arguments: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, str]] | None:
        """Return the sizes and dtypes of a call, as :meth:`definition` takes them.

        None stands for a call that asks for more than the reference computes, or has tensors of
        another form than the template's. Looks at shapes and dtypes only.

        Args:
            arguments: by the names of the call's parameters.
        """
        for name, allowed in self.excludes.items():
            value = arguments.get(name)
            if isinstance(value, torch.Tensor) or (value is not None and value not in allowed):
                return None
        tensors = self._tensors(arguments)
        sizes: dict[str, int] = {}
        for name, value in tensors.items():
            described = self.inputs[name]
            assert isinstance(described, Tensor)
            if len(described.shape) != value.dim():
                return None
            for axis, size in zip(described.shape, value.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    return None
        for axis, (whole, divisor) in self.derived.items():
            sizes[axis] = sizes[whole] // divisor
        return sizes, {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}

    def name(self, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
        """Name the definition that sizes and dtypes give."""
        named = [axis for axis in self.const_axes if sizes[axis] != sizes.get(_LIKE.get(axis, ""))]
        parts = [f"{_SHORT.get(axis, axis)}{sizes[axis]}" for axis in named]
        open_dtypes = [n for n, v in self.inputs.items() if isinstance(v, Tensor) and v.dtype == n]
        return "_".join([self.op_type, *parts, *(dtypes[name] for name in open_dtypes)])

    def source(self) -> str:
        """Return a Python module whose `run` is the reference."""
        functions = [textwrap.dedent(inspect.getsource(f)) for f in (*self.helpers, self.reference)]
        return "\n\n".join([_IMPORTS, *functions, f"run = {self.reference.__name__}\n"])

    def _tensors(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        named = {self.renames.get(name, name): value for name, value in arguments.items()}
        for cache in self.caches:
            if cache in arguments:
                named["k_cache"], named["v_cache"] = _pair(arguments[cache])
        return {
            name: value
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and isinstance(self.inputs.get(name), Tensor)
        }

    def _dtype(self, name: str, value: Tensor | Scalar, dtypes: Mapping[str, str]) -> str:
        if isinstance(value, Scalar):
            return value.dtype
        if name in dtypes and name in self.inputs:
            return dtypes[name]
        if value.dtype not in self.inputs:
            return value.dtype
        if value.dtype == name or value.dtype not in dtypes:
            raise ValueError(f"{self.op_type}: the dtype of {value.dtype} is missing")
        return dtypes[value.dtype]


def _entry(value: Tensor | Scalar, dtype: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": None, "dtype": dtype}
    if isinstance(value, Tensor):
        entry["shape"] = list(value.shape)
        if value.optional:
            entry["optional"] = True
    return entry


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without its module, as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _pair(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as keys and values: it is a pair, or one tensor [num_pages, 2, ...]."""
    return (cache[:, 0], cache[:, 1]) if isinstance(cache, torch.Tensor) else tuple(cache)
