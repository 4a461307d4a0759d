"""Append new K and V rows to a paged cache, ours and peers: cold L2, and inside a CUDA graph.

Rows go to random slots of a cache far larger than the L2, as in an engine; `err` is the largest
difference between a stored value and what the cache's dtype holds for it. Ours is `append_to_cache`
(by slots); "fi_backend paged" is `append_paged_kv_cache` (by positions), FlashInfer's call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

import fi_backend
from benchmarks.report import Row
from benchmarks.small_kernels import CALLS_PER_GRAPH, Call, importable, time_cell, time_cells

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
NUM_PAGES = 10240  # 671 MB in bf16
Backend = Callable[..., Call]


@dataclass(frozen=True)
class Cell:
    """New tokens of one step, and the cache that they go to."""

    tokens: int
    cache_dtype: torch.dtype = BF16

    @property
    def name(self) -> str:
        """The name used in results, as in the peers' tables."""
        cache = "" if self.cache_dtype == BF16 else " fp8"
        return f"{self.tokens} tok {HEADS}x{HEAD_DIM}{cache}"

    def num_bytes(self) -> int:
        """Bytes that must move: K and V, read once and written once."""
        return 2 * self.tokens * HEADS * HEAD_DIM * (BF16.itemsize + self.cache_dtype.itemsize)


CELLS = (Cell(1), Cell(64), Cell(8192), Cell(64, E4M3), Cell(8192, E4M3))


@dataclass(frozen=True)
class Step:
    """New rows, their slots, and the same places as pages of one request for each token."""

    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    batch_indices: torch.Tensor
    positions: torch.Tensor
    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor
    last_page_len: torch.Tensor


def make_step(cell: Cell) -> Step:
    """Draw rows and distinct slots."""
    key, value = torch.randn(2, cell.tokens, HEADS, HEAD_DIM, dtype=BF16, device="cuda").unbind()
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, device="cuda")[: cell.tokens]
    requests = torch.arange(cell.tokens + 1, dtype=torch.int32, device="cuda")
    offsets = (slots % PAGE_SIZE).int()
    pages = (slots // PAGE_SIZE).int()
    return Step(key, value, slots, requests[:-1], offsets, pages, requests, offsets + 1)


def _paged(append: Callable[..., object], step: Step, k: torch.Tensor, v: torch.Tensor) -> Call:
    places = (step.batch_indices, step.positions)
    table = (step.kv_indices, step.kv_indptr, step.last_page_len)
    return partial(append, step.key, step.value, *places, (k, v), *table)


def _vllm(step: Step, k: torch.Tensor, v: torch.Tensor) -> Call:
    from vllm import _custom_ops as ops

    dtype = "auto" if k.dtype == BF16 else "fp8_e4m3"
    caches = [cache if k.dtype == BF16 else cache.view(torch.uint8) for cache in (k, v)]
    scale = torch.ones(1, device="cuda")
    arguments = (step.key, step.value, *caches, step.slots, dtype, scale, scale)
    return partial(ops.reshape_and_cache_flash, *arguments)


def _flashinfer(step: Step, k: torch.Tensor, v: torch.Tensor) -> Call:
    if k.dtype != BF16:
        raise ImportError("FlashInfer's append leaves conversion to its caller")
    import flashinfer

    return _paged(flashinfer.append_paged_kv_cache, step, k, v)


def _ours(step: Step, k: torch.Tensor, v: torch.Tensor) -> Call:
    return partial(fi_backend.append_to_cache, step.key, step.value, (k, v), step.slots)


BACKENDS: dict[str, Backend] = {
    "fi_backend": _ours,
    "fi_backend paged": partial(_paged, fi_backend.append_paged_kv_cache),
    "vllm": _vllm,
    "flashinfer": _flashinfer,
}


def error(step: Step, call: Call, k: torch.Tensor, v: torch.Tensor) -> float:
    """Append to caches of zeros; return the largest difference from what should be stored."""
    worst = 0.0
    for cache in (k, v):
        cache.view(torch.uint8).zero_()
    call()
    for cache, rows in ((k, step.key), (v, step.value)):
        stored = cache.view(torch.uint8).flatten(0, 1)[step.slots].view(cache.dtype).float()
        worst = max(worst, float((stored - rows.to(cache.dtype).float()).abs().max()))
    return worst


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    shape = (NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM)
    k, v = (torch.empty(shape, dtype=cell.cache_dtype, device="cuda") for _ in "kv")
    steps = [make_step(cell) for _ in range(CALLS_PER_GRAPH)]
    calls = importable(backends, ((step, k, v) for step in steps))
    errors = {name: error(steps[0], sequence[0], k, v) for name, sequence in calls.items()}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
