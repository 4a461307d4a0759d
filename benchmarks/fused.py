"""From qkv to the paged cache, ours and peers: cold L2, and inside a CUDA graph.

q is rotated in place; rows of a fused qkv projection go to random slots of a cache far larger than
the L2. `err` is the largest difference of a stored K from float64. Ours is `rope_append_to_cache`,
one kernel; "fi_backend paged" is `rope_append_paged_kv_cache`, and "fi_backend parts" are our
separate kernels. Peers go through those they have: norm (where the cell has one), rope, append.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import fi_backend
from benchmarks.report import Row
from benchmarks.rope import HEAD_DIM, KV_HEADS, MAX_POSITION, QO_HEADS, make_cache, rotated
from benchmarks.small_kernels import CALLS_PER_GRAPH, Call, importable, time_cell, time_cells

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
PAGE_SIZE, NUM_PAGES = 16, 10240  # 671 MB in bf16
EPS = 1e-6
Backend = Callable[..., Call]


@dataclass(frozen=True)
class Cell:
    """Tokens of one step, the cache they go to, and whether q and k are normalised."""

    tokens: int
    cache_dtype: torch.dtype = BF16
    has_norm: bool = False

    @property
    def name(self) -> str:
        """The name used in results."""
        options = "".join((" fp8" * (self.cache_dtype == E4M3), " qk-norm" * self.has_norm))
        return f"fused {self.tokens} tok {QO_HEADS}/{KV_HEADS}x{HEAD_DIM}{options}"

    def num_bytes(self) -> int:
        """Bytes that must move: q, k and v, read once and written once."""
        q_bytes = 2 * QO_HEADS * BF16.itemsize
        kv_bytes = 2 * KV_HEADS * (BF16.itemsize + self.cache_dtype.itemsize)
        return self.tokens * HEAD_DIM * (q_bytes + kv_bytes)


CELLS = (
    *(Cell(tokens) for tokens in (1, 64, 1024, 8192)),
    *(Cell(tokens, has_norm=True) for tokens in (1, 64, 8192)),
    *(Cell(tokens, E4M3) for tokens in (64, 8192)),
)


class Step(NamedTuple):
    """What one call reads and where it writes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    weight: torch.Tensor | None


def make_step(cell: Cell, cos_sin_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Step:
    """Draw a projection, positions and distinct slots."""
    heads = (QO_HEADS, KV_HEADS, KV_HEADS)
    qkv = torch.randn(cell.tokens, sum(heads), HEAD_DIM, dtype=BF16, device="cuda")
    positions = torch.arange(cell.tokens, device="cuda") % MAX_POSITION
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, device="cuda")[: cell.tokens]
    weight = torch.randn(HEAD_DIM, dtype=BF16, device="cuda") if cell.has_norm else None
    return Step(*qkv.split(heads, 1), positions, cos_sin_cache, slots, k, v, weight)


def _ours(x: Step) -> Call:
    rows = (x.q, x.k, x.v, x.positions, x.cos_sin_cache, (x.k_cache, x.v_cache), x.slots)
    options = {"q_weight": x.weight, "k_weight": x.weight, "eps": EPS, "out": x.q}
    return partial(fi_backend.rope_append_to_cache, *rows, **options)


