"""The layer norm kernels on a GPU, against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_modules import BF16, F16, F32, INT8, assert_rounded, bits, layernorm_spec

pytestmark = pytest.mark.gpu

# Every kernel and block shape, as for the RMS norm.
HIDDEN = [8, 72, 128, 264, 1000, 4096, 5120, 16384, 16392, 70000, 1, 100, 4095, 20001]


def reference(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1:]
    return torch.nn.functional.layer_norm(x.double(), size, gamma.double(), beta.double(), 1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_values(cuda_module: Any, dtype: torch.dtype, hidden: int) -> None:
    """A mean far from zero, which E[x^2] - E[x]^2 would not survive."""
    module = cuda_module(layernorm_spec, (dtype, dtype))
    gamma, beta = torch.randn(2, hidden, device="cuda")
    for num_rows in (1, 7, 133):
        x = (torch.randn(num_rows, hidden, device="cuda") + 30).to(dtype)
        out = torch.full_like(x, math.nan)
        module.layernorm(x, gamma, beta, out, None, 1.0, 1e-5, False)
        expected = reference(x, gamma, beta)
        # The mean errs by an ulp of 30, and what remains is scaled by gamma over the deviation.
        deviation = x.double().std(-1, correction=0, keepdim=True) + math.sqrt(1e-5)
        magnitude = expected.abs() + beta.abs() + 30 * gamma.abs() / deviation
        assert_rounded(out, expected, magnitude)
        module.layernorm(x, gamma, beta, x, None, 1.0, 1e-5, True)  # in place
        assert torch.equal(bits(x), bits(out))


def test_int8_out_of_strided_heads(cuda_module: Any) -> None:
    module = cuda_module(layernorm_spec, (F16, INT8))
    for dim, start in ((128, 4), (33, 2)):
        x = torch.randn(50, 20, dim, device="cuda").to(F16)[:, start : start + 5]
        gamma, beta = torch.randn(2, dim, device="cuda")
        out = torch.empty(5, 50, dim, dtype=INT8, device="cuda").transpose(0, 1)
        scale = torch.tensor([0.02], device="cuda")
        module.layernorm(x, gamma, beta, out, scale, 1.0, 1e-5, False)
        expected = (reference(x, gamma, beta) / 0.02).clamp(-128, 127)
        assert ((out.double() - expected).abs() <= 0.5 + 1e-5 * expected.abs()).all()
        assert (out == 127).any()
        assert (out == -128).any()
