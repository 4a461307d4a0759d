"""Attention variants of docs/attention-variants.md, and the built-in attention, on a cold L2.

The mask in blocks is timed with several densities: the share of blocks that a row sees.

Errors are relative to the largest output: those of sigmoid attention are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import decode_steps, prefill_steps
from benchmarks.cuda_timing import cold_calls
from benchmarks.report import Row, print_row
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Workspace, plan
from tests.variant_examples import BUILT_IN, EXAMPLES, Example, Values, expected, random_blocks

DECODE = decode_steps.Cell(64, 4096)
PREFILL = prefill_steps.Cell(1, 8192, 8192)
NUM_CHECKED_ROWS = 16
OURS = "fi_backend"
DENSITIES = (1.0, 0.5, 0.25, 0.1)
KINDS = {
    "": BUILT_IN,
    "distance_bias": EXAMPLES["distance_bias"],
    "sigmoid": EXAMPLES["sigmoid"],
    **{
        f"block_sparse {density}": replace(
            EXAMPLES["block_sparse"], make_values=partial(random_blocks, density=density)
        )
        for density in DENSITIES
    },
}

Step = decode_steps.Step | prefill_steps.Step


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    if cells in DECODE.name:
        gigabytes = DECODE.num_bytes() * 1e-9
        yield _time(decode_steps.make_step(DECODE), ("gbs", gigabytes), seconds)
    if cells in PREFILL.name:
        teraflops = PREFILL.num_flops() * 1e-12
        yield _time(prefill_steps.make_step(PREFILL), ("tflops", teraflops), seconds)


def _time(step: Step, work: tuple[str, float], seconds: float) -> list[Row]:
    """Time every variant on a step; `work` is a unit, and how much of it there is to do."""
    unit, amount = work
    calls: dict[str, Callable[[], object]] = {}
    errors = {}
    for kind, example in KINDS.items():
        name = f"{OURS} {kind}".rstrip()
        out, calls[name], values = _make_call(step, example)
        calls[name]()
        errors[name] = _error(step, out, example, values)
    times = cold_calls(calls, seconds=min(seconds, 0.5))
    rows = [
        Row(step.cell.name, name, s * 1e6, unit, amount / s, errors[name])
        for name, s in times.items()
    ]
    for row in rows:
        print_row(row, times[OURS] * 1e6)
    return rows


def _make_call(step: Step, example: Example) -> tuple[torch.Tensor, Callable[[], object], Values]:
    """Plan a step: its output, the call that fills it, and the values of the variant."""
    cell = step.cell
    spec = AttentionSpec(
        num_qo_heads=cell.num_qo_heads,
        num_kv_heads=cell.num_kv_heads,
        head_dim_qk=cell.head_dim,
        q_dtype=step.q.dtype,
        page_size=cell.page_size,
        variant=example.variant,
    )
    batch = PagedBatch(step.qo_indptr, step.kv_lens, block_table=step.block_table)
    out = torch.empty_like(step.q)
    with torch.device("cuda"):
        values = example.make_values(cell.num_qo_heads, cell.batch, int(step.kv_lens.max()))
        planned = plan(spec, batch, Workspace("cuda"))
    call = partial(
        PagedAttention(spec, "cuda").run,
        planned,
        step.q,
        (step.k, step.v),
        out=out,
        variant_values=values or None,
    )
    return out, call, values


def _error(step: Step, out: torch.Tensor, example: Example, values: Values) -> float:
    """Error against float64 over the last rows of the first request, relative to the largest."""
    kv_len = int(step.kv_lens[0])
    rows = slice(max(0, int(step.qo_indptr[1]) - NUM_CHECKED_ROWS), int(step.qo_indptr[1]))
    pages = step.block_table[0, : -(-kv_len // step.cell.page_size)].long()
    k, v = (cache[pages].flatten(0, 1)[:kv_len] for cache in (step.k, step.v))
    with torch.device("cuda"):
        wanted = expected([(step.q[rows], k, v)], example, values)[0]
    return float((out[rows].double() - wanted).abs().max() / wanted.abs().max())
