"""Merge attention states of decode steps, ours and peers: cold L2, and inside a CUDA graph.

In a graph the states of small cells are in the L2, as in an engine whose attention just wrote them.
Ours is `merge_states`; "fi_backend pair" is `merge_state`, for two states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

import fi_backend
from benchmarks.report import Row
from benchmarks.small_kernels import CALLS_PER_GRAPH, Call, importable, time_cell, time_cells

HEADS, HEAD_DIM = 32, 128
Backend = Callable[[torch.Tensor, torch.Tensor], Call]


@dataclass(frozen=True)
class Cell:
    """States to merge for each row of a decode step."""

    rows: int
    states: int

    @property
    def name(self) -> str:
        """The name used in results."""
        return f"{self.states} states of {self.rows} rows {HEADS}x{HEAD_DIM}"

    def num_bytes(self) -> int:
        """Bytes that must move: bf16 values and fp32 sums, read once, and the result."""
        return (self.states + 1) * self.rows * HEADS * (2 * HEAD_DIM + 4)


CELLS = tuple(Cell(rows, states) for states in (2, 8) for rows in (1, 64, 256))


def make_states(cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw v [rows, states, heads, head_dim] and s [rows, states, heads]."""
    shape = (cell.rows, cell.states, HEADS, HEAD_DIM)
    v = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    return v, torch.randn(shape[:-1], device="cuda") * 4


def _pair(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if v.shape[1] != 2:
        raise ImportError("merges two states only")
    return tuple(part[:, i].contiguous() for i in (0, 1) for part in (v, s))


def _flashinfer(v: torch.Tensor, s: torch.Tensor) -> Call:
    import flashinfer

    return partial(flashinfer.merge_states, v, s)


def _flashinfer_pair(v: torch.Tensor, s: torch.Tensor) -> Call:
    import flashinfer

    return partial(flashinfer.merge_state, *_pair(v, s))


def _vllm_pair(v: torch.Tensor, s: torch.Tensor) -> Call:
    """vLLM's sums are natural logarithms, heads first."""
    from vllm import _custom_ops as ops

    v_a, s_a, v_b, s_b = _pair(v, s)
    lse_a, lse_b = ((lse * math.log(2)).T.contiguous() for lse in (s_a, s_b))
    out = torch.empty_like(v_a)

    def call() -> tuple[torch.Tensor]:
        ops.merge_attn_states(out, v_a, lse_a, v_b, lse_b)
        return (out,)

    return call


BACKENDS: dict[str, Backend] = {
    "fi_backend": lambda v, s: partial(fi_backend.merge_states, v, s),
    "fi_backend pair": lambda v, s: partial(fi_backend.merge_state, *_pair(v, s)),
    "flashinfer": _flashinfer,
    "flashinfer pair": _flashinfer_pair,
    "vllm pair": _vllm_pair,
}


def error(call: Call, v: torch.Tensor, s: torch.Tensor) -> float:
    """Largest error of the merged values against float64."""
    weights = torch.softmax(s.double() * math.log(2), 1)
    expected = (weights[..., None] * v.double()).sum(1)
    out = call()
    assert isinstance(out, tuple)
    return float((out[0].double() - expected).abs().max())


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    inputs = [make_states(cell) for _ in range(CALLS_PER_GRAPH)]
    calls = importable(backends, inputs)
    errors = {name: error(sequence[0], *inputs[0]) for name, sequence in calls.items()}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