def _ours_paged(x: Step) -> Call:
    requests = torch.arange(len(x.slots) + 1, dtype=torch.int32, device="cuda")
    places = (requests[:-1], (x.slots % PAGE_SIZE).int())
    table = ((x.slots // PAGE_SIZE).int(), requests)
    rows = (x.q, x.k, x.v, x.positions, x.cos_sin_cache)
    options = {"q_weight": x.weight, "k_weight": x.weight, "eps": EPS, "out": x.q}
    cache = (x.k_cache, x.v_cache)
    return partial(fi_backend.rope_append_paged_kv_cache, *rows, *places, cache, *table, **options)


def _in_turn(*calls: Call | None) -> Call:
    steps = [call for call in calls if call is not None]

    def run_all() -> None:
        for call in steps:
            call()

    return run_all


def _our_parts(x: Step) -> Call:
    norms: list[Call] = []
    if x.weight is not None:
        norms = [partial(fi_backend.rmsnorm, part, x.weight, EPS, part) for part in (x.q, x.k)]
    rope = partial(
        fi_backend.apply_rope_with_cos_sin_cache_inplace,
        *(x.positions, x.q, x.k, HEAD_DIM, x.cos_sin_cache),
    )
    append = partial(fi_backend.append_to_cache, x.k, x.v, (x.k_cache, x.v_cache), x.slots)
    return _in_turn(*norms, rope, append)


def _vllm(x: Step) -> Call:
    from vllm import _custom_ops as ops

    # Its norm wants contiguous rows, as an engine's q and k after their split are.
    q, k = x.q.contiguous(), x.k.contiguous()
    norms: list[Call] = []
    if x.weight is not None:
        norms = [partial(ops.rms_norm, part, part, x.weight, EPS) for part in (q, k)]
    rope = partial(
        ops.rotary_embedding, *(x.positions, q, k, HEAD_DIM, x.cos_sin_cache.bfloat16(), True)
    )
    is_fp8 = x.k_cache.dtype != BF16
    caches = [c.view(torch.uint8) if is_fp8 else c for c in (x.k_cache, x.v_cache)]
    one = torch.ones(1, device="cuda")
    append = partial(
        ops.reshape_and_cache_flash,
        *(k, x.v, *caches, x.slots, "fp8_e4m3" if is_fp8 else "auto", one, one),
    )
    return _in_turn(*norms, rope, append)


def _flashinfer(x: Step) -> Call:
    if x.k_cache.dtype != BF16 or x.weight is not None:
        raise ImportError("its append converts nothing, and its norm takes one tensor")
    import flashinfer

    requests = torch.arange(len(x.slots) + 1, dtype=torch.int32, device="cuda")
    offsets, pages = (x.slots % PAGE_SIZE).int(), (x.slots // PAGE_SIZE).int()
    q, k = x.q.contiguous().flatten(1), x.k.contiguous()
    rope = partial(
        flashinfer.apply_rope_with_cos_sin_cache_inplace,
        *(x.positions, q, k.flatten(1), HEAD_DIM, x.cos_sin_cache),
    )
    append = partial(
        flashinfer.append_paged_kv_cache,
        *(k, x.v, requests[:-1], offsets, (x.k_cache, x.v_cache), pages, requests, offsets + 1),
    )
    return _in_turn(rope, append)


BACKENDS: dict[str, Backend] = {
    "fi_backend": _ours,
    "fi_backend paged": _ours_paged,
    "fi_backend parts": _our_parts,
    "vllm": _vllm,
    "flashinfer": _flashinfer,
}


def error(make: Backend, x: Step) -> float:
    """Largest difference of the stored K from what should be there, on copies of the first rows."""
    few = slice(0, 64)
    x = x._replace(
        **{name: getattr(x, name)[few].clone() for name in ("q", "k", "v", "positions", "slots")}
    )
    expected = x.k.double()
    if x.weight is not None:
        scale = torch.rsqrt(expected.square().mean(-1, keepdim=True) + EPS)
        expected = expected * scale * x.weight.double()
    expected = rotated(expected, x.positions, x.cos_sin_cache, True)
    make(x)()
    stored = x.k_cache.view(torch.uint8).flatten(0, 1)[x.slots].view(x.k_cache.dtype)
    return float((stored.double() - expected).abs().max())


def run_cell(cell: Cell, backends: Mapping[str, Backend], seconds: float) -> list[Row]:
    """Check and time one cell."""
    torch.manual_seed(0)
    shape = (NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    k, v = (torch.empty(shape, dtype=cell.cache_dtype, device="cuda") for _ in "kv")
    cos_sin_cache = make_cache().cuda()
    steps = [make_step(cell, cos_sin_cache, k, v) for _ in range(CALLS_PER_GRAPH)]
    calls = importable(backends, ((step,) for step in steps))
    errors = {name: error(backends[name], steps[0]) for name in calls}
    return time_cell(cell.name, cell.num_bytes(), calls, errors, min(seconds, 0.4))


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield their rows."""
    chosen = [cell for cell in CELLS if cells in cell.name]
    yield time_cells(chosen, BACKENDS, partial(run_cell, seconds=seconds))
