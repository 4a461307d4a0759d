"""RMS norms of bf16 rows, ours and peers: cold L2, and inside a CUDA graph.

`err` is the largest error of the result against float64. Ours is `rmsnorm` and, with a residual,
`fused_add_rmsnorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import fi_backend
from benchmarks.report import Row
from benchmarks.small_kernels import (
    Call,
    importable,
    inputs_of_a_graph,
    time_cell,
    time_cells,
)

EPS = 1e-6
Backend = Callable[..., Call]


@dataclass(frozen=True)
class Cell:
    """Rows of one norm, and whether a residual is added first."""

    rows: int
    hidden: int
    has_residual: bool

    @property
    def name(self) -> str:
        """The name used in results, as in the peers' tables."""
        return f"{'fused add' if self.has_residual else 'rmsnorm'} {self.rows}x{self.hidden}"

    def num_bytes(self) -> int:
        """Bytes that must move: rows read and written, a residual read and written too."""
        return (4 if self.has_residual else 2) * 2 * self.rows * self.hidden


SHAPES = ((1, 4096), (64, 4096), (512, 8192), (8192, 4096), (65536, 4096), (32768, 8192))
CELLS = tuple(Cell(*shape, has_residual) for has_residual in (False, True) for shape in SHAPES)


class Rows(NamedTuple):
    """What one call normalises, and, without a residual, where the result goes."""

    input: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor | None
    residual: torch.Tensor | None

    def result(self) -> torch.Tensor:
        """Where the result is: with a residual it replaces the input."""
        return self.input if self.out is None else self.out


def make_rows(cell: Cell) -> Rows:
    """Draw rows and a weight."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(cell.rows, cell.hidden, **options)
    weight = torch.randn(cell.hidden, **options)
    if cell.has_residual:
        return Rows(x, weight, None, torch.randn_like(x))
    return Rows(x, weight, torch.empty_like(x), None)


def _ours(x: Rows) -> Call:
    if x.residual is not None:
        return partial(fi_backend.fused_add_rmsnorm, x.input, x.residual, x.weight, EPS)
    return partial(fi_backend.rmsnorm, x.input, x.weight, EPS, x.out)


def _flashinfer(x: Rows) -> Call:
    import flashinfer

    if x.residual is not None:
        return partial(flashinfer.fused_add_rmsnorm, x.input, x.residual, x.weight, EPS)
    return partial(flashinfer.rmsnorm, x.input, x.weight, EPS, out=x.out)


def _vllm(x: Rows) -> Call:
    from vllm import _custom_ops as ops

    if x.residual is not None:
        return partial(ops.fused_add_rms_norm, x.input, x.residual, x.weight, EPS)
    return partial(ops.rms_norm, x.out, x.input, x.weight, EPS)


BACKENDS: dict[str, Backend] = {
    "fi_backend": _ours,
    "flashinfer": _flashinfer,
    "vllm": _vllm,
}


def error(call: Call, x: Rows) -> float:
    """Largest error of one call on the first rows, against float64."""
    few = slice(0, 64)
    total = x.input[few].double() + (0 if x.residual is None else x.residual[few].double())
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    call()
    return float((x.result()[few].double() - total * scale * x.weight.double()).abs().max())


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    inputs = inputs_of_a_graph(partial(make_rows, cell), cell.num_bytes())
    calls = importable(backends, ((x,) for x in inputs))
    errors = {name: error(sequence[0], inputs[0]) for name, sequence in calls.items()}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
