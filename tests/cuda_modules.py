"""KernelSpecs of the CUDA modules, and how their results are judged."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.dtypes import cpp_type, short_name

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# What tests and CI compile: each dtype, each conversion that differs, no full cross product.
MERGE_DTYPES = [(BF16, BF16), (F16, F16), (F32, BF16)]
APPEND_DTYPES = [(BF16, BF16), (F16, E4M3), (BF16, E5M2)]
RMSNORM_DTYPES = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, E4M3)]


def _spec(
    kernel: str, second: str, dtypes: tuple[torch.dtype, torch.dtype], tag: str
) -> KernelSpec:
    parameters = {
        f"{name}_{side}_type": cpp_type(dtype, target)
        for name, dtype in zip(("in", second), dtypes, strict=True)
        for side, target in (("device", "cuda"), ("host", "cpu"))
    }
    return KernelSpec(
        name=f"{kernel}_cuda_{short_name(dtypes[0])}_{short_name(dtypes[1])}{tag}",
        target="cuda",
        templates=(f"{kernel}_cuda.cu.j2", f"{kernel}_cuda_binding.cc.j2"),
        parameters=tuple(sorted(parameters.items())),
    )


def merge_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the merge module of (input, output) dtypes; `tag` tells equal modules apart."""
    return _spec("merge", "out", dtypes, tag)


def append_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the append module of (new rows, cache) dtypes."""
    return _spec("append", "cache", dtypes, tag)


def rmsnorm_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the RMS norm module of (input, output) dtypes."""
    return _spec("rmsnorm", "out", dtypes, tag)


def all_specs(tag: str = "") -> list[KernelSpec]:
    """Return every module that the tests use."""
    return [
        *(merge_spec(dtypes, tag) for dtypes in MERGE_DTYPES),
        *(append_spec(dtypes, tag) for dtypes in APPEND_DTYPES),
        *(rmsnorm_spec(dtypes, tag) for dtypes in RMSNORM_DTYPES),
    ]


def assert_rounded(out: torch.Tensor, reference: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Assert that `out` is the fp64 `reference` computed in fp32 and rounded once.

    `magnitude` bounds the sum of absolute values that went into each element: fp32 errors scale
    with it. Rounding adds half an ulp of the result, and of the smallest subnormal at least.
    """
    info = torch.finfo(out.dtype)
    smallest_step = info.smallest_normal * info.eps
    bound = 16 * torch.finfo(torch.float32).eps * magnitude
    bound = bound + 0.5 * info.eps * reference.abs() + 0.5 * smallest_step
    error = (out.double() - reference).abs()
    assert torch.isfinite(out.float()).all()
    worst = (error / bound).max().item()
    assert worst <= 1.01, f"error is {worst:.2f} times its bound"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns, so that equality holds for NaN and tells -0 from 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(integers[tensor.element_size()])
