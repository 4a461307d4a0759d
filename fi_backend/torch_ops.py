"""Our kernels as torch ops, so that torch.compile, export and fake tensors see them.

A public function asks :func:`runs_directly` and then calls ``op.direct``, which costs no dispatch,
or ``op.traced``, which a compiler can see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fi_backend.errors import UnsupportedError

__all__ = ["OLDEST_COMPUTE_CAPABILITY", "Op", "register", "runs_directly"]

_library = torch.library.Library("fi_backend", "FRAGMENT")
# Subclasses (fake tensors among them) have no memory that a kernel could read.
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
# 10 * major + minor of the oldest GPUs that CUDA kernels run on: they need cp.async and bfloat16.
OLDEST_COMPUTE_CAPABILITY = 80


class Op(NamedTuple):
    """One kernel, to be called as it is or through torch's dispatcher."""

    direct: Callable[..., Any]
    traced: Callable[..., Any]


def _returns_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for an op that only writes its outputs."""


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] = _returns_nothing
) -> Op:
    """Define the op ``fi_backend::<schema>`` and return it.

    Args:
        schema: name, arguments and results; written arguments carry ``(a!)``.
        implementation: serves tensors of every device, and refuses those it cannot serve.
        fake: the same for tensors without memory: makes results of the right shape and dtype.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fi_backend::{name}", fake, lib=_library)
    return Op(direct=implementation, traced=getattr(torch.ops.fi_backend, name).default)


def runs_directly(operation: str, /, **tensors: torch.Tensor) -> bool:
    """Whether ``op.direct`` may be called on `tensors` now, else ``op.traced`` must be.

    Raises:
        TypeError: one of them is not a tensor.
        UnsupportedError: one of them is on a device that has no kernels.
    """
    for tensor in tensors.values():
        if type(tensor) not in _PLAIN_TYPES or not (tensor.is_cpu or tensor.is_cuda):
            return _needs_no_memory(operation, tensors)
    return not torch.compiler.is_compiling()


def _needs_no_memory(operation: str, tensors: dict[str, torch.Tensor]) -> bool:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"fi_backend: {operation}: {name} must be a torch.Tensor; "
                f"got {type(tensor).__name__}"
            )
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise UnsupportedError(
                f"fi_backend: {operation}: {tensor.device.type.upper()} tensors are not supported; "
                f"got {name} on device={tensor.device}, expected cpu or cuda"
            )
    return False
