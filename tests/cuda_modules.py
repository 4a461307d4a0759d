"""KernelSpecs of the CUDA modules, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import (
    activation,
    append_kv,
    attention_cuda,
    device_plan,
    merge,
    mixed,
    norm,
    pack_masks,
    page_table,
    rope,
    rope_append,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INT8 = torch.int8

FLOATS = (BF16, F16, F32)

# What tests and CI compile: each dtype, each conversion that differs, no full cross product.
MERGE_DTYPES = [(BF16, BF16), (F16, F16), (F32, BF16)]
APPEND_DTYPES = [(BF16, BF16), (F16, E4M3), (BF16, E5M2)]
RMSNORM_DTYPES = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, E4M3)]
LAYERNORM_DTYPES = [(BF16, BF16), (F32, F32), (F16, INT8)]
ROPE_APPEND_DTYPES = [(BF16, BF16), (F16, E4M3), (F32, F32)]


def merge_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the merge module of (input, output) dtypes; `tag` tells equal modules apart."""
    spec = merge.merge_cuda_spec(*dtypes)
    return replace(spec, name=spec.name + tag)


def append_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the append module of (new rows, cache) dtypes."""
    spec = append_kv.append_cuda_spec(*dtypes)
    return replace(spec, name=spec.name + tag)


def rmsnorm_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the RMS norm module of (input, output) dtypes."""
    return _norm_spec(norm.rmsnorm_cuda_spec, dtypes, tag)


def layernorm_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the layer norm module of (input, output) dtypes."""
    return _norm_spec(norm.layernorm_cuda_spec, dtypes, tag)


def _norm_spec(
    builder: Callable[..., KernelSpec], dtypes: tuple[torch.dtype, torch.dtype], tag: str
) -> KernelSpec:
    dtype, out_dtype = dtypes
    spec = builder(dtype, None if out_dtype == dtype else out_dtype)
    return replace(spec, name=spec.name + tag)


def rope_spec(dtypes: tuple[torch.dtype], tag: str = "") -> KernelSpec:
    """Return the rotary embedding module of one dtype."""
    spec = rope.rope_cuda_spec(*dtypes)
    return replace(spec, name=spec.name + tag)


def activation_spec(dtypes: tuple[torch.dtype], tag: str = "") -> KernelSpec:
    """Return the gated activation module of one dtype."""
    spec = activation.activation_cuda_spec(*dtypes)
    return replace(spec, name=spec.name + tag)


def rope_append_spec(dtypes: tuple[torch.dtype, torch.dtype], tag: str = "") -> KernelSpec:
    """Return the fused rope and append module of (new rows, cache) dtypes."""
    spec = rope_append.rope_append_cuda_spec(*dtypes)
    return replace(spec, name=spec.name + tag)


# q, cache and output dtypes, and the head sizes of q and k, and of v and the output.
AttentionTypes = tuple[torch.dtype, torch.dtype, torch.dtype, tuple[int, int]]


def attention_spec(
    builder: Callable[..., KernelSpec], types: AttentionTypes, tag: str = ""
) -> KernelSpec:
    """Return the attention module that `builder` describes."""
    names = ("q_dtype", "kv_dtype", "o_dtype")
    dims = dict(head_dim_qk=types[3][0], head_dim_vo=types[3][1])
    spec = builder(**dict(zip(names, types[:3], strict=True)), **dims)
    return replace(spec, name=spec.name + tag)


def decode_spec(
    dtypes: tuple[torch.dtype, torch.dtype], tag: str = "", dims: tuple[int, int] = (128, 128)
) -> KernelSpec:
    """Return the few-row attention module of (q and output, cache) dtypes."""
    return attention_spec(attention_cuda.decode_spec, (*dtypes, dtypes[0], dims), tag)


def prefill_spec(
    dtypes: tuple[torch.dtype, torch.dtype], tag: str = "", dims: tuple[int, int] = (128, 128)
) -> KernelSpec:
    """Return the many-row attention module of (q and output, cache) dtypes."""
    return attention_spec(attention_cuda.prefill_spec, (*dtypes, dtypes[0], dims), tag)


def mixed_spec(
    dtypes: tuple[torch.dtype, torch.dtype], tag: str = "", dims: tuple[int, int] = (128, 128)
) -> KernelSpec:
    """Return the attention module for both lines, of (q and output, cache) dtypes."""
    return attention_spec(mixed.mixed_spec, (*dtypes, dtypes[0], dims), tag)


def mixed_trace_spec(
    dtypes: tuple[torch.dtype, torch.dtype], tag: str = "", dims: tuple[int, int] = (128, 128)
) -> KernelSpec:
    """Return the module of mixed_spec() that records when each thread block is at which line."""
    builder = partial(mixed.mixed_spec, trace=True)
    return attention_spec(builder, (*dtypes, dtypes[0], dims), tag)


def plan_spec(dtypes: tuple[()] = (), tag: str = "") -> KernelSpec:
    """Return the device planner's module, which no dtype changes."""
    return replace(device_plan.plan_spec(), name=f"plan_cuda{tag}")


def page_table_spec(dtypes: tuple[()] = (), tag: str = "") -> KernelSpec:
    """Return the page table's module, which no dtype changes."""
    return replace(page_table.page_table_spec("cuda"), name=f"page_table_cuda{tag}")


def pack_masks_spec(dtypes: tuple[()] = (), tag: str = "") -> KernelSpec:
    """Return the mask packer's module, which no dtype changes."""
    return replace(pack_masks.pack_masks_spec("cuda"), name=f"pack_masks_cuda{tag}")


def all_specs(tag: str = "") -> list[KernelSpec]:
    """Return every module that the tests use."""
    return [
        *(merge_spec(dtypes, tag) for dtypes in MERGE_DTYPES),
        *(append_spec(dtypes, tag) for dtypes in APPEND_DTYPES),
        *(rmsnorm_spec(dtypes, tag) for dtypes in RMSNORM_DTYPES),
        *(layernorm_spec(dtypes, tag) for dtypes in LAYERNORM_DTYPES),
        *(spec((dtype,), tag) for spec in (rope_spec, activation_spec) for dtype in FLOATS),
        *(rope_append_spec(dtypes, tag) for dtypes in ROPE_APPEND_DTYPES),
        plan_spec(tag=tag),
        page_table_spec(tag=tag),
        pack_masks_spec(tag=tag),
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
