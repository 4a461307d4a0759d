"""The few-row CUDA kernel: every semantic, on poisoned caches, against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

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
LENGTHS = ((1, 100), (1, 1), (0, 40), (1, 0), (2, 513), (1, 37), (3, 2), (1, 1000))
STEP = Case(LENGTHS, q_dtype=BF16, num_workers=5)
DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
# Every module that the tests use, so that they compile in parallel. The portable path is the same
# code but for fp8 conversion: its tests need fewer.
TYPES = {
    "native": [
        *((BF16, BF16, BF16, dims) for dims in DIMS),
        (F16, F16, F16, (64, 64)),
        (BF16, BF16, F32, (64, 64)),
        *((q, kv, q, (64, 64)) for q in (BF16, F16) for kv in FP8),
        *((BF16, FP8[0], BF16, dims) for dims in DIMS[1:] if dims != (192, 128)),
    ],
    "compute_80": [
        *((BF16, BF16, BF16, dims) for dims in DIMS),
        *((q, kv, q, (64, 64)) for q in (BF16, F16) for kv in (q, *FP8) if (q, kv) != (BF16, BF16)),
        (BF16, BF16, F32, (64, 64)),
        *((BF16, FP8[0], BF16, dims) for dims in DIMS[1:] if dims != (192, 128)),
    ],
}


@pytest.fixture(scope="module", params=["native", "compute_80"])
def load(request: pytest.FixtureRequest) -> Load:
    """Return a function that loads a case's module."""
    return loader(attention_cuda.decode_spec, TYPES[request.param], request.param)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("num_workers", [1, 2, 7, 132, 600])
def test_mixed_lengths(load: Load, dtype: torch.dtype, num_workers: int) -> None:
    check(load, replace(STEP, q_dtype=dtype, num_workers=num_workers))


@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (6, 2), (5, 1), (7, 1), (8, 1), (9, 1), (16, 1), (17, 1), (32, 1)]
)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_any_group_size(load: Load, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    case = Case(((1, 300), (1, 129), (1, 5)), *heads, *dims, q_dtype=BF16, num_workers=9)
    check(load, case)


@pytest.mark.parametrize("qo_len", [2, 5, 8])
@pytest.mark.parametrize("window_left", [-1, 40])
def test_several_tokens_a_request(load: Load, qo_len: int, window_left: int) -> None:
    """Speculative verify and short chunks: rows of one item see different keys."""
    requests = ((qo_len, 500), (1, 200), (qo_len, qo_len), (qo_len, 3), (4, 131))
    mask = Mask(causal=True, window_left=window_left)
    check(load, Case(requests, q_dtype=BF16, mask=mask, num_workers=6))
    check(load, Case(requests, q_dtype=BF16, mask=replace(mask, causal=False), num_workers=6))


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
@pytest.mark.parametrize("table", ["block_table", "csr", "rows32", "rows64"])
def test_page_tables(load: Load, page_size: int, layout: str, table: str) -> None:
    check(load, replace(STEP, page_size=page_size, layout=layout, table=table))


def test_ragged(load: Load) -> None:
    check(load, replace(STEP, table="ragged"))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_logits(load: Load, mask: Mask) -> None:
    check(load, replace(STEP, mask=mask))


@pytest.mark.parametrize("window_left", [-1, 100])
def test_custom_mask(load: Load, window_left: int) -> None:
    check(load, replace(STEP, custom_mask=True, mask=Mask(window_left=window_left)))


@pytest.mark.parametrize("qo_len", [1, 3, 6, 8])
def test_rows_that_do_not_exist_read_no_mask(load: Load, qo_len: int) -> None:
    """Rows fill blocks of 8, of which 1, 2 or 4 are computed; what is over finds other data."""
    requests = ((qo_len, 300),) * 8
    case = replace(STEP, requests=requests, custom_mask=True, num_qo_heads=8, num_kv_heads=2)
    for num_workers in (1, 264):
        check(load, replace(case, num_workers=num_workers))


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0, 2.0])
def test_scale_of_any_sign(load: Load, sm_scale: float) -> None:
    check(load, replace(STEP, sm_scale=sm_scale))


