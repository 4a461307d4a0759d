"""fi_backend.norm: values, in-place and quantised forms, strides, special values and errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fi_backend
from fi_backend import jit
from fi_backend.kernels import norm as kernel
from tests.guarded import FLOATS, guard_is_intact, guarded, same_nans_and_infinities
from tests.tolerance import assert_accurate

EPS = 1e-5
# Below, at and past a vector of 4, 8 or 16 lanes; a row of several chains; enough for two threads.
SHAPES = [(1, 1), (5, 7), (4, 16), (3, 127), (2, 3, 33), (3, 1000), (0, 64), (2, 0, 8), (40, 2048)]

# Largest value of each dtype that a result can be quantised to.
QUANTIZED = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
out_dtypes = pytest.mark.parametrize("out_dtype", QUANTIZED, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        pairs = [*product(FLOATS, (None,)), *product((torch.bfloat16,), QUANTIZED)]
        pairs += product((torch.float32,), QUANTIZED)
        specs = (kernel.rmsnorm_cuda_spec, kernel.layernorm_cuda_spec)
        jit.build([spec(*pair) for spec in specs for pair in pairs])


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


def assert_quantized(
    out: torch.Tensor, reference: torch.Tensor, scale: float | torch.Tensor
) -> None:
    """Every value is the nearest to reference / scale there is, or, at a tie, a neighbour."""
    largest = QUANTIZED[out.dtype]
    scaled = (reference / torch.as_tensor(scale, dtype=torch.float64)).clamp(-largest - 1, largest)
    scaled = scaled if out.dtype == torch.int8 else scaled.clamp(min=-largest)
    if out.dtype == torch.int8:
        half_step = torch.full_like(scaled, 0.5)
    else:
        info = torch.finfo(out.dtype)
        half_step = scaled.abs().clamp(min=info.smallest_normal) * info.eps / 2
    assert ((out.double() - scaled).abs() <= half_step + 1e-5 * scaled.abs()).all()


@out_dtypes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 33), (3, 1000), (0, 64)], ids=str)
@pytest.mark.parametrize("scale", [0.037, 1e-4])
def test_quantised_forms(
    dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...], scale: float
) -> None:
    """The small scale saturates nearly everywhere."""
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1])
    out = torch.empty(shape, dtype=out_dtype)
    total = residual.clone()

    assert fi_backend.rmsnorm_quant(out, x, weight, scale, EPS) is None
    assert_quantized(out, rms_reference(x, weight), scale)
    fi_backend.fused_add_rmsnorm_quant(out, x, total, weight, torch.tensor([scale]), EPS)
    assert torch.equal(total, x + residual)
    assert_quantized(out, rms_reference(x.double() + residual.double(), weight), scale)
    fi_backend.layernorm_quant(out, x, weight.float(), bias, torch.tensor(scale), EPS)
    size = shape[-1:]
    assert_quantized(
        out, F.layer_norm(x.double(), size, weight.double(), bias.double(), EPS), scale
    )


@out_dtypes
def test_quantised_nan(out_dtype: torch.dtype) -> None:
    """fp8 has NaN; int8 has none and stores 0."""
    x, out = torch.ones(2, 16), torch.empty(2, 16, dtype=out_dtype)
    x[1, 3] = float("nan")
    fi_backend.rmsnorm_quant(out, x, torch.ones(16), 0.5)
    assert torch.equal(out[0].float(), torch.full((16,), 2.0))
    if out_dtype == torch.int8:
        assert torch.equal(out[1], torch.zeros(16, dtype=torch.int8))
    else:
        assert out[1].float().isnan().all()


@dtypes
def test_special_values_stay_in_their_row(dtype: torch.dtype) -> None:
    """As the formula has it: an infinity makes itself NaN and the others 0.

    torch's own norm makes that whole row NaN on CUDA, where it sums squares about a running mean.
    """
    x = torch.randn(5, 37).to(dtype)
    x[1, 36], x[2, 3], x[3] = float("nan"), float("inf"), 0.0
    weight = torch.ones(37, dtype=dtype)
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
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


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input must be a torch.Tensor; got list", lambda x, w: ([1.0], w)),
        (TypeError, "weight must be a torch.Tensor; got NoneType", lambda x, w: (x, None)),
        (TypeError, "float32, torch.float16, torch.bfloat16; got torch.float64", lambda x, w: (
            x.double(), w.double(),
        )),
        (TypeError, "weight: dtype must be float32, got bfloat16", lambda x, w: (x, w.bfloat16())),
        (ValueError, r"weight: shape must be \[8\], got \[7\]", lambda x, w: (x, w[:7])),
        (ValueError, r"input: rank must be 1, 2 or 3, got shape \[1, 1, 2, 8\]", lambda x, w: (
            x[None, None], w,
        )),
        (ValueError, "input: the last dimension must be contiguous, got stride 2", lambda x, w: (
            torch.zeros(2, 16)[:, ::2], w,
        )),
    ],
)  # fmt: skip
def test_bad_arguments(
    error: type[Exception], message: str, arguments: Callable[..., tuple[Any, Any]]
) -> None:
    with pytest.raises(error, match=message):
        fi_backend.rmsnorm(*arguments(torch.zeros(2, 8), torch.zeros(8)))


def test_outputs_are_checked_before_anything_is_written() -> None:
    x, residual, weight = torch.ones(2, 8), torch.ones(2, 7), torch.zeros(8)
    with pytest.raises(ValueError, match=r"residual: shape must be \[2, 8\], got \[2, 7\]"):
        fi_backend.fused_add_rmsnorm(x, residual, weight)
    with pytest.raises(ValueError, match=r"out: shape must be \[2, 8\], got \[3, 8\]"):
        fi_backend.rmsnorm(x, weight, out=torch.ones(3, 8))
    with pytest.raises(TypeError, match="out: dtype must be float32, got bfloat16"):
        fi_backend.rmsnorm(x, weight, out=x.bfloat16())
    with pytest.raises(TypeError, match="gamma: dtype must be float32, got bfloat16"):
        fi_backend.layernorm(x.bfloat16(), weight.bfloat16(), weight)
    with pytest.raises(TypeError, match=r"quantised out must be one of .*int8; got torch.float32"):
        fi_backend.rmsnorm_quant(x, x, weight, 1.0)
    with pytest.raises(ValueError, match="scale: must be above 0, got 0"):
        fi_backend.layernorm_quant(x.to(torch.int8), x, weight, weight, 0.0)
    with pytest.raises(ValueError, match=r"scale: shape must be \[1\], got \[2\]"):
        fi_backend.rmsnorm_quant(x.to(torch.int8), x, weight, torch.ones(2))
    assert torch.equal(x, torch.ones(2, 8))
    assert torch.equal(residual, torch.ones(2, 7))
