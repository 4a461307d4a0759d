"""fi_backend.norm: values, in-place forms, strides, special values and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fi_backend
from tests.guarded import FLOATS, guard_is_intact, guarded, same_nans_and_infinities
from tests.tolerance import assert_accurate

EPS = 1e-5
# Below, at and past a vector of 4, 8 or 16 lanes; a row of several chains; enough for two threads.
SHAPES = [(1, 1), (5, 7), (4, 16), (3, 127), (2, 3, 33), (3, 1000), (0, 64), (2, 0, 8), (40, 2048)]

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def rms_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def rms_in_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


@dtypes
@shapes
@pytest.mark.parametrize("gemma", [False, True])
def test_rmsnorm(dtype: torch.dtype, shape: tuple[int, ...], gemma: bool) -> None:
    x = guarded(torch.randn(shape).mul(3).to(dtype))
    weight = torch.randn(shape[-1]).to(dtype)
    scale = weight.float() + 1 if gemma else weight
    norm = fi_backend.gemma_rmsnorm if gemma else fi_backend.rmsnorm
    out = guarded(torch.zeros(shape, dtype=dtype))
    assert norm(x, weight, EPS, out=out) is out
    assert_accurate(out, rms_reference(x, scale), rms_in_dtype(x, scale.to(dtype)))
    assert guard_is_intact(out)
    assert guard_is_intact(x)
    assert torch.equal(norm(x, weight, EPS), out)
    assert torch.equal(norm(x, weight, EPS, out=x), out)  # in place


@dtypes
@shapes
@pytest.mark.parametrize("gemma", [False, True])
def test_fused_add_rmsnorm(dtype: torch.dtype, shape: tuple[int, ...], gemma: bool) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).mul(2).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    scale = weight.float() + 1 if gemma else weight
    norm = fi_backend.gemma_fused_add_rmsnorm if gemma else fi_backend.fused_add_rmsnorm
    out, total = guarded(x), guarded(residual)
    assert norm(out, total, weight, EPS) is None
    assert torch.equal(total, x + residual)
    exact_sum = x.double() + residual.double()
    assert_accurate(
        out, rms_reference(exact_sum, scale), rms_in_dtype(x + residual, scale.to(dtype))
    )
    assert guard_is_intact(out)
    assert guard_is_intact(total)


def test_fused_norm_sees_the_unrounded_sum() -> None:
    """A sum that rounds to 256 in bfloat16 must be normalised as what it is."""
    x = torch.tensor([[256.0, 0.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[0.9, 256.0]], dtype=torch.bfloat16)
    exact = x.float() + residual.float()
    weight = torch.full((2,), 100.0, dtype=torch.bfloat16)
    fi_backend.fused_add_rmsnorm(x, residual, weight, 1e-30)
    assert torch.equal(x, F.rms_norm(exact, (2,), weight.float(), 1e-30).bfloat16())
    assert residual[0, 0] == 256.0


@dtypes
@shapes
def test_layernorm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = guarded((torch.randn(shape) * 2 + 5).to(dtype))
    gamma, beta = torch.randn(shape[-1]), torch.randn(shape[-1])
    out = fi_backend.layernorm(x, gamma, beta, EPS)
    size = shape[-1:]
    reference = F.layer_norm(x.double(), size, gamma.double(), beta.double(), EPS)
    in_dtype = F.layer_norm(x, size, gamma.to(dtype), beta.to(dtype), EPS)
    assert_accurate(out, reference, in_dtype)
    assert guard_is_intact(x)


@dtypes
def test_special_values_stay_in_their_row(dtype: torch.dtype) -> None:
    x = torch.randn(5, 37).to(dtype)
    x[1, 36], x[2, 3], x[3] = float("nan"), float("inf"), 0.0
    weight = torch.ones(37, dtype=dtype)
    expected = F.rms_norm(x.float(), (37,), weight.float(), EPS)
    assert same_nans_and_infinities(fi_backend.rmsnorm(x, weight, EPS), expected)
    fused = x.clone()
    fi_backend.fused_add_rmsnorm(fused, torch.zeros_like(x), weight, EPS)
    assert same_nans_and_infinities(fused, expected)
    layer = fi_backend.layernorm(x, torch.ones(37), torch.zeros(37), EPS)
    assert same_nans_and_infinities(layer, F.layer_norm(x.float(), (37,), eps=EPS))


def test_transposed_heads() -> None:
    """[tokens, heads, dim] views of any token and head order, as q of a fused projection is."""
    x = torch.randn(4, 6, 16).transpose(0, 1)[1:]
    weight = torch.randn(16)
    out = fi_backend.rmsnorm(x, weight, EPS)
    assert_accurate(out, rms_reference(x, weight), rms_in_dtype(x, weight))


def test_offsets_past_two_to_the_31() -> None:
    """Rows 2^31 elements apart; only two pages of the buffer are ever touched."""
    buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    x = buffer.as_strided((2, 64), (2**31, 1))
    values = torch.randn(2, 64).bfloat16()
    x.copy_(values)
    weight = torch.ones(64, dtype=torch.bfloat16)
    fi_backend.rmsnorm(x, weight, EPS, out=x)
    assert torch.equal(x, fi_backend.rmsnorm(values, weight, EPS))


X, W = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "input must be a torch.Tensor; got list", lambda: ([1.0], W)),
        (TypeError, "weight must be a torch.Tensor; got NoneType", lambda: (X, None)),
        (TypeError, "float32, torch.float16, torch.bfloat16; got torch.float64", lambda: (
            X.double(), W.double(),
        )),
        (TypeError, "weight: dtype must be float32, got bfloat16", lambda: (X, W.bfloat16())),
        (ValueError, r"weight: shape must be \[8\], got \[7\]", lambda: (X, W[:7])),
        (ValueError, r"input: rank must be 1, 2 or 3, got shape \[1, 1, 2, 8\]", lambda: (
            X[None, None], W,
        )),
        (ValueError, "input: the last dimension must be contiguous, got stride 2", lambda: (
            torch.zeros(2, 16)[:, ::2], W,
        )),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message):
        fi_backend.rmsnorm(*call())  # type: ignore[operator]


def test_outputs_are_checked_before_anything_is_written() -> None:
    x, residual = torch.ones(2, 8), torch.ones(2, 7)
    with pytest.raises(ValueError, match=r"residual: shape must be \[2, 8\], got \[2, 7\]"):
        fi_backend.fused_add_rmsnorm(x, residual, W)
    with pytest.raises(ValueError, match=r"out: shape must be \[2, 8\], got \[3, 8\]"):
        fi_backend.rmsnorm(x, W, out=torch.ones(3, 8))
    with pytest.raises(TypeError, match="gamma: dtype must be float32, got bfloat16"):
        fi_backend.layernorm(x.bfloat16(), W.bfloat16(), W)
    assert torch.equal(x, torch.ones(2, 8))
    assert torch.equal(residual, torch.ones(2, 7))
