"""A routine: how to draw its inputs, bind a library's call to them, and count its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fi_backend.trace import TraceTemplate, template_of

__all__ = ["Bind", "Bound", "Inputs", "Options", "Routine", "num_bytes", "to_dtype"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Options of one case, by the names of FlashInfer's benchmark.

    Attributes:
        batch_size: requests; rows of norms and activations; tokens of calls on tokens.
        s_qo: new tokens of a request.
        s_kv: keys of a request.
        num_qo_heads, num_kv_heads: heads.
        head_dim_qk, head_dim_vo: elements of a head.
        page_size: tokens of a page.
        hidden_size: elements of a row; of the result, for activations.
        num_states: attention states to merge.
        q_dtype: of queries, rows and new keys.
        kv_dtype: of the cache.
        out_dtype: of quantised results.
        causal: whether prefill is.
        random_actual_seq_len: draw lengths between 1 and s_qo and s_kv.
        interleave: pairs of rope are neighbours.
        device: "cpu" or "cuda".
    """

    batch_size: int = 16
    s_qo: int = 256
    s_kv: int = 1024
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim_qk: int = 128
    head_dim_vo: int = 128
    page_size: int = 16
    hidden_size: int = 4096
    num_states: int = 4
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    out_dtype: str = "float8_e4m3fn"
    causal: bool = False
    random_actual_seq_len: bool = False
    interleave: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Bound:
    """A call: `function(*arguments)` returns the outputs of the routine's template."""

    function: Callable[..., tuple[torch.Tensor, ...]]
    arguments: tuple[Any, ...]


Bind = Callable[[ModuleType, Inputs, str], Bound]


@dataclass(frozen=True)
class Routine:
    """One routine.

    Attributes:
        name: FlashInfer's where it has the routine.
        call: the public call whose trace template has the reference.
        used: names of the options that it looks at.
        make: draws inputs, on torch's default device, by the names of the template.
        bind: binds the call of a library (fi_backend, or flashinfer) to inputs. The last argument
            names a backend within it, or is "auto".
        work: bytes that must move, and floating-point operations (0: not counted).
    """

    name: str
    call: str
    used: tuple[str, ...]
    make: Callable[[Options], Inputs]
    bind: Bind
    work: Callable[[Options, Inputs], tuple[int, int]]

    @property
    def template(self) -> TraceTemplate:
        """The template of the call."""
        template = template_of(self.call)
        assert template is not None, self.call
        return template

    def expected(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Compute the outputs with the template's reference."""
        outputs = self.template.reference(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def to_dtype(name: str) -> torch.dtype:
    """Turn the name of a dtype into the dtype.

    Raises:
        ValueError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype, as bfloat16 is")
    return dtype


def num_bytes(*tensors: torch.Tensor) -> int:
    """Count the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
