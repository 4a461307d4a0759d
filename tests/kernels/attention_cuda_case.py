"""Run cases of attention_case.py on the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fi_backend.kernels.attention_cuda import CudaLineKernels
from tests.kernels.attention_case import Case, Inputs, judge, make_arguments, make_inputs

Load = Callable[[Case], CudaLineKernels]


def to_gpu(value: Any) -> Any:
    """Move a tensor with its storage, so that strides and what lies between rows stay."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return flat.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def gpu_arguments(kernels: CudaLineKernels, case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return what `kernels.run` takes for a case, on the GPU; the workspace is NaN."""
    arguments = {k: to_gpu(v) for k, v in make_arguments(case, inputs, "cuda").items()}
    floats = kernels.partial_floats(num_workers=case.num_workers, split=case.split)
    arguments["partials"] = torch.full((floats,), math.nan, device="cuda")
    return arguments


def run(load: Load, case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a case; return out and lse on the CPU."""
    kernels = load(case)
    arguments = gpu_arguments(kernels, case, inputs)
    kernels.run(**arguments)
    return arguments["out"].cpu(), arguments["lse"].cpu()


def check(load: Load, case: Case) -> None:
    """Draw inputs, run, judge."""
    inputs = make_inputs(case)
    judge(case, inputs, *run(load, case, inputs))


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of a tensor of 16-bit or 32-bit floats."""
    return x.view(torch.int16 if x.itemsize == 2 else torch.int32)
