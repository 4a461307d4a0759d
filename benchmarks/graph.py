"""A decode call inside a CUDA graph over rotating caches, as engines replay it; plan excluded."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cuda_timing import graphed_calls
from benchmarks.decode_steps import Cell, Ours, error, make_step, peers
from benchmarks.report import Row, print_row

CELLS = (Cell(1, 1024), Cell(1, 8192), Cell(4, 1024), Cell(8, 1024), Cell(32, 1024))
# Every call has caches of its own, several times the L2 in all.
MIN_CALLS, MIN_BYTES = 20, 320_000_000


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    for cell in CELLS:
        if cells not in cell.name:
            continue
        count = max(MIN_CALLS, -(-MIN_BYTES // cell.num_bytes()))
        steps = [make_step(cell) for _ in range(count)]
        plain, dependent = (Ours(steps[0], enable_pdl=pdl) for pdl in (False, True))
        sequences = {
            "fi_backend": [dependent.call(step) for step in steps],
            "fi_backend without PDL": [plain.call(step) for step in steps],
        }
        for name, make in peers(steps[0]).items():
            sequences[name] = [make(s.k, s.v, s.block_table, s.q) for s in steps]
        outs = {name: sequence[0]() for name, sequence in sequences.items()}
        dependent_out, plain_out = dependent.out.clone(), plain.out.clone()
        outs |= {"fi_backend": dependent_out, "fi_backend without PDL": plain_out}
        times = graphed_calls(sequences, seconds=min(seconds, 0.4))
        rows = []
        for name, time in times.items():
            rate = cell.num_bytes() / time * 1e-9
            rows.append(Row(cell.name, name, time * 1e6, "gbs", rate, error(steps[0], outs[name])))
            print_row(rows[-1], times["fi_backend"] * 1e6)
        yield rows
