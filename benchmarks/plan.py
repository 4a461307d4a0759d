"""The device planner: GPU time of a plan inside a graph, and what its launch costs the host.

A row's `us` is GPU time, `host_us` the time of the Python call, and `err` counts the int32 elements
that differ from the host planner's. "fi_backend" is the function of the kernel, "fi_backend plan()"
what engines call once a step. Planning has no peer on the GPU: others plan on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cuda_timing import graphed_calls, host_seconds, sm_clock_mhz
from benchmarks.report import Row, print_row
from fi_backend import AttentionSpec, PagedBatch, Workspace, plan
from fi_backend.kernels.device_plan import device_plan, plan_buffer_ints
from fi_backend.kernels.host_plan import host_plan
from fi_backend.planning import default_workers

CALLS_PER_GRAPH = 20
SPEC = AttentionSpec(
    num_qo_heads=32, num_kv_heads=8, head_dim_qk=128, q_dtype=torch.bfloat16, page_size=16
)
Call = Callable[[], object]


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


def lengths_of(cell: Cell) -> dict[str, torch.Tensor]:
    """qo_indptr and kv_lens, on the host."""
    starts = torch.cat((torch.tensor([0]), cell.qo_lens.cumsum(0)))
    return {"qo_indptr": starts.int(), "kv_lens": cell.kv_lens.int()}


def host_planned(cell: Cell, num_workers: int) -> torch.Tensor:
    """Plan a cell on the host, for the GPU."""
    ints = plan_buffer_ints(max_reqs=cell.kv_lens.numel(), num_workers=num_workers)
    buffer = torch.zeros(ints, dtype=torch.int32)
    target = "sm_90" if torch.cuda.get_device_capability()[0] == 9 else "cuda"
    host_plan(plan_buffer=buffer, **arguments(cell, num_workers), **lengths_of(cell), target=target)
    return buffer


def arguments(cell: Cell, num_workers: int) -> dict[str, Any]:
    """What both planners are given besides the lengths and the buffer."""
    return {
        "num_qo_heads": SPEC.num_qo_heads,
        "num_kv_heads": SPEC.num_kv_heads,
        "head_dim_qk": SPEC.head_dim_qk,
        "head_dim_vo": SPEC.head_dim_vo,
        "q_dtype": SPEC.q_dtype,
        "kv_dtype": SPEC.kv_dtype,
        "causal": SPEC.causal,
        "window_left": cell.window_left,
        "num_workers": num_workers,
        "split": 0,
        "many_rows_only": False,
    }


def kernel_call(cell: Cell) -> tuple[Call, torch.Tensor]:
    """Return a call of the planner's kernel function, and the buffer that it fills."""
    num_workers = default_workers(torch.device("cuda", 0))
    ints = plan_buffer_ints(max_reqs=cell.kv_lens.numel(), num_workers=num_workers)
    buffer = torch.zeros(ints, dtype=torch.int32, device="cuda")
    lengths = {name: tensor.cuda() for name, tensor in lengths_of(cell).items()}
    options = {**arguments(cell, num_workers), **lengths, "enable_pdl": False}
    return partial(device_plan, plan_buffer=buffer, **options), buffer


def public_call(cell: Cell) -> tuple[Call, torch.Tensor]:
    """Return a call of plan() as an engine makes it every step, and the buffer that it fills."""
    lengths = {name: tensor.cuda() for name, tensor in lengths_of(cell).items()}
    batch = PagedBatch(
        **lengths,
        page_indptr=torch.zeros_like(lengths["qo_indptr"]),
        page_indices=torch.zeros(1, dtype=torch.int32, device="cuda"),
    )
    spec, workspace = replace(SPEC, window_left=cell.window_left), Workspace("cuda")
    first = plan(spec, batch, workspace)
    return partial(plan, spec, batch, workspace, into=first), first.buffer


def run_cell(cell: Cell, backend: str, seconds: float) -> Row:
    """Check and time one cell; print and return its row."""
    call, buffer = CALLS[backend](cell)
    buffer.zero_()
    call()
    expected = host_planned(cell, default_workers(buffer.device))
    err = float((buffer.cpu() != expected).sum())
    gpu = graphed_calls({"plan": [call] * CALLS_PER_GRAPH}, seconds=seconds)["plan"]
    row = Row(cell.name, backend, gpu * 1e6, "host_us", host_seconds(call) * 1e6, err)
    print_row(row, row.us)
    return row


CALLS: dict[str, Callable[[Cell], tuple[Call, torch.Tensor]]] = {
    "fi_backend": kernel_call,
    "fi_backend plan()": public_call,
}


def run(pattern: str, seconds: float) -> Iterator[list[Row]]:
    """Run the cells whose name contains `pattern`: the kernel for all, then plan(); yield rows."""
    torch.manual_seed(0)
    chosen = [cell for cell in cells() if pattern in cell.name]
    for backend in CALLS:
        for cell in chosen:
            yield [run_cell(cell, backend, seconds)]
    print(f"SM clock {sm_clock_mhz()} MHz")
