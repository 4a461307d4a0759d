"""The few-row kernel: every semantic, on poisoned caches, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fi_backend.kernels import decode
from tests.kernels.attention_case import (
    FP8,
    MASKS,
    Case,
    check,
    check_nan_stays_visible,
    make_arguments,
    make_inputs,
    run,
)
from tests.reference import Mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = ((1, 100), (1, 1), (0, 40), (1, 0), (2, 513), (1, 37), (3, 2), (1, 1000))
STEP = Case(LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_mixed_lengths(dtype: torch.dtype, num_workers: int) -> None:
    check(replace(STEP, q_dtype=dtype, num_workers=num_workers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1), (7, 1), (16, 2), (16, 1)]
)
def test_any_group_size(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    requests = ((1, 300), (1, 129), (1, 5))
    check(Case(requests, num_qo_heads=heads[0], num_kv_heads=heads[1], q_dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("table", ["block_table", "csr", "rows32", "rows64"])
def test_page_tables(page_size: int, layout: str, table: str) -> None:
    check(replace(STEP, page_size=page_size, layout=layout, table=table))


def test_ragged() -> None:
    check(replace(STEP, table="ragged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mask",
    [
        *MASKS,
        Mask(causal=True, rope_theta=1e4),
        Mask(causal=True, rope_theta=5e5, rope_scale=4.0, window_left=60),
    ],
)
def test_masks_and_logits(dtype: torch.dtype, mask: Mask) -> None:
    check(replace(STEP, q_dtype=dtype, mask=mask))


@pytest.mark.parametrize("window_left", [-1, 100])
def test_custom_mask(window_left: int) -> None:
    check(replace(STEP, custom_mask=True, mask=Mask(window_left=window_left)))


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0, 2.0])
def test_scale_of_any_sign(sm_scale: float) -> None:
    check(replace(STEP, sm_scale=sm_scale))


def test_one_huge_negative_logit_still_wins() -> None:
    case = Case(((1, 1),), sm_scale=1e4)
    inputs = make_inputs(case)
    inputs.keys[0].copy_(-inputs.q[:1, ::2].sign())
    out, lse = run(case, inputs)
    torch.testing.assert_close(out[0], inputs.values[0][0].repeat_interleave(2, 0))
    assert lse[0, 0] < -2e5


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_head", [False, True])
def test_fp8_cache(kv_dtype: torch.dtype, q_dtype: torch.dtype, per_head: bool) -> None:
    k_scale = torch.tensor([0.5, 2.0]) if per_head else 0.25
    v_scale = torch.tensor([3.0, 0.1]) if per_head else 1.5
    check(replace(STEP, q_dtype=q_dtype, kv_dtype=kv_dtype, k_scale=k_scale, v_scale=v_scale))


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((128, 128), torch.bfloat16),
        ((72, 40), torch.bfloat16),
        ((192, 128), torch.float32),
        ((72, 40), torch.float32),
        ((256, 512), torch.bfloat16),
    ],
)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], q_dtype=dtype))


def test_output_type_differs_from_input() -> None:
    check(replace(STEP, q_dtype=torch.bfloat16, o_dtype=torch.float32))


@pytest.mark.parametrize("split", [-1, 64, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_batch_mates_or_workers(split: int, dtype: torch.dtype) -> None:
    case = replace(STEP, requests=((1, 700), (1, 64), (2, 300)), q_dtype=dtype, split=split)
    inputs = make_inputs(case)
    whole, whole_lse = run(case, inputs)
    for num_workers in (1, 3, 8):
        again, _ = run(replace(case, num_workers=num_workers), inputs)
        assert torch.equal(whole[:4], again[:4])
    alone = replace(case, requests=case.requests[:1], num_workers=5)
    out, lse = run(alone, inputs.subset(case, [0]))
    assert torch.equal(out[0], whole[0])
    assert torch.equal(lse[0], whole_lse[0])


def test_same_input_gives_same_bits() -> None:
    case = replace(STEP, num_workers=5)
    inputs = make_inputs(case)
    first, _ = run(case, inputs)
    for _ in range(5):
        assert torch.equal(first, run(case, inputs)[0])


@pytest.mark.parametrize("num_workers", [1, 7])
def test_nan_stays_visible(num_workers: int) -> None:
    case = replace(STEP, requests=((1, 700), (2, 300), (4, 20)), num_workers=num_workers)
    check_nan_stays_visible(case, broken_from=18)


def test_nobody_is_told_to_copy_a_cache() -> None:
    """What is appended to it later would not reach the copy."""
    arguments = make_arguments(STEP, make_inputs(STEP))
    cache = arguments["k_cache"]
    arguments["k_cache"] = cache.new_zeros(*cache.shape[:-1], 2 * cache.shape[-1])[..., ::2]
    message = r"k_cache: the last dimension must be contiguous, .*; allocate the cache so"
    with pytest.raises(ValueError, match=message):
        decode.load(**STEP.types).run(**arguments, partials=torch.empty(0))
