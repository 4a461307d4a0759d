"""Decode steps to time: lengths, caches with shuffled pages, our call, and its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import decode_peers
from fi_backend.kernels import attention_cuda, host_plan
from fi_backend.planning import default_workers

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Cell:
    """One decode step; `context` is a length, or the name of a mix of lengths."""

    batch: int
    context: int | str
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: torch.dtype = BF16
    split: int = 0

    @property
    def name(self) -> str:
        """The name used in results, as in the peers' tables."""
        cache = "" if self.kv_dtype == BF16 else " fp8"
        split = f" split{self.split}" if self.split else ""
        heads = f"hq{self.num_qo_heads} hkv{self.num_kv_heads}"
        shape = f"{heads} d{self.head_dim} p{self.page_size}"
        return f"bs{self.batch} ctx{self.context} {shape}{cache}{split}"

    def lengths(self) -> list[int]:
        """Keys of each request: the same in every run."""
        generator = torch.Generator().manual_seed(1)
        if self.context in ("mixed", "lognormal"):
            drawn = torch.randn(self.batch, generator=generator).mul(0.8).add(7.3).exp()
            return drawn.clamp(16, 32768).int().tolist()
        if self.context == "one-huge":
            tiny = torch.randint(16, 256, (self.batch - 1,), generator=generator)
            return [131072, *tiny.tolist()]
        return [int(self.context)] * self.batch

    def num_bytes(self) -> int:
        """Bytes that must move: K, V, q and out, once each."""
        row = self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize
        return 2 * sum(self.lengths()) * row + 4 * self.batch * self.num_qo_heads * self.head_dim


@dataclass(frozen=True)
class Step:
    """Tensors of a cell: k and v are [num_pages, page_size, num_kv_heads, head_dim]."""

    cell: Cell
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_lens: torch.Tensor
    qo_indptr: torch.Tensor
    block_table: torch.Tensor


def make_step(cell: Cell) -> Step:
    """Draw q and the caches; pages are shuffled over the whole cache."""
    lens = torch.tensor(cell.lengths(), dtype=torch.int32)
    counts = (lens + cell.page_size - 1) // cell.page_size
    num_pages = int(counts.sum())
    shape = (num_pages, cell.page_size, cell.num_kv_heads, cell.head_dim)
    pages = torch.randperm(num_pages, dtype=torch.int32)
    table = torch.zeros(cell.batch, int(counts.max()), dtype=torch.int32)
    for r, ids in enumerate(pages.split(counts.tolist())):
        table[r, : len(ids)] = ids
    caches = [torch.randn(shape, dtype=BF16, device="cuda").to(cell.kv_dtype) for _ in "kv"]
    return Step(
        cell,
        torch.randn(cell.batch, cell.num_qo_heads, cell.head_dim, dtype=BF16, device="cuda"),
        *caches,
        lens.cuda(),
        torch.arange(cell.batch + 1, dtype=torch.int32, device="cuda"),
        table.cuda(),
    )


class Ours:
    """Our call: planned once, as an engine does for all its layers."""

    def __init__(self, step: Step, *, enable_pdl: bool) -> None:
        cell = step.cell
        spec = attention_cuda.decode_spec(
            q_dtype=BF16,
            kv_dtype=cell.kv_dtype,
            o_dtype=BF16,
            head_dim_qk=cell.head_dim,
            head_dim_vo=cell.head_dim,
        )
        kernels = attention_cuda.load_lines((spec,))
        workers = default_workers(step.q.device)
        ints = host_plan.plan_buffer_ints(max_reqs=cell.batch, num_workers=workers)
        plan = torch.empty(ints, dtype=torch.int32)
        host_plan.host_plan(
            plan_buffer=plan,
            qo_indptr=step.qo_indptr.cpu(),
            kv_lens=step.kv_lens.cpu(),
            num_qo_heads=cell.num_qo_heads,
            num_kv_heads=cell.num_kv_heads,
            head_dim_qk=cell.head_dim,
            head_dim_vo=cell.head_dim,
            q_dtype=BF16,
            kv_dtype=cell.kv_dtype,
            causal=True,
            window_left=-1,
            num_workers=workers,
            split=cell.split,
            many_rows_only=False,
            target="cuda",
        )
        self.out = torch.empty_like(step.q)
        floats = kernels.partial_floats(num_workers=workers, split=cell.split)
        self._run = partial(
            kernels.run,
            plan_buffer=plan.cuda(),
            partials=torch.empty(floats, device="cuda"),
            out=self.out,
            lse=None,
            qo_indptr=step.qo_indptr,
            kv_lens=step.kv_lens,
            sm_scale=1 / math.sqrt(cell.head_dim),
            causal=True,
            num_workers=workers,
            enable_pdl=enable_pdl,
        )

    def call(self, step: Step) -> Callable[[], object]:
        """Return a call on a step's own caches, page table and q."""
        return partial(
            self._run, q=step.q, k_cache=step.k, v_cache=step.v, block_table=step.block_table
        )


def expect(step: Step, requests: Iterable[int]) -> dict[int, torch.Tensor]:
    """Compute what requests' rows should be, in float64: [num_qo_heads, head_dim] of each."""
    cell = step.cell
    group = cell.num_qo_heads // cell.num_kv_heads
    expected = {}
    for r in requests:
        length = int(step.kv_lens[r])
        pages = step.block_table[r, : -(-length // cell.page_size)].long()
        k, v = (
            cache.view(torch.uint8)[pages]  # indexing does not know fp8
            .view(cache.dtype)
            .flatten(0, 1)[:length]
            .double()
            .repeat_interleave(group, 1)
            for cache in (step.k, step.v)
        )
        logits = torch.einsum("hd,nhd->hn", step.q[r].double(), k) / math.sqrt(cell.head_dim)
        expected[r] = torch.einsum("hn,nhd->hd", logits.softmax(1), v)
    return expected


def error(step: Step, out: torch.Tensor) -> float:
    """Largest error of `out` against float64, over its first and last request."""
    return largest_error(out, expect(step, {0, step.cell.batch - 1}))


def largest_error(out: torch.Tensor, expected: dict[int, torch.Tensor]) -> float:
    """Largest error of the rows of `out` that expect() has computed; NaN where one has a NaN."""
    errors = [(out[r].double() - values).abs().max() for r, values in expected.items()]
    return float(torch.stack(errors).max())


def peers(step: Step) -> dict[str, decode_peers.MakeCall]:
    """Peers that import here and take this cell: functions from k, v, table and q to a call."""
    return decode_peers.load(
        num_heads=(step.cell.num_qo_heads, step.cell.num_kv_heads),
        head_dim=step.cell.head_dim,
        page_size=step.cell.page_size,
        kv_dtype=step.cell.kv_dtype,
        kv_lens=step.kv_lens,
    )
