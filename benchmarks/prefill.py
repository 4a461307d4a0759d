"""One prefill call on a cold and clean L2, ours and peers in turn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks import prefill_peers
from benchmarks.cuda_timing import cold_calls
from benchmarks.prefill_steps import Cell, Ours, expect, kernel_spec, make_step
from benchmarks.report import Row, print_row
from fi_backend import jit

BASE = (
    Cell(1, 1024, 1024),
    Cell(1, 2048, 2048),
    Cell(1, 4096, 4096),
    Cell(1, 8192, 8192),
    Cell(1, 16384, 16384),
    Cell(1, 32768, 32768),
    Cell(16, 1024, 1024),
    Cell(4, 512, 8192),
    Cell(1, 2048, 32768),
    Cell(8, 64, 4096),
    Cell(1, 8192, 8192, 32, 32),
    Cell(1, 8192, 8192, head_dim=64),
    Cell(1, 8192, 8192, 16, 4, head_dim=256),
    Cell(1, 8192, 8192, page_size=128),
    Cell(1, 8192, 8192, causal=False),
    Cell(1, 8192, 8192, window_left=1023),
)
# The same work with every token in a page of its own, and with pages that divide no tile.
PAGES = tuple(
    Cell(batch, length, length, page_size=page)
    for batch, length in ((1, 4096), (1, 16384), (16, 1024))
    for page in (1, 24)
)
ODD = (
    Cell(1, 512, 512),
    Cell(3, 777, 777, 40, 8),
    Cell(5, 300, 5000, 28, 4),
    Cell(1, 8192, 8192, head_dim=96),
    Cell(1, 8192, 8192, 16, 4, head_dim=192),
)


# Rounds of a cell at least: medians of large cells need no more.
MIN_ROUNDS = 10


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    wanted = [cell for cell in (*BASE, *PAGES, *ODD) if cells in cell.name]
    with ThreadPoolExecutor() as pool:
        compiling = prefill_peers.start_compiling(wanted, pool)
        jit.build([kernel_spec(dim) for dim in sorted({cell.head_dim for cell in wanted})])
        for future in compiling:
            future.result()
    for cell in wanted:
        yield run_cell(cell, seconds)


def run_cell(cell: Cell, seconds: float) -> list[Row]:
    """Time one cell; return the rows of ours and of the peers that serve it."""
    torch.manual_seed(0)
    step = make_step(cell)
    ours = Ours(step)
    calls = {"fi_backend": ours.paged()}
    if cell.qo_len == cell.context:
        calls["fi_backend ragged"] = ours.ragged()
    expected = expect(step)
    errors = {}
    for name, call in calls.items():
        ours.out.fill_(float("nan"))
        call()
        errors[name] = expected.error(ours.out)
    for name, call in prefill_peers.load(step).items():
        calls[name] = call
        out = call()
        assert isinstance(out, torch.Tensor)
        errors[name] = expected.error(out)
    times = cold_calls(calls, seconds=min(seconds, 0.4), min_rounds=MIN_ROUNDS)
    rows = []
    for name, time in times.items():
        rate = cell.num_flops() / time * 1e-12
        rows.append(Row(cell.name, name, time * 1e6, "tflops", rate, errors[name]))
        print_row(rows[-1], times["fi_backend"] * 1e6)
    return rows
