"""One call of a mixed step on a cold and clean L2, ours in one launch and in two, and peers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import mixed_peers, mixed_residency
from benchmarks.cuda_timing import L2Flush, cold_calls
from benchmarks.mixed_steps import Cell, error, make_step, one_launch, two_launches
from benchmarks.report import Row, print_row

CELLS = (
    Cell("64x1@4096 + 1x2048@2048", ((1, 4096),) * 64 + ((2048, 2048),)),
    Cell("128x1@2048 + 2x2048@2048", ((1, 2048),) * 128 + ((2048, 2048),) * 2),
    Cell("256x1@1024 + 1x512@8192", ((1, 1024),) * 256 + ((512, 8192),)),
    Cell("64x5@4096", ((5, 4096),) * 64),
)
# Shares of decode and prefill that the cells above do not have.
MORE = (
    Cell("256x1@4096 + 1x256@256", ((1, 4096),) * 256 + ((256, 256),)),
    Cell("16x1@2048 + 2x4096@4096", ((1, 2048),) * 16 + ((4096, 4096),) * 2),
    Cell("8x1@16384 + 8x300@3000", ((1, 16384),) * 8 + ((300, 3000),) * 8),
    Cell("200x1@700 + 1x1777@9000", ((1, 700),) * 200 + ((1777, 9000),)),
)


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    for cell in (*CELLS, *MORE):
        if cells not in cell.name:
            continue
        step = make_step(cell)
        ours = one_launch(step)
        calls = {"fi_backend": ours.call}
        if 0 < cell.num_decodes < len(cell.requests):
            calls["fi_backend two"] = two_launches(step)
        calls |= mixed_peers.load(step)
        errors = {}
        for name, call in calls.items():
            ours.out.fill_(float("nan"))
            result = call()
            out = result if isinstance(result, torch.Tensor) else ours.out
            if isinstance(result, tuple):
                out = torch.cat(result)
            errors[name] = error(step, out)
        times = cold_calls(calls, seconds=min(seconds, 0.4))
        rows = []
        for name, time in times.items():
            rate = cell.num_flops() / time * 1e-12
            rows.append(Row(cell.name, name, time * 1e6, "tflops", rate, errors[name]))
            print_row(rows[-1], times["fi_backend"] * 1e6)
        at = mixed_residency.measure(step, L2Flush())
        print(
            f"  {at.few_row_sms} SMs began with few rows, which ended after "
            f"{at.few_rows * 1e6:.1f} us, many rows after {at.many_rows * 1e6:.1f} us; "
            f"together {at.share:.1%} of the time",
            flush=True,
        )
        yield rows
