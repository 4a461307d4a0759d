"""merge_state and its siblings: exact at the edges, any head_dim, strides, masks, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from sync_debug import nothing_waits
from wrapper_cases import assert_state

import fi_backend as fi
from fi_backend import jit
from fi_backend.errors import UnsupportedError
from fi_backend.kernels.merge import merge_cuda_spec
from tests.tolerance import assert_accurate, max_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
on_cuda = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        jit.build([merge_cuda_spec(dtype, dtype) for dtype in DTYPES])


def merged(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge v [rows, states, heads, dim] and s [rows, states, heads] in float64."""
    v, s = v.double(), s.double()
    lse = torch.logsumexp(s * math.log(2), dim=1) / math.log(2)
    weights = torch.exp2(s - lse[:, None]).nan_to_num(0.0)
    values = torch.where(weights[..., None] > 0, v * weights[..., None], 0.0)
    return values.sum(1), lse


def states(
    rows: int, count: int, dtype: torch.dtype, heads: int = 3, head_dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states, some of them empty: those hold garbage values, which must not matter."""
    v = torch.randn(rows, count, heads, head_dim).to(dtype)
    s = torch.randn(rows, count, heads) * 4
    empty = torch.rand(rows, count, heads) < 0.3
    empty[0] = True
    return v.masked_fill(empty[..., None], math.nan), s.masked_fill(empty, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 1), (71, 33), (2, 100), (8, 512)])
@pytest.mark.usefixtures("device")
def test_merge_state(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    v, s = states(9, 2, dtype, heads, head_dim)
    before = v.clone(), s.clone()
    out, lse = fi.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    expected, expected_lse = merged(v, s)
    assert out.dtype == dtype
    assert lse.dtype == F32
    assert_accurate(out, expected, expected.to(dtype))
    assert max_error(lse, expected_lse) < 1e-5
    assert (out[0] == 0).all()
    assert torch.equal(before[0].nan_to_num(), v.nan_to_num())
    assert torch.equal(before[1], s)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8], ids=str)
@pytest.mark.usefixtures("device")
def test_merge_state_in_place(mask_dtype: torch.dtype | None) -> None:
    v, s = states(9, 2, F32)
    rows = torch.rand(9) < 0.5 if mask_dtype is not None else torch.ones(9, dtype=torch.bool)
    mask = None
    if mask_dtype is not None:
        mask = rows * 2 if mask_dtype == torch.uint8 else rows  # any nonzero byte is True
        mask = mask.to(mask_dtype)
    ours_v, ours_s = v[:, 0].clone(), s[:, 0].clone()
    fi.merge_state_in_place(ours_v, ours_s, v[:, 1], s[:, 1], mask)
    out, lse = merged(v, s)
    assert_state((ours_v[rows], ours_s[rows]), (out[rows], lse[rows]))
    assert torch.equal(ours_v[~rows].nan_to_num(7.0), v[:, 0][~rows].nan_to_num(7.0))
    assert torch.equal(ours_s[~rows], s[:, 0][~rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.usefixtures("device")
def test_merge_states(count: int, dtype: torch.dtype) -> None:
    for head_dim in (64, 20, 7):
        v, s = states(9, count, dtype, head_dim=head_dim)
        out, lse = fi.merge_states(v, s)
        expected, expected_lse = merged(v, s)
        assert_accurate(out, expected, expected.to(dtype))
        assert max_error(lse, expected_lse) < 1e-5


@pytest.mark.usefixtures("device")
def test_strided_states() -> None:
    """Heads before rows, as some kernels write their sums; values at odd offsets."""
    v, s = states(9, 2, BF16)
    wide = torch.full((2, 3, 9, 67), math.nan).to(BF16)
    strided_v = wide[..., 3:].permute(2, 0, 1, 3)
    strided_v.copy_(v)
    strided_s = s.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for got, want in zip(fi.merge_states(strided_v, strided_s), fi.merge_states(v, s), strict=True):
        assert torch.equal(got, want)
    pair = (strided_v[:, 0], strided_s[:, 0], strided_v[:, 1], strided_s[:, 1])
    expected = fi.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    for got, want in zip(fi.merge_state(*pair), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("device")
def test_merges_are_torch_ops() -> None:
    """Compiled code calls them as one graph, and opcheck finds their schemas true."""
    v, s = torch.randn(5, 2, 3, 64), torch.randn(5, 2, 3)
    pair = (v[:, 0].clone(), s[:, 0].clone(), v[:, 1].clone(), s[:, 1].clone())
    ops = torch.ops.fi_backend
    torch.library.opcheck(ops.merge_state, (*pair, *(torch.empty_like(x) for x in pair[:2])))
    torch.library.opcheck(ops.merge_state_in_place, (*pair, torch.ones(5, dtype=torch.bool)))
    torch.library.opcheck(ops.merge_states, (v, s, *(torch.empty_like(x) for x in pair[:2])))

    def both(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = fi.merge_state(*states)
        fi.merge_state_in_place(out, lse, *states[2:])
        return out, lse

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*pair), both(*pair), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("device")
def test_merge_refuses() -> None:
    v, s = torch.zeros(5, 3, 64), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"s_a must have shape \[5, 3\]"):
        fi.merge_state(v, s[:4], v, s)
    with pytest.raises(TypeError, match=r"s_b must have dtype torch\.float32"):
        fi.merge_state(v, s, v, s.double())
    with pytest.raises(ValueError, match=r"v_b must be like v_a, torch\.float32 \[5, 3, 64\]"):
        fi.merge_state(v, s, v[..., :32], s)
    with pytest.raises(ValueError, match="v must have stride 1"):
        fi.merge_state_in_place(torch.zeros(5, 3, 64, 2)[..., 0], s, v, s)
    with pytest.raises(ValueError, match=r"mask must have shape \[5\]"):
        fi.merge_state_in_place(v, s, v, s, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"v must have shape \[\*, \*, \*, \*\]"):
        fi.merge_states(v, s)
    with pytest.raises(ValueError, match="v_a: head_dim must be at least 1, got 0"):
        fi.merge_state(v[..., :0], s, v[..., :0], s)


def test_tensors_without_memory_and_other_devices() -> None:
    v, s = torch.zeros(5, 2, 3, 64, dtype=BF16, device="meta"), torch.zeros(5, 2, 3, device="meta")
    out, lse = fi.merge_states(v, s)
    assert out.is_meta
    assert (out.shape, out.dtype, lse.shape) == ((5, 3, 64), BF16, (5, 3))

    class Elsewhere(torch.Tensor):
        device = torch.device("xpu:0")

    v, s = (torch.zeros(shape).as_subclass(Elsewhere) for shape in ((5, 3, 64), (5, 3)))
    with pytest.raises(UnsupportedError, match="merge_state_in_place: XPU tensors are not support"):
        fi.merge_state_in_place(v, s, v, s)


@on_cuda
def test_graphs_replay_with_other_values(device: str) -> None:
    v, s = states(33, 2, BF16, heads=32, head_dim=128)
    fi.merge_states(v, s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fi.merge_states(v, s)
        fi.merge_state_in_place(out, lse, v[:, 1], s[:, 1])
    for tensor, new in zip((v, s), states(33, 2, BF16, heads=32, head_dim=128), strict=True):
        tensor.copy_(new)
    expected, expected_lse = fi.merge_states(v, s)
    fi.merge_state_in_place(expected, expected_lse, v[:, 1], s[:, 1])
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@on_cuda
def test_results_are_all_that_is_allocated_and_nothing_waits(device: str) -> None:
    v, s = states(9, 2, BF16)
    mask = torch.ones(9, dtype=torch.uint8)
    out, lse = fi.merge_states(v, s)
    with nothing_waits():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        fi.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        fi.merge_states(v, s)
        fi.merge_state_in_place(out, lse, v[:, 1], s[:, 1], mask)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 4
