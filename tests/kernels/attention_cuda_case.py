"""Run cases of attention_case.py on the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cuda_modules import AttentionTypes, attention_spec

from fi_backend import jit
from fi_backend.kernels.attention_cuda import CudaLineKernels, load_lines
from tests.kernels.attention_case import Case, Inputs, judge, make_arguments, make_inputs

Load = Callable[[Case], CudaLineKernels]


def loader(
    builder: Callable[..., jit.KernelSpec], all_types: Sequence[AttentionTypes], arch: str
) -> Load:
    """Compile a module for each of `all_types` at once; return a function that finds a case's.

    Args:
        builder: of a spec, from dtypes and head sizes.
        all_types: every module that the tests use.
        arch: "native", or "compute_80": PTX that the driver compiles for the GPU present, which is
            the portable path.
    """
    tag = "" if arch == "native" else "_portable"
    with pytest.MonkeyPatch.context() as patch:
        if tag:
            patch.setenv("FI_BACKEND_CUDA_ARCH_LIST", arch)
        specs = {types: attention_spec(builder, types, tag) for types in all_types}
        jit.build(specs.values())
        kernels = {types: load_lines((spec,)) for types, spec in specs.items()}

    def of_case(case: Case) -> CudaLineKernels:
        kv_dtype, o_dtype = case.kv_dtype or case.q_dtype, case.o_dtype or case.q_dtype
        return kernels[case.q_dtype, kv_dtype, o_dtype, (case.head_dim_qk, case.head_dim_vo)]

    return of_case


def planner_target() -> str:
    """Return whose plan the host planner has to make."""
    return "sm_90" if torch.cuda.get_device_capability()[0] == 9 else "cuda"


def to_gpu(value: Any) -> Any:
    """Move a tensor with its storage, so that strides and what lies between rows stay."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return flat.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def gpu_arguments(kernels: CudaLineKernels, case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return what `kernels.run` takes for a case, on the GPU; the workspace is NaN."""
    arguments = {k: to_gpu(v) for k, v in make_arguments(case, inputs, planner_target()).items()}
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


def check_same_bits_beside_noise(load: Load, case: Case) -> None:
    """Judge a run, then compare 100 more with it while another stream keeps the GPU busy."""
    inputs = make_inputs(case)
    kernels = load(case)
    arguments = gpu_arguments(kernels, case, inputs)
    kernels.run(**arguments)
    judge(case, inputs, arguments["out"].cpu(), arguments["lse"].cpu())
    first, first_lse = arguments["out"].clone(), arguments["lse"].clone()
    noise = torch.randn(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    for i in range(100):
        with torch.cuda.stream(side):
            for _ in range(i % 4):
                noise = noise @ noise * 1e-3
        arguments["out"].fill_(7)
        arguments["lse"].fill_(7)
        kernels.run(**arguments, enable_pdl=i % 2 == 1)
        assert torch.equal(bits(arguments["out"]), bits(first))
        assert torch.equal(arguments["lse"], first_lse)
