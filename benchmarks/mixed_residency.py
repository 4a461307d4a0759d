"""When the thread blocks of a mixed step are at which line, by the traced kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.mixed_steps import DIMS, DTYPES, Ours, Step
from fi_backend import jit
from fi_backend.kernels import mixed

FEW_ROWS, MANY_ROWS = 1, 3  # columns of where a block begins at a line; it ends in the next one


@dataclass(frozen=True)
class Residency:
    """Seconds of one call, from the first thread block on.

    Attributes:
        together: thread blocks were at both lines.
        few_rows, many_rows: the last block left a line.
        few_row_sms: multiprocessors that began with few rows.
    """

    together: float
    few_rows: float
    many_rows: float
    few_row_sms: int

    @property
    def share(self) -> float:
        """The part of the call in which both lines were at work."""
        return self.together / max(self.few_rows, self.many_rows)


def measure(step: Step, before: Callable[[], object]) -> Residency:
    """Run a step with the traced kernel, after `before` has emptied the L2 cache."""
    spec = mixed.mixed_spec(**DTYPES, **DIMS, trace=True)
    ours = Ours(step, (spec,))
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    traces = torch.zeros(num_sms, 5, dtype=torch.int64)
    take = jit.load(spec).get_function("take_block_traces")
    for _ in range(3):  # the last one counts
        before()
        ours.call()
        torch.cuda.synchronize()
        take(traces)
    return _residency(traces)


def _residency(traces: torch.Tensor) -> Residency:
    seconds = 1e-9
    start = int(traces[:, [FEW_ROWS, MANY_ROWS]][traces[:, [FEW_ROWS, MANY_ROWS]] > 0].min())
    spans = []
    for column in (FEW_ROWS, MANY_ROWS):
        at = traces[traces[:, column] > 0][:, column : column + 2] - start
        spans.append((int(at[:, 0].min()), int(at[:, 1].max())) if len(at) else (0, 0))
    # Blocks leave a line but do not come back, and it has some from its first to its last moment.
    together = max(0, min(end for _, end in spans) - max(begin for begin, _ in spans))
    return Residency(
        together=together * seconds,
        few_rows=spans[0][1] * seconds,
        many_rows=spans[1][1] * seconds,
        few_row_sms=int((traces[:, FEW_ROWS] > 0).sum()),
    )
