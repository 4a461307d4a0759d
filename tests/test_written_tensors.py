"""No operation writes a tensor several of whose elements are one place, as torch refuses to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fi_backend as fi

X, WEIGHT = torch.randn(3, 64), torch.ones(64)
HEADS = torch.randn(3, 2, 64)
LSE = torch.zeros(3, 2)
PLACES = torch.arange(3)


def expanded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a tensor all of whose rows are the first."""
    return torch.zeros(1, *shape[1:], dtype=dtype).expand(shape)


def attend(**written: torch.Tensor) -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    spec = fi.AttentionSpec(num_qo_heads=2, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.float32)
    step = fi.plan(spec, fi.PagedBatch.ragged(offsets, offsets), fi.Workspace())
    fi.PagedAttention(spec).run(step, HEADS, (HEADS.unsqueeze(1),) * 2, **written)


CALLS: list[tuple[str, Callable[[], object]]] = [
    ("out", lambda: fi.rmsnorm(X, WEIGHT, out=expanded(3, 64))),
    ("residual", lambda: fi.fused_add_rmsnorm(X.clone(), expanded(3, 64), WEIGHT)),
    ("out", lambda: fi.layernorm_quant(expanded(3, 64, dtype=torch.int8), X, WEIGHT, WEIGHT, 1.0)),
    ("out", lambda: fi.silu_and_mul(X, out=expanded(3, 32))),
    ("v_out", lambda: fi.merge_state_in_place(expanded(3, 2, 64), LSE.clone(), HEADS, LSE)),
    ("lse_out", lambda: fi.merge_state_in_place(HEADS.clone(), expanded(3, 2), HEADS, LSE)),
    ("k_out", lambda: fi.apply_rope_pos_ids_inplace(HEADS.clone(), expanded(3, 2, 64), PLACES)),
    (
        "value_cache",
        lambda: fi.append_to_cache(
            HEADS, HEADS, (torch.zeros(4, 16, 2, 64), expanded(4, 16, 2, 64)), PLACES
        ),
    ),
    ("out", lambda: attend(out=expanded(3, 2, 64))),
    ("lse", lambda: attend(lse=expanded(3, 2))),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_stride_0_is_refused(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=rf"{name}: is written, so .* got strides \[0, .*expand"):
        call()


def test_one_row_may_have_any_stride() -> None:
    out = torch.zeros(64).expand(1, 64)
    assert torch.equal(fi.rmsnorm(X[:1], WEIGHT, out=out), fi.rmsnorm(X[:1], WEIGHT))
