"""Merge kernels on a GPU, against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_modules import BF16, F16, F32, assert_rounded, bits, merge_spec

pytestmark = pytest.mark.gpu

DTYPES = [(BF16, BF16), (F16, F16), (F32, BF16)]
# One head; more heads than any block has threads for; dims that 16 bytes do not divide.
SHAPES = [(1, 1, 64), (33, 71, 128), (9, 8, 256), (7, 3, 100), (2, 1100, 96), (5, 2, 1), (0, 4, 64)]


def states(rows: int, count: int, heads: int, dim: int, dtype: torch.dtype) -> Any:
    v = torch.randn(rows, count, heads, dim, device="cuda").to(dtype)
    lse = torch.randn(rows, count, heads, device="cuda") * 8
    return v, lse


def reference(v: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return v, lse and the magnitude of what was summed, in fp64, of states along dim 1."""
    lse = lse.double()
    top = lse.amax(1, keepdim=True).clamp_min(-1e30)
    weights = torch.exp2(lse - top)
    total = weights.sum(1)
    used = torch.where(weights[..., None] > 0, v.double(), 0.0)
    scale = (weights / total.clamp_min(1e-300)[:, None])[..., None]
    merged_lse = torch.where(total > 0, torch.log2(total) + top[:, 0], -math.inf)
    return (scale * used).sum(1), merged_lse, (scale * used.abs()).sum(1)


def merge_pair(module: Any, v: Any, lse: Any, out_dtype: torch.dtype, **options: Any) -> Any:
    out = torch.full_like(v[:, 0], math.nan, dtype=out_dtype, memory_format=torch.contiguous_format)
    out_lse = torch.full_like(lse[:, 0], math.nan, memory_format=torch.contiguous_format)
    module.merge_pair(
        v[:, 0],
        lse[:, 0],
        v[:, 1],
        lse[:, 1],
        out,
        out_lse,
        options.get("mask"),
        options.get("enable_pdl", False),
    )
    return out, out_lse


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_and_states(cuda_module: Any, dtypes: Any, shape: tuple[int, int, int]) -> None:
    module = cuda_module(merge_spec, dtypes)
    for count in (2, 1, 7):
        v, lse = states(shape[0], count, *shape[1:], dtypes[0])
        expected, expected_lse, magnitude = reference(v, lse)
        results = []
        out = torch.full(shape, math.nan, dtype=dtypes[1], device="cuda")
        out_lse = torch.full(shape[:2], math.nan, device="cuda")
        module.merge_states(v, lse, out, out_lse, False)
        results.append((out, out_lse))
        if count == 2:
            results.append(merge_pair(module, v, lse, dtypes[1]))
        for got, got_lse in results:
            if got.numel():
                assert_rounded(got, expected, magnitude)
                assert (got_lse.double() - expected_lse).abs().max() < 1e-5


def test_empty_states_are_exact(cuda_module: Any) -> None:
    """Values of a state with lse -inf are never looked at, whatever they are."""
    module = cuda_module(merge_spec, (BF16, BF16))
    v, lse = states(4, 2, 5, 128, BF16)
    lse[1, 0], lse[2, 1], lse[3] = -math.inf, -math.inf, -math.inf
    v[1, 0], v[2, 1], v[3] = math.nan, math.inf, math.nan
    stack_v, stack_lse = torch.zeros_like(v[:, 0]), torch.zeros_like(lse[:, 0])
    module.merge_states(v, lse, stack_v, stack_lse, False)
    for out, out_lse in (merge_pair(module, v, lse, BF16), (stack_v, stack_lse)):
        assert torch.equal(bits(out[1]), bits(v[1, 1]))
        assert torch.equal(out_lse[1], lse[1, 1])
        assert torch.equal(bits(out[2]), bits(v[2, 0]))
        assert torch.equal(out_lse[2], lse[2, 0])
        assert torch.equal(bits(out[3]), torch.zeros_like(bits(out[3])))
        assert (out_lse[3] == -math.inf).all()
    none = torch.empty(4, 0, 5, 128, dtype=BF16, device="cuda")
    module.merge_states(none, torch.empty(4, 0, 5, device="cuda"), stack_v, stack_lse, False)
    assert (stack_v == 0).all()
    assert (stack_lse == -math.inf).all()


@pytest.mark.parametrize("heads", [3, 71])
def test_in_place_with_mask(cuda_module: Any, heads: int) -> None:
    module = cuda_module(merge_spec, (BF16, BF16))
    v, lse = states(300, 2, heads, 96, BF16)
    a, lse_a = v[:, 0].clone(), lse[:, 0].clone()
    mask = torch.rand(300, device="cuda") < 0.5
    expected, expected_lse = merge_pair(module, v, lse, BF16)
    module.merge_pair(a, lse_a, v[:, 1], lse[:, 1], a, lse_a, mask, False)
    assert torch.equal(bits(a[mask]), bits(expected[mask]))
    assert torch.equal(lse_a[mask], expected_lse[mask])
    assert torch.equal(bits(a[~mask]), bits(v[~mask, 0]))
    assert torch.equal(lse_a[~mask], lse[~mask, 0])


