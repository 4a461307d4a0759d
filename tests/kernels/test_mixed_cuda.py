"""The kernel for both lines of a step: against the float64 reference, and the two it replaces."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fi_backend import jit
from fi_backend.kernels import attention_cuda, device_plan, mixed
from fi_backend.kernels.attention_cuda import CudaLineKernels
from tests.kernels.attention_case import (
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of sm_90",
    ),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DECODES = ((1, 100), (1, 1300), (3, 64), (1, 0), (8, 500), (1, 17), (0, 40), (2, 1))
PREFILLS = ((300, 700), (129, 129), (40, 1000), (9, 5))
STEP = Case((*DECODES, *PREFILLS), 4, 1, 128, 128, q_dtype=BF16, num_workers=396)
TYPES = [
    *((BF16, BF16, BF16, (dim, dim)) for dim in (64, 96, 128, 192)),
    (F16, F16, F16, (128, 128)),
    (BF16, BF16, F32, (64, 64)),
]


@pytest.fixture(scope="module")
def load() -> Load:
    """Return a function that loads a case's module."""
    return loader(mixed.mixed_spec, TYPES, "native")


@pytest.fixture(scope="module")
def load_both() -> tuple[Load, Load]:
    """Return such functions for the kernels of one line each."""
    types = [TYPES[0], TYPES[2]]
    return (
        loader(attention_cuda.decode_spec, types, "native"),
        loader(attention_cuda.prefill_spec, types, "native"),
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("num_workers", [1, 2, 6, 21, 132, 396, 1000])
@pytest.mark.parametrize("split", [0, -1, 64])
def test_any_division(load: Load, dtype: torch.dtype, num_workers: int, split: int) -> None:
    """One block has all work, or blocks of either line have none, or work for several workers."""
    check(load, replace(STEP, q_dtype=dtype, num_workers=num_workers, split=split))


@pytest.mark.parametrize(
    "requests",
    [
        DECODES,
        PREFILLS,
        ((1, 1),) * 200 + ((64, 64),),
        ((0, 5), (0, 0)),
        ((1, 0), (100, 0)),
        ((1, 3000), (2000, 2000)),
        ((32, 100), (1, 20_000), (33, 100)),
        ((1, 300),) * 40 + ((70, 8000),),
    ],
    ids=lambda requests: f"{len(requests)} requests, {requests[-1]}",
)
def test_either_line_may_be_empty(load: Load, requests: tuple[tuple[int, int], ...]) -> None:
    check(load, replace(STEP, requests=requests))


@pytest.mark.parametrize("page_size", [1, 16, 24, 256])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("table", ["block_table", "csr", "rows64"])
def test_page_tables(load: Load, page_size: int, layout: str, table: str) -> None:
    check(load, replace(STEP, page_size=page_size, layout=layout, table=table))


def test_ragged(load: Load) -> None:
    check(load, replace(STEP, table="ragged"))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_logits(load: Load, mask: Mask) -> None:
    check(load, replace(STEP, num_kv_heads=2, mask=mask))


def test_custom_mask(load: Load) -> None:
    check(load, replace(STEP, custom_mask=True, mask=Mask()))


@pytest.mark.parametrize("dim", [64, 96, 192])
@pytest.mark.parametrize("heads", [(4, 1), (3, 3), (16, 1), (40, 8)])
def test_head_dims_and_groups(load: Load, dim: int, heads: tuple[int, int]) -> None:
    dims = {"head_dim_qk": dim, "head_dim_vo": dim}
    check(load, replace(STEP, num_qo_heads=heads[0], num_kv_heads=heads[1], **dims))


def test_output_type_differs_from_input(load: Load) -> None:
    check(load, replace(STEP, head_dim_qk=64, head_dim_vo=64, o_dtype=F32))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("split", [0, -1, 64])
def test_same_bits_as_the_kernels_of_each_line(
    load: Load, load_both: tuple[Load, Load], dim: int, split: int
) -> None:
    case = replace(STEP, num_kv_heads=2, head_dim_qk=dim, head_dim_vo=dim, split=split)
    inputs = make_inputs(case)
    out, lse = run(load, case, inputs)
    few, many = (of_line(case) for of_line in load_both)
    arguments = gpu_arguments(few, case, inputs)
    few.run(**arguments)
    arguments["partials"] = gpu_arguments(many, case, inputs)["partials"]
    many.run(**arguments)
    assert torch.equal(bits(arguments["out"].cpu()), bits(out))
    assert torch.equal(arguments["lse"].cpu(), lse)


@pytest.mark.parametrize("split", [0, -1, 64])
def test_same_bits_while_another_stream_disturbs(load: Load, split: int) -> None:
    """Runs of one plan find its counters at zero, whoever was done with few rows first."""
    requests = ((1, 2000),) * 20 + ((5, 900), (500, 3000), (33, 40), (90, 700))
    case = replace(STEP, requests=requests, num_qo_heads=8, num_kv_heads=2, split=split)
    check_same_bits_beside_noise(load, case)


def plan_on_device(case: Case, arguments: dict[str, Any]) -> None:
    device_plan.device_plan(
        plan_buffer=arguments["plan_buffer"],
        qo_indptr=arguments["qo_indptr"],
        kv_lens=arguments["kv_lens"],
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim_qk=case.head_dim_qk,
        head_dim_vo=case.head_dim_vo,
        q_dtype=case.q_dtype,
        kv_dtype=case.q_dtype,
        causal=case.mask.causal,
        window_left=case.mask.window_left,
        num_workers=case.num_workers,
        split=case.split,
        many_rows_only=False,
    )


def test_graph_with_other_mixes(load: Load) -> None:
    """One graph of a plan and two layers, replayed for steps of either kind and of both."""
    capacity = replace(STEP, requests=((200, 1500),) * 6)
    inputs = make_inputs(capacity)
    kernels = load(capacity)
    arguments = gpu_arguments(kernels, capacity, inputs)

    def step() -> None:
        plan_on_device(capacity, arguments)
        kernels.run(**arguments)
        kernels.run(**arguments)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for qo_lens, kv_lens in (
        ((1, 1, 1, 1, 1, 1), (1500, 7, 900, 3, 0, 1)),
        ((200, 1, 1, 1, 150, 8), (1500, 1400, 1300, 2, 150, 700)),
        ((200, 200, 0, 9, 100, 50), (200, 1500, 5, 9, 100, 1500)),
        ((0, 0, 0, 0, 0, 0), (5, 5, 5, 5, 5, 5)),
    ):
        arguments["qo_indptr"][1:] = torch.tensor(qo_lens).cumsum(0).cuda()
        arguments["kv_lens"].copy_(torch.tensor(kv_lens))
        for name in ("out", "lse"):
            arguments[name].fill_(7)
        graph.replay()
        case = replace(capacity, requests=tuple(zip(qo_lens, kv_lens, strict=True)))
        case = replace(case, padding_rows=inputs.q.shape[0] - sum(qo_lens))
        seen = replace(
            inputs,
            keys=[k[:n] for k, n in zip(inputs.keys, kv_lens, strict=True)],
            values=[v[:n] for v, n in zip(inputs.values, kv_lens, strict=True)],
        )
        judge(case, seen, arguments["out"].cpu(), arguments["lse"].cpu())


def test_steps_that_may_have_many_rows_take_it(load: Load, load_both: tuple[Load, Load]) -> None:
    """Decode steps keep the kernels of one line each, of which more blocks fit an SM."""
    types = {"q_dtype": BF16, "kv_dtype": BF16, "o_dtype": BF16}
    types |= {"head_dim_qk": 64, "head_dim_vo": 64}
    lines = attention_cuda.decode_spec(**types), attention_cuda.prefill_spec(**types)
    kernels = CudaLineKernels(lines, (mixed.mixed_spec(**types),))
    launched: list[str] = []
    kernels._runs = [lambda *_: launched.append("few"), lambda *_: launched.append("many")]
    kernels._mixed_runs = {0: [lambda *_: launched.append("mixed")]}
    case = replace(STEP, head_dim_qk=64, head_dim_vo=64, padding_rows=0)
    for requests, max_qo_len, expected in (
        (((1, 9),) * 5, None, ["few"]),
        (((1, 9),) * 40, None, ["few", "many"]),
        (((1, 9),) * 40, 1, ["few"]),
        (((1, 9),) * 5 + ((40, 40),), None, ["mixed"]),
    ):
        launched.clear()
        now = replace(case, requests=requests)
        arguments = gpu_arguments(kernels, now, make_inputs(now))
        kernels.run(**arguments, max_qo_len=max_qo_len)
        assert launched == expected


def test_blocks_are_traced() -> None:
    """Where each block was, and when, as the plan wants it."""
    types = {"q_dtype": BF16, "kv_dtype": BF16, "o_dtype": BF16}
    spec = mixed.mixed_spec(**types, head_dim_qk=128, head_dim_vo=128, trace=True)
    kernels = attention_cuda.load_lines((spec,))
    case = replace(STEP, requests=((1, 3000),) * 32 + ((800, 800),))
    arguments = gpu_arguments(kernels, case, make_inputs(case))
    kernels.run(**arguments)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    traces = torch.zeros(num_sms, 5, dtype=torch.int64)
    jit.load(spec).take_block_traces(traces)
    few_blocks = int(arguments["plan_buffer"][18])
    assert 0 < few_blocks < num_sms
    assert traces[:, 0].unique().numel() == num_sms
    begun = torch.arange(num_sms + 1) * few_blocks // num_sms  # spread evenly over the blocks
    assert ((traces[:, 1] > 0) == (begun.diff() > 0)).all()
    assert (traces[:, 2] >= traces[:, 1]).all()
    assert (traces[:, 3] > 0).all()
    assert (traces[:, 4] >= traces[:, 3]).all()


@pytest.mark.parametrize("num_workers", [1, 7, 396])
def test_nan_stays_visible(load: Load, num_workers: int) -> None:
    case = replace(STEP, requests=((1, 700), (300, 700), (4, 20)), num_workers=num_workers)
    check_nan_stays_visible(case, 18, partial(run, load))
