"""The many-row CUDA kernel: every semantic, on poisoned caches, against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from fi_backend.kernels import attention_cuda
from tests.kernels.attention_case import (
    FP8,
    MASKS,
    Case,
    check_nan_stays_visible,
    judge,
    make_inputs,
)
from tests.kernels.attention_cuda_case import (
    Load,
    bits,
    check,
    check_same_bits_beside_noise,
    gpu_arguments,
    loader,
    run,
)
from tests.reference import Mask

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Lengths around and past tiles of tokens, rows that see nothing, and one row a request.
LENGTHS = ((40, 100), (0, 10), (300, 300), (9, 700), (33, 5), (17, 0), (1, 130))
STEP = Case(LENGTHS, q_dtype=BF16, num_workers=5, many_rows_only=True)
DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
# Every module that the tests use, so that they compile in parallel. The portable path is the same
# code but for fp8 conversion: its tests need fewer.
TYPES = [
    *((BF16, BF16, BF16, dims) for dims in DIMS),
    (F16, F16, F16, (128, 128)),
    (BF16, BF16, F32, (64, 64)),
    *((q, kv, q, (64, 64)) for q in (BF16, F16) for kv in (q, *FP8) if (q, kv) != (BF16, BF16)),
    *((BF16, FP8[0], BF16, dims) for dims in DIMS[1:] if dims != (192, 128)),
]


@pytest.fixture(scope="module", params=["native", "compute_80"])
def load(request: pytest.FixtureRequest) -> Load:
    """Return a function that loads a case's module."""
    return loader(attention_cuda.prefill_spec, TYPES, request.param)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("num_workers", [1, 2, 7, 132, 400])
@pytest.mark.parametrize("dim", [64, 128])
def test_mixed_lengths(load: Load, dtype: torch.dtype, num_workers: int, dim: int) -> None:
    """One block has all the work, or some have none, or blocks work for several workers."""
    dims = {"head_dim_qk": dim, "head_dim_vo": dim}
    check(load, replace(STEP, q_dtype=dtype, num_workers=num_workers, **dims))


# Rows of one warpgroup and of a block, tiles of keys, and one more or less of each.
EDGES = ((1, 1), (64, 64), (65, 129), (128, 127), (129, 1), (257, 384), (3, 1000), (513, 513))


@pytest.mark.parametrize("page_size", [1, 8, 16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_tiles_and_pages(load: Load, page_size: int, layout: str, causal: bool) -> None:
    case = Case(EDGES, 2, 2, 128, 128, q_dtype=BF16, num_workers=7, many_rows_only=True)
    check(load, replace(case, page_size=page_size, layout=layout, mask=Mask(causal=causal)))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("num_workers", [2, 132])
def test_edges_of_small_heads(load: Load, page_size: int, num_workers: int) -> None:
    """Three warpgroups have tiles of 192 rows, of items dealt whole and cut."""
    edges = (*EDGES, (191, 191), (192, 1000), (193, 320), (449, 449))
    case = Case(edges, 2, 2, 64, 64, q_dtype=BF16, num_workers=num_workers, many_rows_only=True)
    check(load, replace(case, page_size=page_size, mask=Mask(causal=True)))
    check(load, replace(case, page_size=page_size, requests=((200, 9000), (64, 5000)), split=0))


@pytest.mark.parametrize("window_left", [0, 1, 15, 31, 62, 63, 64, 65, 127, 128, 200, 511])
@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_windows_that_begin_anywhere_in_a_tile(
    load: Load, window_left: int, page_size: int
) -> None:
    """Tiles begin at pages, before the window and before what a worker has of an item."""
    case = Case(((300, 700), (70, 1300)), 2, 1, 128, 128, q_dtype=BF16, num_workers=9)
    mask = Mask(causal=True, window_left=window_left)
    check(load, replace(case, page_size=page_size, mask=mask))


@pytest.mark.parametrize("page_size", [1, 16])
def test_long_context_is_cut_among_workers(load: Load, page_size: int) -> None:
    requests = ((64, 4096), (5, 9000), (200, 2000))
    check(
        load,
        Case(
            requests,
            8,
            2,
            128,
            128,
            q_dtype=BF16,
            num_workers=150,
            page_size=page_size,
            many_rows_only=True,
        ),
    )


@pytest.mark.parametrize("num_workers", [3, 400])
def test_whole_items_of_every_section_of_heads(load: Load, num_workers: int) -> None:
    """K and V of two of the four heads fit the L2 cache together."""
    requests = ((130, 20_000), (40, 300), (0, 9), (300, 50))
    case = Case(requests, 8, 4, 128, 128, q_dtype=BF16, num_workers=num_workers)
    check(load, replace(case, split=-1, many_rows_only=True))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (5, 1), (6, 2), (24, 1), (20, 1)])
def test_any_group_size(load: Load, heads: tuple[int, int]) -> None:
    check(load, Case(((37, 70), (1, 129), (20, 21)), *heads, q_dtype=BF16, many_rows_only=True))


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("table", ["block_table", "csr", "rows32", "rows64"])
def test_page_tables(load: Load, page_size: int, layout: str, table: str) -> None:
    check(load, replace(STEP, page_size=page_size, layout=layout, table=table))


@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("page_size", [8, 16, 48, 64, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
def test_pages_of_wide_heads(
    load: Load, dims: tuple[int, int], page_size: int, layout: str
) -> None:
    """Their boxes have all columns of a token's row."""
    case = replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1])
    check(load, replace(case, page_size=page_size, layout=layout))


@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
def test_ragged_wide_heads(load: Load, dims: tuple[int, int]) -> None:
    check(load, replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], table="ragged"))


