"""fi_backend.activation: values over the whole range, strides, special values and errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import fi_backend
from fi_backend import jit
from fi_backend.kernels.activation import activation_cuda_spec
from tests.guarded import FLOATS, guard_is_intact, guarded, same_nans_and_infinities
from tests.tolerance import assert_accurate, max_error, one_ulp

Gate = Callable[[torch.Tensor], torch.Tensor]
OPS: list[tuple[Callable[..., torch.Tensor], Gate]] = [
    (fi_backend.silu_and_mul, F.silu),
    (fi_backend.gelu_and_mul, F.gelu),
    (fi_backend.gelu_tanh_and_mul, lambda x: F.gelu(x, approximate="tanh")),
]
SHAPES = [(2,), (3, 2), (5, 62), (2, 3, 34), (0, 16), (2, 1, 3, 10), (30, 2050), (7, 12288)]

ops = pytest.mark.parametrize(("op", "gate"), OPS, ids=["silu", "gelu", "gelu_tanh"])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        jit.build(map(activation_cuda_spec, FLOATS))


@ops
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_mul(
    op: Callable[..., torch.Tensor], gate: Gate, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = guarded(torch.randn(shape).mul(3).to(dtype))
    half = shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = op(x)
    reference, in_dtype = gate(a.double()) * b.double(), gate(a) * b
    # Of a few values torch may get every one right by luck; ours err by up to 4 ulp of a float.
    allowed = 2 * max_error(in_dtype, reference) + one_ulp(reference, dtype)
    assert max_error(out, reference) <= allowed + 4 * one_ulp(reference, torch.float32)
    assert guard_is_intact(x)
    if len(shape) <= 3:
        given = guarded(torch.zeros_like(out))
        assert op(x, given) is given
        assert torch.equal(given, out)
        assert guard_is_intact(given)


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


def exact_gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize(
    ("op", "exact"),
    [
        (fi_backend.silu_and_mul, F.silu),
        (fi_backend.gelu_and_mul, exact_gelu),
        (fi_backend.gelu_tanh_and_mul, exact_gelu_tanh),
    ],
    ids=["silu", "gelu", "gelu_tanh"],
)
def test_relative_error_stays_small_in_the_tail(
    op: Callable[..., torch.Tensor], exact: Gate
) -> None:
    """The negative tail keeps its relative precision, which 1 + erf(x) loses."""
    x = torch.linspace(-7, 80, 100_001)
    out = op(torch.stack([x, torch.ones_like(x)]).reshape(1, -1))[0]
    expected = exact(x.double())
    # An exponent of 36, as there is at x = -7, is rounded by 2e-6, and its float constants by more.
    assert ((out - expected).abs() <= 6e-6 * expected.abs()).all()


@ops
@dtypes
def test_special_values(op: Callable[..., torch.Tensor], gate: Gate, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    special = [0.0, -0.0, largest, -largest, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor([value for value in special for _ in special], dtype=dtype)
    y = torch.tensor(special * len(special), dtype=dtype)
    expected = (gate(x.double()) * y.double()).to(dtype)
    assert same_nans_and_infinities(op(torch.cat([x, y])), expected)


def test_aligned_rows_of_a_larger_buffer() -> None:
    """Strides that wide accesses allow, and more than one block for a row."""
    buffer = torch.randn(3, 5, 9000).bfloat16()
    x = buffer[:, 1:4, 8 : 8 + 8704]
    out = torch.full((3, 3, 4400), float("nan"), dtype=torch.bfloat16)
    fi_backend.silu_and_mul(x, out[..., 16 : 16 + 4352])
    a, b = x.chunk(2, -1)
    assert_accurate(out[..., 16:4368], F.silu(a.double()) * b.double(), F.silu(a) * b)
    assert out[..., :16].isnan().all()
    assert out[..., 4368:].isnan().all()


def test_offsets_past_two_to_the_31() -> None:
    """Rows 2^31 elements apart; only the touched pages of the buffer become memory."""
    buffer = torch.empty(2**31 + 128, dtype=torch.bfloat16)
    x = buffer.as_strided((2, 128), (2**31, 1))
    near = torch.randn(2, 128).bfloat16()
    x.copy_(near)
    assert torch.equal(fi_backend.gelu_and_mul(x), fi_backend.gelu_and_mul(near))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"input must be a torch.Tensor; got int"):
        fi_backend.silu_and_mul(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input: the last dimension must be even .*, got 5"):
        fi_backend.silu_and_mul(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"out: shape must be \[2, 3\], got \[2, 4\]"):
        fi_backend.gelu_and_mul(torch.zeros(2, 6), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="out: dtype must be float32, got bfloat16"):
        fi_backend.gelu_and_mul(torch.zeros(2, 6), torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"got torch.int32"):
        fi_backend.gelu_tanh_and_mul(torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="must have a last dimension"):
        fi_backend.silu_and_mul(torch.tensor(1.0))
