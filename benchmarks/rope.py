"""Rotate q and k in place by a cos-sin cache, ours and peers: cold L2, and inside a CUDA graph.

`err` is the largest error of a query against float64. Ours is
`apply_rope_with_cos_sin_cache_inplace`, FlashInfer's call; vLLM's cache is in the dtype of q.
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

QO_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_POSITION = 8192
Backend = Callable[..., Call]


@dataclass(frozen=True)
class Cell:
    """Tokens of one step, and how their pairs lie."""

    tokens: int
    is_neox: bool = True

    @property
    def name(self) -> str:
        """The name used in results, as in the peers' tables."""
        form = "" if self.is_neox else " interleaved"
        return f"rope {self.tokens} tok {QO_HEADS}/{KV_HEADS}x{HEAD_DIM}{form}"

    def num_bytes(self) -> int:
        """Bytes that must move: q and k, read once and written once."""
        return 2 * 2 * self.tokens * (QO_HEADS + KV_HEADS) * HEAD_DIM


CELLS = (Cell(1), Cell(64), Cell(4096), Cell(65536), Cell(65536, is_neox=False))


class Rows(NamedTuple):
    """q and k [tokens, heads * head_dim] of one call, rotated in place."""

    query: torch.Tensor
    key: torch.Tensor
    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    is_neox: bool


def make_cache(max_position: int = MAX_POSITION, head_dim: int = HEAD_DIM) -> torch.Tensor:
    """Return float32 [max_position, head_dim], cosines then sines, on torch's default device."""
    frequency = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(max_position)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def make_rows(cell: Cell, cos_sin_cache: torch.Tensor) -> Rows:
    """Draw q and k; tokens are those of prompts of MAX_POSITION."""
    query, key = (
        torch.randn(cell.tokens, heads * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads in (QO_HEADS, KV_HEADS)
    )
    positions = torch.arange(cell.tokens, device="cuda") % MAX_POSITION
    return Rows(query, key, positions, cos_sin_cache, cell.is_neox)


def _like_flashinfer(rope: Callable[..., object], x: Rows) -> Call:
    return partial(rope, x.positions, x.query, x.key, HEAD_DIM, x.cos_sin_cache, x.is_neox)


def _flashinfer(x: Rows) -> Call:
    import flashinfer

    return _like_flashinfer(flashinfer.apply_rope_with_cos_sin_cache_inplace, x)


def _vllm(x: Rows) -> Call:
    from vllm import _custom_ops as ops

    cache = x.cos_sin_cache.bfloat16()
    return partial(ops.rotary_embedding, x.positions, x.query, x.key, HEAD_DIM, cache, x.is_neox)


BACKENDS: dict[str, Backend] = {
    "fi_backend": partial(_like_flashinfer, fi_backend.apply_rope_with_cos_sin_cache_inplace),
    "flashinfer": _flashinfer,
    "vllm": _vllm,
}


def rotated(
    x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Rotate x [tokens, heads, HEAD_DIM], in float64."""
    cosine, sine = cos_sin_cache[positions].double()[:, None].chunk(2, -1)
    pairs = x.double().unflatten(-1, (2, -1) if is_neox else (-1, 2))
    first, second = pairs.unbind(-2 if is_neox else -1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return torch.stack(turned, -2 if is_neox else -1).flatten(-2)


def error(call: Call, x: Rows) -> float:
    """Largest error of one call on the first queries."""
    few = slice(0, 64)
    heads = x.query[few].unflatten(1, (QO_HEADS, HEAD_DIM))
    expected = rotated(heads, x.positions[few], x.cos_sin_cache, x.is_neox).flatten(1)
    call()
    return float((x.query[few].double() - expected).abs().max())


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    inputs = inputs_of_a_graph(partial(make_rows, cell, make_cache().cuda()), cell.num_bytes())
    calls = importable(backends, ((x,) for x in inputs))
    errors = {name: error(sequence[0], inputs[0]) for name, sequence in calls.items()}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
