"""What the loaders of per-dtype kernels share: their KernelSpecs and a memo of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fi_backend import jit
from fi_backend.jit import KernelSpec
from fi_backend.kernels.dtypes import cpp_type, short_name

__all__ = ["Functions", "check_float", "cuda_spec", "float_cuda_spec", "float_spec"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_float(family: str, dtype: torch.dtype) -> None:
    """Check that kernels of `family` have inputs of `dtype`.

    Raises:
        TypeError: `dtype` is not float32, float16 or bfloat16.
    """
    if dtype not in _FLOATS:
        allowed = ", ".join(map(str, _FLOATS))
        raise TypeError(f"{family}: dtype of the input must be one of {allowed}; got {dtype}")


def float_spec(family: str, dtype: torch.dtype) -> KernelSpec:
    """Describe the CPU module of `family` that stores `dtype` and computes in float32.

    Raises:
        TypeError: see :func:`check_float`.
    """
    check_float(family, dtype)
    return KernelSpec(
        name=f"{family}_cpu_{short_name(dtype)}",
        target="cpu",
        templates=(f"{family}_cpu.cc.j2",),
        parameters=(("dtype", cpp_type(dtype, "cpu")),),
    )


def float_cuda_spec(family: str, dtype: torch.dtype) -> KernelSpec:
    """Describe the CUDA module of `family` that stores `dtype` and computes in float32.

    Raises:
        TypeError: see :func:`check_float`.
    """
    check_float(family, dtype)
    return cuda_spec(family, {"in": dtype})


def cuda_spec(family: str, dtypes: Mapping[str, torch.dtype]) -> KernelSpec:
    """Describe the CUDA module of `family` for dtypes by the name that its templates give them.

    Template parameters are ``<name>_device_type`` and ``<name>_host_type``.
    """
    parameters = {
        f"{name}_{side}_type": cpp_type(dtype, target)
        for name, dtype in dtypes.items()
        for side, target in (("device", "cuda"), ("host", "cpu"))
    }
    return KernelSpec(
        name="_".join((family, "cuda", *map(short_name, dtypes.values()))),
        target="cuda",
        templates=(f"{family}_cuda.cu.j2", f"{family}_cuda_binding.cc.j2"),
        parameters=tuple(sorted(parameters.items())),
    )


class Functions(dict[Any, Callable[..., Any]]):
    """The function of one name in every module of a family, by what tells the modules apart.

    A plain dict once filled, so that the lookup on an engine's path costs no Python call. The
    first lookup of a key compiles or loads its module.
    """

    def __init__(self, name: str, spec: Callable[[Any], KernelSpec]) -> None:
        super().__init__()
        self._name = name
        self._spec = spec

    def __missing__(self, key: Any) -> Callable[..., Any]:
        function = jit.load(self._spec(key)).get_function(self._name)
        self[key] = function
        return function