def test_ragged(load: Load) -> None:
    check(load, replace(STEP, table="ragged"))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_logits(load: Load, mask: Mask) -> None:
    check(load, replace(STEP, mask=mask))


@pytest.mark.parametrize("window_left", [-1, 100])
def test_custom_mask(load: Load, window_left: int) -> None:
    check(load, replace(STEP, custom_mask=True, mask=Mask(window_left=window_left)))


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0, 2.0])
def test_scale_of_any_sign(load: Load, sm_scale: float) -> None:
    check(load, replace(STEP, sm_scale=sm_scale))


def test_logits_that_rise_and_fall(load: Load) -> None:
    """The running maximum lags behind by design: neither weights nor sums may overflow."""
    case = Case(((40, 3000),), q_dtype=F16, sm_scale=0.25, mask=Mask())
    inputs = make_inputs(case)
    ramp = torch.cat([torch.linspace(0, 6, 1500), torch.linspace(6, 0, 1500)])[:, None, None]
    inputs.keys[0].copy_(inputs.q[:1, ::2].sign() * ramp)
    judge(case, inputs, *run(load, case, inputs))


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("q_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_fp8_cache(load: Load, kv_dtype: torch.dtype, q_dtype: torch.dtype, per_head: bool) -> None:
    k_scale = torch.tensor([0.5, 2.0]) if per_head else 0.25
    v_scale = torch.tensor([3.0, 0.1]) if per_head else 1.5
    check(load, replace(STEP, q_dtype=q_dtype, kv_dtype=kv_dtype, k_scale=k_scale, v_scale=v_scale))


@pytest.mark.parametrize("kv_dtype", [None, FP8[0]], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(load: Load, dims: tuple[int, int], kv_dtype: torch.dtype | None) -> None:
    if kv_dtype is not None and dims == (192, 128):
        pytest.skip("no model has an fp8 cache with these head dims")
    check(load, replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], kv_dtype=kv_dtype))
    check(load, Case(((200, 900), (70, 70)), 8, 2, *dims, q_dtype=BF16, kv_dtype=kv_dtype))


def test_output_type_differs_from_input(load: Load) -> None:
    check(load, replace(STEP, o_dtype=F32))


def test_64k_context_cut_into_many_parts(load: Load) -> None:
    """Last arrivers merge parts of dozens of workers."""
    check(load, Case(((64, 65536), (20, 50)), 4, 1, q_dtype=BF16, num_workers=132))


def test_strided_q_out_and_no_lse(load: Load) -> None:
    inputs = make_inputs(STEP)
    expected, _ = run(load, STEP, inputs)
    kernels = load(STEP)
    arguments = gpu_arguments(kernels, STEP, inputs)
    rows, heads, dim = arguments["q"].shape
    wide_q = torch.full((rows, heads + 3, dim + 8), math.nan, dtype=BF16, device="cuda")
    wide_q[:, :heads, :dim] = arguments["q"]
    wide_out = torch.full((rows, heads + 1, dim + 4), 9.0, dtype=BF16, device="cuda")
    wide_out[:, :heads, :dim] = 7
    arguments.update(q=wide_q[:, :heads, :dim], out=wide_out[:, :heads, :dim], lse=None)
    kernels.run(**arguments)
    assert torch.equal(bits(wide_out[:, :heads, :dim].cpu()), bits(expected))
    assert (wide_out[:, heads:] == 9).all()
    assert (wide_out[..., dim:] == 9).all()


def test_caches_past_2_to_the_31_elements(load: Load) -> None:
    case = replace(STEP, num_workers=20)
    kernels = load(case)
    near = gpu_arguments(kernels, case, make_inputs(case))
    kernels.run(**near)
    far = dict(near, out=torch.full_like(near["out"], 7.0))
    pages, page_size, heads, dim = near["k_cache"].shape
    first = 2**31 // (page_size * heads * dim) + 5
    for name in ("k_cache", "v_cache"):
        far[name] = torch.empty(first + pages, page_size, heads, dim, dtype=BF16, device="cuda")
        far[name][first:] = near[name]
    far["block_table"] = near["block_table"] + first
    kernels.run(**far)
    assert torch.equal(bits(far["out"]), bits(near["out"]))


@pytest.mark.parametrize("split", [-1, 64])
def test_bits_do_not_depend_on_batch_mates_or_workers(load: Load, split: int) -> None:
    case = replace(STEP, requests=((300, 700), (40, 64)), split=split)
    inputs = make_inputs(case)
    whole, whole_lse = run(load, case, inputs)
    for num_workers in (1, 3, 132):
        again, again_lse = run(load, replace(case, num_workers=num_workers), inputs)
        assert torch.equal(bits(whole), bits(again))
        assert torch.equal(whole_lse, again_lse)
    alone, _ = run(load, replace(case, requests=case.requests[:1]), inputs.subset(case, [0]))
    assert torch.equal(bits(alone[:300]), bits(whole[:300]))


@pytest.mark.parametrize("split", [0, -1])
def test_same_bits_while_another_stream_disturbs(load: Load, split: int) -> None:
    """Runs of one plan, its items cut or dealt whole, find its counters at zero."""
    case = Case(((500, 3000), (33, 40), (90, 700)), 8, 2, 128, 128, q_dtype=BF16, num_workers=132)
    case = replace(case, split=split)
    check_same_bits_beside_noise(load, case)


@pytest.mark.parametrize("num_workers", [1, 7, 396])
def test_nan_stays_visible(load: Load, num_workers: int) -> None:
    case = replace(STEP, requests=((70, 700), (40, 300), (90, 900)), num_workers=num_workers)
    check_nan_stays_visible(case, 850, partial(run, load))
