"""The device planner: GPU time of a plan inside a graph, and what its launch costs the host.

A row's `us` is GPU time, `host_us` the time of the Python call, and `err` counts the int32 elements
that differ from the host planner's. Planning has no peer on the GPU: others plan on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cuda_timing import graphed_calls, host_seconds, sm_clock_mhz
from benchmarks.report import Row, print_row
from fi_backend.kernels.device_plan import device_plan, plan_buffer_ints
from fi_backend.kernels.host_plan import host_plan
from fi_backend.planning import default_workers

CALLS_PER_GRAPH = 20


@dataclass(frozen=True)
class Cell:
    """Lengths of a step's requests."""

    name: str
    qo_lens: torch.Tensor
    kv_lens: torch.Tensor
    window_left: int = -1


def _decode(name: str, kv_lens: torch.Tensor, window_left: int = -1) -> Cell:
    return Cell(name, torch.ones_like(kv_lens), kv_lens, window_left)


def cells() -> list[Cell]:
    """Return every cell of the routine."""
    mixed = torch.randn(8192).add(7.5).exp().clamp(1, 131072).long()
    one_huge = torch.cat((torch.tensor([1_000_000]), torch.full((255,), 10)))
    prefills = torch.tensor([8192, 2000, 77, 512] + [1] * 252)
    return [
        _decode("1 decode", mixed[:1]),
        _decode("32 decodes", mixed[:32]),
        _decode("256 decodes", mixed[:256]),
        _decode("256 decodes, window 1023", mixed[:256], 1023),
        _decode("256 decodes, one huge", one_huge),
        Cell("252 decodes, 4 prefills", prefills, mixed[:256] + prefills),
        Cell("1 prefill of 1M rows", torch.tensor([1 << 20]), torch.tensor([1 << 20])),
        _decode("1024 decodes", mixed[:1024]),
        _decode("8192 decodes", mixed),
    ]


def run_cell(cell: Cell, seconds: float) -> Row:
    """Check and time one cell."""
    num_workers = default_workers(torch.device("cuda", 0))
    lengths: dict[str, Any] = dict(
        qo_indptr=torch.cat((torch.tensor([0]), cell.qo_lens.cumsum(0))).int(),
        kv_lens=cell.kv_lens.int(),
    )
    geometry: dict[str, Any] = dict(
        num_qo_heads=32,
        num_kv_heads=8,
        head_dim_qk=128,
        head_dim_vo=128,
        q_dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        causal=True,
        window_left=cell.window_left,
        num_workers=num_workers,
        split=0,
        many_rows_only=False,
    )
    ints = plan_buffer_ints(max_reqs=cell.kv_lens.numel(), num_workers=num_workers)
    expected = torch.zeros(ints, dtype=torch.int32)
    host_plan(plan_buffer=expected, **lengths, **geometry, target="cuda")

    buffer = torch.zeros(ints, dtype=torch.int32, device="cuda")
    arguments = {name: tensor.cuda() for name, tensor in lengths.items()} | geometry

    def call() -> None:
        device_plan(plan_buffer=buffer, **arguments, enable_pdl=False)

    call()
    err = float((buffer.cpu() != expected).sum())
    gpu = graphed_calls({"plan": [call] * CALLS_PER_GRAPH}, seconds=seconds)["plan"]
    return Row(cell.name, "fi_backend", gpu * 1e6, "host_us", host_seconds(call) * 1e6, err)


def run(pattern: str, seconds: float) -> list[Row]:
    """Run the cells whose name contains `pattern`."""
    torch.manual_seed(0)
    rows = [run_cell(cell, seconds) for cell in cells() if pattern in cell.name]
    print(f"SM clock {sm_clock_mhz()} MHz")
    for row in rows:
        print_row(row, row.us)
    return rows