def test_one_huge_negative_logit_still_wins(load: Load) -> None:
    case = Case(((1, 1),), q_dtype=BF16, sm_scale=1e4)
    inputs = make_inputs(case)
    inputs.keys[0].copy_(-inputs.q[:1, ::2].sign())
    out, lse = run(load, case, inputs)
    torch.testing.assert_close(out[0], inputs.values[0][0].repeat_interleave(2, 0))
    assert lse[0, 0] < -2e5


def test_logits_that_rise_and_fall(load: Load) -> None:
    """The running maximum lags behind by design: neither weights nor sums may overflow."""
    case = Case(((1, 3000),), q_dtype=F16, sm_scale=0.25)
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


@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**20, 2.0**100])
def test_fp8_cache_with_queries_outside_of_fp16(load: Load, magnitude: float) -> None:
    case = replace(STEP, kv_dtype=FP8[0], sm_scale=0.125 / magnitude)
    inputs = make_inputs(case)
    inputs.q.mul_(magnitude)
    judge(case, inputs, *run(load, case, inputs))


@pytest.mark.parametrize("kv_dtype", [None, FP8[0]], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(load: Load, dims: tuple[int, int], kv_dtype: torch.dtype | None) -> None:
    if kv_dtype is not None and dims == (192, 128):
        pytest.skip("no model has an fp8 cache with these head dims")
    check(load, replace(STEP, head_dim_qk=dims[0], head_dim_vo=dims[1], kv_dtype=kv_dtype))
    wide = ((4, 300), (3, 77), (1, 2000))
    check(
        load,
        Case(wide, 8, 2, *dims, q_dtype=BF16, kv_dtype=kv_dtype, num_workers=11),
    )


def test_output_type_differs_from_input(load: Load) -> None:
    check(load, replace(STEP, o_dtype=F32))


@pytest.mark.parametrize("kv_dtype", [None, FP8[0]], ids=str)
def test_bits_do_not_depend_on_the_kernel(load: Load, kv_dtype: torch.dtype | None) -> None:
    """One kernel takes 8 rows at a time, another all; padding rows of q sway the choice."""
    case = Case(((3, 700), (1, 64), (8, 300)), 4, 2, q_dtype=BF16, kv_dtype=kv_dtype, num_workers=7)
    inputs = make_inputs(case)
    out, lse = run(load, case, inputs)
    judge(case, inputs, out, lse)
    wide = ((3, 700), (1, 64), (8, 300), *[(0, 9)] * 9)
    padded = replace(case, requests=wide, split=-1)
    case = replace(case, split=-1)
    out, lse = run(load, case, inputs)
    nothing = [torch.zeros(9, 2, 64, dtype=kv_dtype or BF16)] * 9
    more = replace(inputs, keys=[*inputs.keys, *nothing], values=[*inputs.values, *nothing])
    again, again_lse = run(load, padded, more)
    assert torch.equal(bits(out), bits(again))
    assert torch.equal(lse, again_lse)


def test_many_short_requests(load: Load) -> None:
    """A warp's copies run several items ahead, past items it has no tile of."""
    lens = tuple((1, int(n)) for n in torch.randint(0, 40, (300,)))
    check(load, Case(lens, q_dtype=BF16, num_workers=3))


def test_items_cut_into_many_pieces(load: Load) -> None:
    """Last arrivers merge 50 partials and more."""
    check(load, Case(((1, 5000), (1, 64), (1, 3333)), 4, 1, q_dtype=BF16, num_workers=132))


def test_strided_q_out_and_no_lse(load: Load) -> None:
    case = STEP
    inputs = make_inputs(case)
    expected, _ = run(load, case, inputs)
    kernels = load(case)
    arguments = gpu_arguments(kernels, case, inputs)
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
    inputs = make_inputs(case)
    kernels = load(case)
    near = gpu_arguments(kernels, case, inputs)
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


@pytest.mark.parametrize("split", [-1, 64, 1])
def test_bits_do_not_depend_on_batch_mates_or_workers(load: Load, split: int) -> None:
    case = replace(STEP, requests=((1, 700), (1, 64), (2, 300)), split=split)
    inputs = make_inputs(case)
    whole, whole_lse = run(load, case, inputs)
    judge(case, inputs, whole, whole_lse)
    for num_workers in (1, 3, 8, 132, 528):
        again, again_lse = run(load, replace(case, num_workers=num_workers), inputs)
        assert torch.equal(bits(whole), bits(again))
        assert torch.equal(whole_lse, again_lse)
    for r, rows in enumerate(((0, 1), (1, 2), (2, 4))):
        alone = replace(case, requests=case.requests[r : r + 1], num_workers=5 + r)
        out, lse = run(load, alone, inputs.subset(case, [r]))
        assert torch.equal(bits(out[: rows[1] - rows[0]]), bits(whole[slice(*rows)]))
        assert torch.equal(lse[: rows[1] - rows[0]], whole_lse[slice(*rows)])


@pytest.mark.parametrize("split", [0, 64])
def test_same_bits_while_another_stream_disturbs(load: Load, split: int) -> None:
    requests = ((1, 5000), *((1, int(n)) for n in torch.randint(1, 900, (40,))))
    case = Case(requests, 8, 2, 128, 128, q_dtype=BF16, num_workers=132, split=split)
    check_same_bits_beside_noise(load, case)


def test_graph_with_other_lengths_and_dependent_launch(load: Load) -> None:
    """One graph of a chain of layers, replayed with other plans, lengths and page tables."""
    case = Case(((1, 900), (1, 40), (2, 300)), q_dtype=BF16, num_workers=33)
    steps = [case, replace(case, requests=((1, 3), (2, 1500), (1, 0)))]
    kernels = load(case)
    arguments = [gpu_arguments(kernels, step, make_inputs(step)) for step in steps]
    names = ("plan_buffer", "qo_indptr", "kv_lens", "q")
    pages = max(a["k_cache"].shape[0] for a in arguments)
    columns = max(a["block_table"].shape[1] for a in arguments)
    static = dict(arguments[0])
    static.update({name: arguments[0][name].clone() for name in names})
    for name in ("k_cache", "v_cache"):
        shape = (pages, *arguments[0][name].shape[1:])
        static[name] = torch.full(shape, math.nan, dtype=BF16, device="cuda")
    static["block_table"] = torch.zeros(5, columns, dtype=torch.int32, device="cuda")
    outs = [torch.zeros_like(static["out"]) for _ in range(10)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            kernels.run(**{**static, "out": out}, enable_pdl=True)
    for step in arguments:
        for name in names:
            static[name].copy_(step[name])
        for name in ("k_cache", "v_cache"):
            static[name][: step[name].shape[0]] = step[name]
        static["block_table"][:, : step["block_table"].shape[1]] = step["block_table"]
        for out in outs:
            out.fill_(7)
        kernels.run(**step)
        graph.replay()
        for out in outs:
            assert torch.equal(bits(out), bits(step["out"]))


def test_errors_name_the_argument(load: Load) -> None:
    case = STEP
    kernels = load(case)
    good = gpu_arguments(kernels, case, make_inputs(case))
    rows, heads, dim = good["q"].shape
    shifted = torch.zeros(rows * heads * dim + 1, dtype=BF16, device="cuda")[1:]
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"q": shifted.view(rows, heads, dim)},
            ValueError,
            "q: rows must begin at multiples",
        ),
        ({"q": good["q"].half()}, TypeError, "q: dtype must be bfloat16, got float16"),
        ({"kv_lens": good["kv_lens"].cpu()}, ValueError, "kv_lens: must be on device cuda:0"),
        ({"partials": good["partials"][:-4]}, ValueError, "partials: must have at least"),
        ({"num_workers": 6}, ValueError, "plan_buffer: must have at least"),
        ({"rope_theta": 1e4}, ValueError, "rope_theta: must be 0 in the decode kernel"),
        ({"block_table": None}, ValueError, "exactly one of page_indptr and block_table"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            kernels.run(**{**good, **change})


@pytest.mark.parametrize("num_workers", [1, 7, 132, 396])
def test_nan_stays_visible(load: Load, num_workers: int) -> None:
    case = replace(STEP, requests=((1, 700), (2, 300), (4, 20)), num_workers=num_workers)
    check_nan_stays_visible(case, 18, partial(run, load))
