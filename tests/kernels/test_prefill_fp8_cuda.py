"""The many-row CUDA kernel on fp8 caches, whose tiles are widened on their way to the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fi_backend.kernels import attention_cuda
from tests.kernels.attention_case import FP8, MASKS, Case, Inputs, make_inputs
from tests.kernels.attention_cuda_case import Load, bits, check, loader, run
from tests.reference import Mask

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
E4M3, E5M2 = FP8
DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
TYPES = [
    *((BF16, E4M3, BF16, dims) for dims in DIMS),
    *((F16, kv, F16, dims) for kv in (E4M3, E5M2, F16) for dims in ((64, 64), (128, 128))),
    (BF16, E5M2, BF16, (128, 128)),
]
# Rows of one warpgroup and of a block, tiles of keys, and one more or less of each.
EDGES = ((1, 1), (64, 64), (65, 129), (128, 127), (129, 1), (257, 384), (3, 1000), (17, 0))
STEP = Case(EDGES, 2, 2, 128, 128, q_dtype=BF16, kv_dtype=E4M3, num_workers=7, many_rows_only=True)


@pytest.fixture(scope="module")
def load() -> Load:
    """Return a function that loads a case's module."""
    return loader(attention_cuda.prefill_spec, TYPES, "native")


@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 32, 48, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_tiles_and_pages(load: Load, page_size: int, layout: str, causal: bool) -> None:
    check(load, replace(STEP, page_size=page_size, layout=layout, mask=Mask(causal=causal)))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("table", ["block_table", "csr", "rows64", "ragged"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_head_dims(load: Load, dims: tuple[int, int], table: str, page_size: int) -> None:
    """The copy engine brings pages of 16 tokens and ragged rows, cp.async those of 1."""
    if table == "ragged" and page_size > 1:
        pytest.skip("has no pages")
    case = replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], table=table)
    check(load, replace(case, page_size=page_size, num_qo_heads=6))


@pytest.mark.parametrize("window_left", [0, 15, 63, 64, 127, 200])
@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_windows_that_begin_anywhere_in_a_tile(
    load: Load, window_left: int, page_size: int
) -> None:
    mask = Mask(causal=True, window_left=window_left)
    requests = ((300, 700), (70, 1300))
    check(load, replace(STEP, requests=requests, page_size=page_size, mask=mask))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_logits(load: Load, mask: Mask) -> None:
    check(load, replace(STEP, num_qo_heads=4, mask=mask))


@pytest.mark.parametrize("page_size", [1, 16])
def test_custom_mask(load: Load, page_size: int) -> None:
    case = replace(STEP, custom_mask=True, mask=Mask(window_left=100), page_size=page_size)
    check(load, case)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("split", [0, -1])
def test_long_context(load: Load, page_size: int, split: int) -> None:
    """Items are cut among workers, or dealt whole to blocks that take several."""
    requests = ((64, 4096), (5, 9000), (200, 2000))
    case = replace(STEP, requests=requests, num_qo_heads=8, num_workers=132, split=split)
    check(load, replace(case, page_size=page_size))


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("q_dtype", [BF16, F16], ids=str)
def test_types_and_scales_of_heads(load: Load, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = replace(STEP, q_dtype=q_dtype, kv_dtype=kv_dtype)
    scales = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.1])
    check(load, replace(case, k_scale=scales[0], v_scale=scales[1]))


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page_size", [1, 16])
def test_same_bits_as_of_a_wide_cache(
    load: Load, kv_dtype: torch.dtype, dim: int, page_size: int
) -> None:
    """Every finite fp8 value is one of fp16, and the products are the same."""
    case = replace(STEP, q_dtype=F16, kv_dtype=kv_dtype, head_dim_qk=dim, head_dim_vo=dim)
    case = replace(case, page_size=page_size, num_workers=132, split=-1)
    inputs = make_inputs(case)
    every = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
    every = torch.where(every.float().isfinite() & (every.float().abs() < 8), every.float(), 0)
    inputs.keys[6][:256, 0, 0] = every.to(kv_dtype)
    inputs.values[6][:256, 1, 3] = every.to(kv_dtype)
    keys, values = ([x.half() for x in side] for side in (inputs.keys, inputs.values))
    wide = Inputs(inputs.q, keys, values, None)
    narrow_out, narrow_lse = run(load, case, inputs)
    wide_out, wide_lse = run(load, replace(case, kv_dtype=F16), wide)
    assert torch.equal(bits(narrow_out), bits(wide_out))
    assert torch.equal(bits(narrow_lse), bits(wide_lse))
