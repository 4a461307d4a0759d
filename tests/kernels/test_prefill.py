"""The many-row kernel, and both kernels in one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.attention_case import Case, check, check_nan_stays_visible, make_inputs, run
from tests.reference import Mask

LENGTHS = ((40, 100), (0, 10), (300, 300), (9, 700), (33, 5), (17, 0))
STEP = Case(LENGTHS)
BOTH_KERNELS = replace(STEP, requests=((1, 200), (50, 60), (1, 3), (2, 90), (130, 400), (1, 0)))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_mixed_lengths(dtype: torch.dtype, num_workers: int) -> None:
    check(replace(STEP, q_dtype=dtype, num_workers=num_workers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [0, -1, 32])
def test_both_kernels_in_one_step(dtype: torch.dtype, split: int) -> None:
    check(replace(BOTH_KERNELS, q_dtype=dtype, split=split, num_workers=3))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (5, 1), (6, 2), (24, 1), (20, 1)])
def test_any_group_size(heads: tuple[int, int]) -> None:
    requests = ((37, 70), (1, 129), (20, 21))
    check(Case(requests, num_qo_heads=heads[0], num_kv_heads=heads[1], q_dtype=torch.bfloat16))


@pytest.mark.parametrize("table", ["block_table", "csr", "rows64", "ragged"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_page_tables(table: str, page_size: int) -> None:
    check(replace(STEP, page_size=page_size, layout="interleaved", table=table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=True, window_left=0),
        Mask(causal=True, window_left=70),
        Mask(window_left=33),
        Mask(causal=True, logits_soft_cap=5.0),
        Mask(causal=True, alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
        Mask(causal=True, sinks=torch.tensor([0.5, -1.0, 4.0, -20.0])),
        Mask(causal=True, window_left=100, logits_soft_cap=8.0, sinks=torch.ones(4)),
        Mask(causal=True, rope_theta=1e4, rope_scale=2.0),
    ],
)
def test_masks_and_logits(dtype: torch.dtype, mask: Mask) -> None:
    check(replace(STEP, q_dtype=dtype, mask=mask))


@pytest.mark.parametrize("window_left", [-1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_mask(window_left: int, dtype: torch.dtype) -> None:
    mask = Mask(window_left=window_left)
    check(replace(STEP, custom_mask=True, mask=mask, q_dtype=dtype))


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0])
def test_scale_of_any_sign(sm_scale: float) -> None:
    check(replace(STEP, sm_scale=sm_scale))


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32])
def test_fp8_cache(q_dtype: torch.dtype) -> None:
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([3.0, 0.1])}
    check(replace(STEP, q_dtype=q_dtype, kv_dtype=torch.float8_e4m3fn, **scales))


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((128, 128), torch.bfloat16), ((72, 40), torch.float32), ((256, 512), torch.bfloat16)],
)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], q_dtype=dtype))


def test_few_row_requests_through_the_many_row_kernel() -> None:
    check(replace(BOTH_KERNELS, many_rows_only=True))


@pytest.mark.parametrize("split", [-1, 64])
def test_bits_do_not_depend_on_batch_mates_or_workers(split: int) -> None:
    case = replace(STEP, requests=((300, 700), (40, 64)), split=split)
    inputs = make_inputs(case)
    whole, _ = run(case, inputs)
    for num_workers in (1, 5):
        again, _ = run(replace(case, num_workers=num_workers), inputs)
        assert torch.equal(whole, again)
    alone, _ = run(replace(case, requests=case.requests[:1]), inputs.subset(case, [0]))
    assert torch.equal(alone[:300], whole[:300])


def test_same_input_gives_same_bits() -> None:
    case = replace(BOTH_KERNELS, num_workers=4)
    inputs = make_inputs(case)
    first, _ = run(case, inputs)
    for _ in range(5):
        assert torch.equal(first, run(case, inputs)[0])


@pytest.mark.parametrize("num_workers", [1, 7])
def test_nan_stays_visible(num_workers: int) -> None:
    case = replace(STEP, requests=((70, 700), (40, 300), (90, 900)), num_workers=num_workers)
    check_nan_stays_visible(case, broken_from=850)
