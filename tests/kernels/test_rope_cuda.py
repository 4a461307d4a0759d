"""Rope, activation and fused modules on a GPU, native and portable, give what the CPU gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_modules import (
    BF16,
    E4M3,
    F16,
    F32,
    FLOATS,
    activation_spec,
    bits,
    rope_append_spec,
    rope_spec,
)

import fi_backend

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def assert_same(out: torch.Tensor, cpu: torch.Tensor) -> None:
    """Equal but for rare values on which float32 rounds the two to different sides."""
    out = out.cpu()
    step = 8 if out.dtype == F32 else 1
    distance = (out.double() - cpu.double()).abs()
    info = torch.finfo(out.dtype)
    bound = step * info.eps * cpu.double().abs().clamp(min=info.smallest_normal)
    # What a rotation cancels is off by float32 steps of the values that went into it.
    assert (distance <= bound + 1e-6).all()
    if out.dtype != F32:
        assert (distance == 0).double().mean() > 0.98


@dtypes
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("head_dim", [128, 80])
def test_rope(cuda_module: Any, dtype: torch.dtype, interleave: bool, head_dim: int) -> None:
    module = cuda_module(rope_spec, (dtype,))
    q, k = torch.randn(77, 6, head_dim).to(dtype), torch.randn(77, 3, head_dim).to(dtype)
    indptr, offsets = torch.tensor([0, 30, 30, 77]), torch.tensor([5, 0, 9000]).int()
    expected = fi_backend.apply_llama31_rope(
        q, k, indptr, offsets, head_dim // 2, interleave, 8, 5e5
    )
    # The ramp's slope and offset for factors 1 and 4 and a context of 8192.
    ramp = (8192 / (2 * math.pi * 3), -1 / 3)
    tensors = [x.cuda() for x in (q, k)]
    table = (None, indptr.cuda(), offsets.cuda())
    form = (head_dim // 2, interleave, 8.0, 5e5, *ramp)
    for enable_pdl in (False, True):
        outs = [torch.full_like(x, math.nan) for x in tensors]
        module.rope(*tensors, *outs, *table, *form, enable_pdl)
        for out, want in zip(outs, expected, strict=True):
            assert_same(out, want)
    module.rope(*tensors, *tensors, *table, *form, False)
    for x, out in zip(tensors, outs, strict=True):
        assert torch.equal(bits(x), bits(out))


@dtypes
@pytest.mark.parametrize("hidden", [4096, 1003])
def test_activations(cuda_module: Any, dtype: torch.dtype, hidden: int) -> None:
    module = cuda_module(activation_spec, (dtype,))
    x = torch.randn(33, 2 * hidden).to(dtype) * 4
    for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
        out = torch.full((33, hidden), math.nan, dtype=dtype, device="cuda")
        getattr(module, name)(x.cuda(), out, True)
        assert_same(out, getattr(fi_backend, name)(x))


@pytest.mark.parametrize("cell", [(BF16, BF16), (F16, E4M3), (F32, F32)], ids=str)
@pytest.mark.parametrize("head_dim", [128, 50])
@pytest.mark.parametrize("rounded", [False, True])
def test_rope_append(cuda_module: Any, cell: tuple[Any, Any], head_dim: int, rounded: bool) -> None:
    module = cuda_module(rope_append_spec, cell)
    dtype, cache_dtype = cell
    q, k, v = (torch.randn(40, heads, head_dim).to(dtype) for heads in (6, 3, 3))
    weight = torch.randn(head_dim).to(dtype)
    positions, slots = torch.randint(0, 64, (40,)), torch.randperm(64)[:40]
    angles = torch.randn(64, head_dim).to(dtype if rounded else F32)
    caches = [torch.zeros(4, 16, 3, head_dim).to(cache_dtype) for _ in "kv"]
    expected = fi_backend.rope_append_to_cache(
        q, k, v, positions, angles, (caches[0], caches[1]), slots, q_weight=weight, k_scale=0.5
    )
    for enable_pdl in (False, True):
        out = torch.full_like(q, math.nan, device="cuda")
        mine = [torch.zeros_like(cache.float()).to(cache_dtype).cuda() for cache in caches]
        rows = [x.cuda() for x in (q, k, v)]
        table = [x.cuda() for x in (positions, angles)]
        module.rope_append_slots(
            *rows, out, *table, *mine, slots.cuda(), False, weight.cuda(), None, 1e-6, 0.0,
            None, None, 0.5, 1.0, enable_pdl,
        )  # fmt: skip
        assert_same(out, expected)
        for cache, want in zip(mine, caches, strict=True):
            assert_same(cache, want)
