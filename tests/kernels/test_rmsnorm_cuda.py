"""The RMS norm kernels on a GPU, against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_modules import BF16, E4M3, F16, F32, assert_rounded, bits, rmsnorm_spec

pytestmark = pytest.mark.gpu

DTYPES = [(BF16, BF16), (F16, F16), (F32, F32)]
# Every kernel and block shape: parts of a warp, a warp, whole warps that do not divide the row, the
# longest row kept in registers, longer ones, and rows that 16 bytes do not divide.
HIDDEN = [8, 64, 72, 128, 256, 264, 512, 1000, 1024, 4096, 5120, 8192, 16384, 16392, 70000]
HIDDEN += [1, 100, 4095, 20001]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, bias: float = 0.0) -> torch.Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * (weight.double() + bias)


def run(module: Any, x: Any, weight: Any, out: Any, **options: Any) -> None:
    module.rmsnorm(
        x,
        weight,
        out,
        options.get("residual"),
        options.get("scale"),
        options.get("scale_value", 1.0),
        options.get("eps", 1e-6),
        options.get("weight_bias", 0.0),
        options.get("enable_pdl", False),
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_values(cuda_module: Any, dtypes: Any, hidden: int) -> None:
    module = cuda_module(rmsnorm_spec, dtypes)
    dtype = dtypes[0]
    weight = torch.randn(hidden, device="cuda").to(dtype)
    for num_rows in (1, 7, 133):
        x = torch.randn(num_rows, hidden, device="cuda").to(dtype)
        out = torch.full_like(x, math.nan)
        run(module, x, weight, out, weight_bias=1.0, eps=1e-5)
        expected = reference(x.double(), weight, 1e-5, bias=1.0)
        assert_rounded(out, expected, expected.abs() + x.double().abs())

        residual = torch.randn(num_rows, hidden, device="cuda").to(dtype)
        total = x.double() + residual.double()
        run(module, x, weight, x, residual=residual)  # in place
        expected = reference(total, weight, 1e-6)
        assert_rounded(residual, total, total.abs())
        assert_rounded(x, expected, expected.abs())


def test_strided_heads(cuda_module: Any) -> None:
    """Heads of a fused projection: the norm of q and k inside qkv, aligned and not."""
    module = cuda_module(rmsnorm_spec, (BF16, BF16))
    for heads, dim, start in ((12, 128, 4), (5, 72, 1), (3, 33, 2), (1, 128, 0)):
        qkv = torch.randn(50, 20, dim, device="cuda").to(BF16)
        x = qkv[:, start : start + heads]
        weight = torch.randn(dim, device="cuda").to(BF16)
        expected = reference(x.double(), weight, 1e-6)
        out = torch.full((heads, 50, dim), math.nan, dtype=BF16, device="cuda").transpose(0, 1)
        run(module, x, weight, out)
        assert_rounded(out, expected, expected.abs())
        untouched = qkv.clone()
        run(module, x, weight, x)
        assert torch.equal(bits(x), bits(out))
        assert torch.equal(bits(qkv[:, :start]), bits(untouched[:, :start]))
        assert torch.equal(bits(qkv[:, start + heads :]), bits(untouched[:, start + heads :]))


def test_fp8_out(cuda_module: Any) -> None:
    module = cuda_module(rmsnorm_spec, (BF16, E4M3))
    x, weight = torch.randn(33, 1024, device="cuda").to(BF16), torch.ones(1024, device="cuda")
    weight = weight.to(BF16) * 2
    scale = torch.tensor([0.037], device="cuda")
    expected = (reference(x.double(), weight, 1e-6) / 0.037).clamp(-448, 448)
    for options in ({"scale": scale}, {"scale_value": 0.037}):
        out = torch.full(x.shape, math.nan, device="cuda").to(E4M3)
        run(module, x, weight, out, **options)
        assert_rounded(out, expected, expected.abs())
    tiny = torch.tensor([1e-6], device="cuda")
    run(module, x, weight, out, scale=tiny)
    assert (out.float().abs() == 448).float().mean() > 0.99  # saturates, no NaN
    assert not out.float().isnan().any()


def test_offsets_past_2_to_the_31(cuda_module: Any) -> None:
    module = cuda_module(rmsnorm_spec, (BF16, BF16))
    row_stride = 2**30 + 8
    storage = torch.empty(2 * row_stride + 4096, dtype=BF16, device="cuda")
    for hidden in (4096, 1001):
        near = torch.randn(3, hidden, device="cuda").to(BF16)
        weight = torch.randn(hidden, device="cuda").to(BF16)
        far = storage.as_strided((3, hidden), (row_stride, 1))
        far.copy_(near)
        expected = torch.empty_like(near)
        run(module, near, weight, expected)
        run(module, far, weight, far)
        assert torch.equal(bits(far), bits(expected))


def test_rows_are_independent_and_pdl_is_ordered(cuda_module: Any) -> None:
    """A row's bits do not depend on the rows beside it; dependent launches see each other."""
    module = cuda_module(rmsnorm_spec, (BF16, BF16))
    for hidden in (128, 4096):
        x = torch.randn(1000, hidden, device="cuda").to(BF16)
        weight = (torch.randn(hidden, device="cuda") + 2).to(BF16)
        together, alone = torch.empty_like(x), torch.empty_like(x[:1])
        run(module, x, weight, together)
        run(module, x[777:778], weight, alone)
        assert torch.equal(bits(together[777:778]), bits(alone))

        chained, plain = x.clone(), x.clone()
        for _ in range(20):
            run(module, chained, weight, chained, enable_pdl=True)
            run(module, plain, weight, plain)
        assert torch.equal(bits(chained), bits(plain))


def test_weights_read_late_give_the_same_bits(cuda_module: Any) -> None:
    """Where rows with a residual find their weights depends on how many rows there are."""
    module = cuda_module(rmsnorm_spec, (BF16, BF16))
    for hidden in (128, 4096, 5000):
        num_rows = 2**26 // hidden + 1  # 2^23 accesses of 8 values, and a row
        x = torch.randn(num_rows, hidden, device="cuda", dtype=BF16)
        residual = torch.randn_like(x)
        weight = (torch.randn(hidden, device="cuda") + 2).to(BF16)
        part = slice(num_rows - 300, num_rows)
        few_x, few_residual = x[part].clone(), residual[part].clone()
        run(module, x, weight, x, residual=residual)
        run(module, few_x, weight, few_x, residual=few_residual)
        assert torch.equal(bits(x[part]), bits(few_x))
        assert torch.equal(bits(residual[part]), bits(few_residual))


def test_errors_name_the_argument(cuda_module: Any) -> None:
    module = cuda_module(rmsnorm_spec, (BF16, BF16))
    x, weight = torch.zeros(4, 64, dtype=BF16, device="cuda"), torch.zeros(64, device="cuda")
    with pytest.raises(TypeError, match="weight: dtype must be bfloat16, got float32"):
        run(module, x, weight, x)
    with pytest.raises(ValueError, match="input: rank must be 1, 2 or 3, got shape"):
        run(module, x[None, None], weight.to(BF16), x)
    with pytest.raises(ValueError, match=r"residual: shape must be \[4, 64\], got \[3, 64\]"):
        run(module, x, weight.to(BF16), x, residual=x[:3])
