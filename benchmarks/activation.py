"""Gated activations of bf16 rows, ours and peers: cold L2, and inside a CUDA graph.

`err` is the largest error of the result against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

import fi_backend
from benchmarks.report import Row
from benchmarks.small_kernels import (
    Call,
    importable,
    inputs_of_a_graph,
    time_cell,
    time_cells,
)

Backend = Callable[[str, torch.Tensor, torch.Tensor], Call]
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_and_mul": F.silu,
    "gelu_and_mul": F.gelu,
    "gelu_tanh_and_mul": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Cell:
    """Rows of one activation; hidden is the size of the result."""

    rows: int
    hidden: int
    gate: str = "silu_and_mul"

    @property
    def name(self) -> str:
        """The name used in results."""
        return f"{self.gate} {self.rows}x{self.hidden}"

    def num_bytes(self) -> int:
        """Bytes that must move: gate and factor read, the result written."""
        return 3 * 2 * self.rows * self.hidden


CELLS = (
    *(Cell(rows, 14336) for rows in (1, 64, 8192)),
    *(Cell(8192, 14336, gate) for gate in ("gelu_and_mul", "gelu_tanh_and_mul")),
)


def make_rows(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw gates and factors, and make room for the result."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    return (
        torch.randn(cell.rows, 2 * cell.hidden, **options),
        torch.empty(cell.rows, cell.hidden, **options),
    )


def _ours(gate: str, x: torch.Tensor, out: torch.Tensor) -> Call:
    return partial(getattr(fi_backend, gate), x, out)


def _flashinfer(gate: str, x: torch.Tensor, out: torch.Tensor) -> Call:
    import flashinfer

    return partial(getattr(flashinfer, gate), x, out)


def _vllm(gate: str, x: torch.Tensor, out: torch.Tensor) -> Call:
    import vllm._custom_ops  # noqa: F401  registers the ops

    return partial(getattr(torch.ops._C, gate), out, x)


BACKENDS: dict[str, Backend] = {
    "fi_backend": _ours,
    "flashinfer": _flashinfer,
    "vllm": _vllm,
}


def error(gate: str, call: Call, x: torch.Tensor, out: torch.Tensor) -> float:
    """Largest error of one call on the first rows, against float64."""
    call()
    a, b = x[:64].double().chunk(2, -1)
    return float((out[:64].double() - GATES[gate](a) * b).abs().max())


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    inputs = inputs_of_a_graph(partial(make_rows, cell), cell.num_bytes())
    calls = importable(backends, ((cell.gate, *x) for x in inputs))
    errors = {name: error(cell.gate, seq[0], *inputs[0]) for name, seq in calls.items()}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