def test_strided_views_and_no_lse(cuda_module: Any) -> None:
    module = cuda_module(merge_spec, (BF16, BF16))
    # Sliced so that rows, heads and states are far apart, once at an odd element offset.
    for start in (8, 3):
        wide = torch.randn(6, 2, 9, 200, device="cuda").to(BF16)
        v, lse = wide[:, :, ::2, start : start + 128], torch.randn(6, 9, 2, device="cuda")
        lse = lse[:, ::2].transpose(1, 2)
        expected, _, magnitude = reference(v, lse)
        out = torch.full((5, 6, 128), math.nan, dtype=BF16, device="cuda").transpose(0, 1)
        module.merge_pair(v[:, 0], lse[:, 0], v[:, 1], lse[:, 1], out, None, None, False)
        assert_rounded(out, expected, magnitude)
        out.fill_(math.nan)
        module.merge_states(v, lse, out, None, False)
        assert_rounded(out, expected, magnitude)


def test_offsets_past_2_to_the_31(cuda_module: Any) -> None:
    module = cuda_module(merge_spec, (BF16, BF16))
    row_stride = 2**30 + 8
    storage = torch.empty(2 * row_stride + 4096, dtype=BF16, device="cuda")
    far = storage.as_strided((3, 2, 4, 128), (row_stride, 512, 128, 1))
    near, lse = states(3, 2, 4, 128, BF16)
    far.copy_(near)
    expected, _ = merge_pair(module, near, lse, BF16)
    out, _ = merge_pair(module, far, lse, BF16)
    assert torch.equal(bits(out), bits(expected))
    module.merge_states(near, lse, far[:, 0], None, False)
    assert torch.equal(bits(far[:, 0]), bits(expected))


def test_same_bits_on_any_stream_in_graphs_and_with_pdl(cuda_module: Any) -> None:
    module = cuda_module(merge_spec, (BF16, BF16))
    v, lse = states(257, 2, 32, 128, BF16)
    expected, expected_lse = merge_pair(module, v, lse, BF16)

    side = torch.cuda.Stream()
    late, late_lse = torch.zeros_like(v), torch.zeros_like(lse)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read the zeros
        late.copy_(v)
        late_lse.copy_(lse)
        out, out_lse = merge_pair(module, late, late_lse, BF16)
    side.synchronize()
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(out_lse, expected_lse)

    # Each merge reads what the one before it wrote, in place.
    a, lse_a = v[:, 0].clone(), lse[:, 0].clone()
    b, lse_b = v[:, 1], lse[:, 1]
    chain, chain_lse = a.clone(), lse_a.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            module.merge_pair(a, lse_a, b, lse_b, a, lse_a, None, True)
    graph.replay()
    for _ in range(20):
        module.merge_pair(chain, chain_lse, b, lse_b, chain, chain_lse, None, False)
    assert torch.equal(bits(a), bits(chain))
    assert torch.equal(lse_a, chain_lse)


def test_errors_name_the_argument(cuda_module: Any) -> None:
    module = cuda_module(merge_spec, (BF16, BF16))
    v, lse = states(4, 2, 5, 128, BF16)
    a, b, lse_a, lse_b = v[:, 0], v[:, 1], lse[:, 0], lse[:, 1]
    out = torch.empty_like(a)
    with pytest.raises(TypeError, match="v_b: dtype must be bfloat16, got float16"):
        module.merge_pair(a, lse_a, b.half(), lse_b, out, None, None, False)
    with pytest.raises(ValueError, match=r"v_b: shape must be \[4, 5, 128\], got \[3, 5, 128\]"):
        module.merge_pair(a, lse_a, b[:3], lse_b, out, None, None, False)
    with pytest.raises(TypeError, match="lse_a: dtype must be float32, got float64"):
        module.merge_pair(a, lse_a.double(), b, lse_b, out, None, None, False)
    with pytest.raises(ValueError, match="lse_b: must be on device cuda:0, got cpu"):
        module.merge_pair(a, lse_a, b, lse_b.cpu(), out, None, None, False)
    with pytest.raises(TypeError, match="mask: dtype must be bool"):
        module.merge_pair(a, lse_a, b, lse_b, out, None, lse_a[:, 0].contiguous(), False)
    with pytest.raises(ValueError, match="v: the last dimension must be contiguous, got stride 2"):
        module.merge_states(v[..., ::2], lse, out[..., ::2], None, False)
