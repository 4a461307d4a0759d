"""Prefill steps to time: lengths, caches with shuffled pages, our calls, and their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import attention_cuda, host_plan
from fi_backend.planning import default_workers

BF16 = torch.bfloat16
NUM_CHECKED_ROWS = 16


@dataclass(frozen=True)
class Cell:
    """One step of equal requests: the last `qo_len` of `context` tokens are queries."""

    batch: int
    qo_len: int
    context: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    causal: bool = True
    window_left: int = -1

    @property
    def name(self) -> str:
        """The name used in results, as in the peers' tables."""
        window = f" swa{self.window_left + 1}" if self.window_left >= 0 else ""
        heads = f"hq{self.num_qo_heads} hkv{self.num_kv_heads} d{self.head_dim}"
        shape = f"bs{self.batch} q{self.qo_len} ctx{self.context} {heads} p{self.page_size}"
        return f"{shape} causal{int(self.causal)}{window}"

    def num_flops(self) -> int:
        """Products that the masks leave, two operations each, of K and of V."""
        last = torch.arange(self.context - self.qo_len, self.context)
        seen = last + 1 if self.causal else torch.full_like(last, self.context)
        if self.window_left >= 0:
            seen = seen - (last - self.window_left).clamp(min=0)
        pairs = self.batch * self.num_qo_heads * int(seen.sum())
        return 4 * pairs * self.head_dim

    @property
    def sm_scale(self) -> float:
        """Factor on logits."""
        return 1 / math.sqrt(self.head_dim)


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

    def dense(self, cache: torch.Tensor) -> torch.Tensor:
        """Return the rows of a cache without pages: [batch * context, num_kv_heads, head_dim]."""
        pages = cache[self.block_table.long()]
        return pages.flatten(1, 2)[:, : self.cell.context].flatten(0, 1).contiguous()


def make_step(cell: Cell) -> Step:
    """Draw q and the caches; pages are shuffled over the whole cache."""
    count = -(-cell.context // cell.page_size)
    shape = (cell.batch * count, cell.page_size, cell.num_kv_heads, cell.head_dim)
    pages = torch.randperm(cell.batch * count, dtype=torch.int32)
    rows = (cell.batch * cell.qo_len, cell.num_qo_heads, cell.head_dim)
    return Step(
        cell,
        torch.randn(rows, dtype=BF16, device="cuda"),
        torch.randn(shape, dtype=BF16, device="cuda"),
        torch.randn(shape, dtype=BF16, device="cuda"),
        torch.full((cell.batch,), cell.context, dtype=torch.int32, device="cuda"),
        torch.arange(cell.batch + 1, dtype=torch.int32, device="cuda") * cell.qo_len,
        pages.view(cell.batch, count).cuda(),
    )


def kernel_spec(head_dim: int) -> KernelSpec:
    """Return our module for a size of heads."""
    dims = {"head_dim_qk": head_dim, "head_dim_vo": head_dim}
    return attention_cuda.prefill_spec(q_dtype=BF16, kv_dtype=BF16, o_dtype=BF16, **dims)


class Ours:
    """Our calls: planned once, as an engine does for all its layers."""

    def __init__(self, step: Step) -> None:
        cell = step.cell
        kernels = attention_cuda.load_lines((kernel_spec(cell.head_dim),))
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
            kv_dtype=BF16,
            causal=cell.causal,
            window_left=cell.window_left,
            num_workers=workers,
            split=0,
            many_rows_only=True,
            target="sm_90" if torch.cuda.get_device_capability()[0] == 9 else "cuda",
        )
        self.out = torch.empty_like(step.q)
        self._step = step
        self._run = partial(
            kernels.run,
            plan_buffer=plan.cuda(),
            partials=torch.empty(kernels.partial_floats(num_workers=workers), device="cuda"),
            q=step.q,
            out=self.out,
            lse=None,
            qo_indptr=step.qo_indptr,
            kv_lens=step.kv_lens,
            sm_scale=cell.sm_scale,
            causal=cell.causal,
            window_left=cell.window_left,
            num_workers=workers,
            enable_pdl=False,
        )

    def paged(self) -> Callable[[], object]:
        """Return the call on the paged caches."""
        step = self._step
        return partial(self._run, k_cache=step.k, v_cache=step.v, block_table=step.block_table)

    def ragged(self) -> Callable[[], object]:
        """Return the call on the same keys and values without pages."""
        step = self._step
        k, v = (step.dense(cache)[:, None] for cache in (step.k, step.v))
        starts = torch.arange(step.cell.batch + 1, dtype=torch.int32, device="cuda")
        return partial(self._run, k_cache=k, v_cache=v, page_indptr=starts * step.cell.context)


@dataclass(frozen=True)
class Expected:
    """Some rows of the last request in float64: values are [num_rows, num_qo_heads, head_dim]."""

    rows: torch.Tensor
    values: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """Return the largest error of `out`."""
        return float((out[self.rows].double() - self.values).abs().max())


def expect(step: Step) -> Expected:
    """Compute what some rows of a step's output should be."""
    cell = step.cell
    chosen = torch.linspace(0, cell.qo_len - 1, NUM_CHECKED_ROWS).long().cuda()
    position = cell.context - cell.qo_len + chosen[:, None]
    key = torch.arange(cell.context, device="cuda")
    hidden = key > position if cell.causal else (key < 0).expand(NUM_CHECKED_ROWS, -1)
    if cell.window_left >= 0:
        hidden = hidden | (key < position - cell.window_left)
    k, v = (step.dense(cache)[-cell.context :] for cache in (step.k, step.v))
    rows = (cell.batch - 1) * cell.qo_len + chosen
    values = []
    for head in range(cell.num_qo_heads):  # all heads at once would not fit beside a large step
        kv_head = head // (cell.num_qo_heads // cell.num_kv_heads)
        logits = step.q[rows, head].double() @ k[:, kv_head].double().T * cell.sm_scale
        weights = logits.masked_fill(hidden, -math.inf).softmax(1)
        values.append(weights @ v[:, kv_head].double())
    return Expected(rows, torch.stack(values, 1))
