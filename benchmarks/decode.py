"""One decode call on a cold and clean L2, ours and peers in turn."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cuda_timing import cold_calls
from benchmarks.decode_steps import E4M3, Cell, Ours, error, make_step, peers
from benchmarks.report import Row, print_row

BASE = (
    Cell(1, 1024),
    Cell(1, 8192),
    Cell(1, 131072),
    Cell(8, 4096),
    Cell(32, 2048),
    Cell(64, 4096),
    Cell(128, 2048),
    Cell(256, 1024),
    Cell(64, "mixed"),
    Cell(256, "mixed"),
    Cell(64, 4096, 64, 8),
    Cell(64, 2048, 32, 32),
    Cell(64, 4096, 16, 1),
    Cell(64, 4096, head_dim=64),
    Cell(64, 4096, 16, 4, head_dim=256),
    Cell(64, 4096, page_size=64),
)
FP8 = (
    Cell(1, 8192, kv_dtype=E4M3),
    Cell(64, 4096, kv_dtype=E4M3),
    Cell(128, 2048, kv_dtype=E4M3),
)
INVARIANT = (Cell(1, 8192, split=512), Cell(8, 4096, split=512), Cell(64, 4096, split=512))
HEADS = ((40, 8), (28, 4), (24, 2), (12, 12))
ODD = (
    *(
        Cell(batch, context, *heads, page_size=page)
        for batch in (3, 48, 200)
        for context in (777, 3000, 50000)
        for heads in HEADS
        for page in (1, 32)
        if batch * context * heads[1] * 512 < 80e9
    ),
    *(Cell(batch, mix) for batch in (16, 64, 256) for mix in ("lognormal", "one-huge")),
)
# What a call may take besides moving its bytes at this rate.
GOAL_OVERHEAD_US, GOAL_GBS = 10.0, 4500.0


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    for cell in (*BASE, *FP8, *INVARIANT, *ODD):
        if cells not in cell.name:
            continue
        step = make_step(cell)
        ours = Ours(step, enable_pdl=False)
        calls = {"fi_backend": ours.call(step)}
        for name, make in peers(step).items():
            calls[name] = make(step.k, step.v, step.block_table, step.q)
        outs = {name: call() for name, call in calls.items()} | {"fi_backend": ours.out}
        times = cold_calls(calls, seconds=min(seconds, 0.4))
        goal = GOAL_OVERHEAD_US + cell.num_bytes() / GOAL_GBS * 1e-3
        print(f"{cell.name}: goal {goal:.1f} us")
        rows = []
        for name, time in times.items():
            rate = cell.num_bytes() / time * 1e-9
            rows.append(Row(cell.name, name, time * 1e6, "gbs", rate, error(step, outs[name])))
            print_row(rows[-1], times["fi_backend"] * 1e6)
        yield rows
