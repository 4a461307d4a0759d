"""Merging of attention states: exact at the edges, as accurate as torch elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from fi_backend.kernels.merge import merge_pair, merge_states
from tests.tolerance import assert_accurate, max_error

LN2 = math.log(2)


def reference(v: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge over dim 1 in float64; v [n, S, H, D], lse [n, S, H] in base 2."""
    weights = torch.softmax(lse.double() * LN2, 1).nan_to_num(0.0)[..., None]
    merged = (weights * torch.where(weights == 0, 0.0, v.double())).sum(1)
    return merged, torch.logsumexp(lse.double() * LN2, 1) / LN2


def states(dtype: torch.dtype, num_states: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw states; some are empty and hold NaN, and row 0 is empty in all of them."""
    v = torch.randn(90, num_states, 3, head_dim).to(dtype)
    lse = torch.randn(90, num_states, 3) * 10
    empty = torch.rand(lse.shape) < 0.2
    empty[0] = True
    v[empty] = math.nan
    lse[empty] = -math.inf
    return v, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 72, 8])
@pytest.mark.parametrize("num_states", [1, 2, 5])
def test_states(dtype: torch.dtype, head_dim: int, num_states: int) -> None:
    v, lse = states(dtype, num_states, head_dim)
    out, out_lse = torch.empty(90, 3, head_dim, dtype=dtype), torch.empty(90, 3)
    merge_states(v=v, lse=lse, v_out=out, lse_out=out_lse)
    expected, expected_lse = reference(v, lse)
    assert_accurate(out, expected, expected.to(dtype))
    assert max_error(out_lse, expected_lse) < 1e-5
    assert (out[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pair_of_strided_states(dtype: torch.dtype) -> None:
    v, lse = states(dtype, 2, 72)
    out, out_lse = torch.empty(90, 3, 72, dtype=dtype), torch.empty(90, 3)
    merge_pair(
        v_a=v[:, 0], lse_a=lse[:, 0], v_b=v[:, 1], lse_b=lse[:, 1], v_out=out, lse_out=out_lse
    )
    expected, expected_lse = reference(v, lse)
    assert_accurate(out, expected, expected.to(dtype))
    assert max_error(out_lse, expected_lse) < 1e-5


def test_pair_in_place_under_a_mask() -> None:
    v, lse = states(torch.float32, 2, 64)
    expected, expected_lse = reference(v, lse)
    mask = torch.rand(90) < 0.5
    v_a, lse_a = v[:, 0].clone(), lse[:, 0].clone()
    merge_pair(
        v_a=v_a, lse_a=lse_a, v_b=v[:, 1], lse_b=lse[:, 1], v_out=v_a, lse_out=lse_a, mask=mask
    )
    assert_accurate(v_a[mask], expected[mask], expected[mask].float())
    assert max_error(lse_a[mask], expected_lse[mask]) < 1e-5
    assert torch.equal(v_a[~mask].nan_to_num(7.0), v[:, 0][~mask].nan_to_num(7.0))
    assert torch.equal(lse_a[~mask], lse[:, 0][~mask])


def test_no_states_are_an_empty_state() -> None:
    out, lse = torch.ones(4, 2, 8), torch.ones(4, 2)
    merge_states(v=torch.empty(4, 0, 2, 8), lse=torch.empty(4, 0, 2), v_out=out, lse_out=lse)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_wrong_arguments_are_named() -> None:
    v, lse, out = torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3), torch.zeros(4, 3, 8)
    with pytest.raises(ValueError, match=r"lse: shape must be \[4, 2, 3\], got \[4, 3, 2\]"):
        merge_states(v=v, lse=lse.mT.contiguous(), v_out=out)
    with pytest.raises(TypeError, match=r"lse: dtype must be float32, got float64"):
        merge_states(v=v, lse=lse.double(), v_out=out)
    with pytest.raises(ValueError, match=r"v_out: shape must be \[4, 3, 8\]"):
        merge_states(v=v, lse=lse, v_out=out[:, :2])


def test_nan_stays_visible() -> None:
    """A broken state must not look like one that saw no key, whatever it is merged with."""
    v = torch.ones(4, 2, 1, 8)
    lse = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.nan, -math.inf], [math.nan, math.nan]])
    for states, lses in ((v, lse), (v.flip(1), lse.flip(1))):
        out, out_lse = torch.empty(4, 1, 8), torch.empty(4, 1)
        merge_states(v=states, lse=lses[..., None], v_out=out, lse_out=out_lse)
        assert out.isnan().all(-1).flatten().tolist() == [False, True, True, True]
        assert out_lse.isnan().flatten().tolist() == [False, True, True, True]
        pairs = {"v_a": states[:, 0], "lse_a": lses[:, :1], "v_b": states[:, 1]}
        merge_pair(**pairs, lse_b=lses[:, 1:], v_out=out, lse_out=out_lse)
        assert out.isnan().all(-1).flatten().tolist() == [False, True, True, True]
        assert out_lse.isnan().flatten().tolist() == [False, True, True, True]
