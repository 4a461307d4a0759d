"""Mixed steps to time: decodes and prefills with shuffled pages, our calls, and their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import attention_cuda, host_plan, mixed
from fi_backend.planning import default_workers

BF16 = torch.bfloat16
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
DTYPES = {"q_dtype": BF16, "kv_dtype": BF16, "o_dtype": BF16}
DIMS = {"head_dim_qk": HEAD_DIM, "head_dim_vo": HEAD_DIM}
NUM_CHECKED_ROWS = 4  # of a request


@dataclass(frozen=True)
class Cell:
    """One step: (query rows, context) of every request, decodes first."""

    name: str
    requests: tuple[tuple[int, int], ...]

    @property
    def num_decodes(self) -> int:
        """Requests with one query row."""
        return sum(qo_len == 1 for qo_len, _ in self.requests)

    def num_flops(self) -> int:
        """Products that the causal mask leaves, two operations each, of K and of V."""
        pairs = sum(qo * ctx - qo * (qo - 1) // 2 for qo, ctx in self.requests)
        return 4 * NUM_QO_HEADS * HEAD_DIM * pairs


@dataclass(frozen=True)
class Step:
    """Tensors of a cell: k and v are [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]."""

    cell: Cell
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_lens: torch.Tensor
    qo_indptr: torch.Tensor
    block_table: torch.Tensor

    def part(self, begin: int, end: int) -> Step:
        """Return the step of requests [begin, end), on the same caches."""
        rows = self.qo_indptr[begin : end + 1]
        first, last = int(rows[0]), int(rows[-1])
        cell = Cell(self.cell.name, self.cell.requests[begin:end])
        lens, table = self.kv_lens[begin:end], self.block_table[begin:end]
        return Step(cell, self.q[first:last], self.k, self.v, lens, rows - first, table)


def make_step(cell: Cell) -> Step:
    """Draw q and the caches; pages are shuffled over the whole cache."""
    qo_lens, lens = (torch.tensor(x, dtype=torch.int32) for x in zip(*cell.requests, strict=True))
    counts = (lens + PAGE_SIZE - 1) // PAGE_SIZE
    pages = torch.randperm(int(counts.sum()), dtype=torch.int32)
    table = torch.zeros(len(lens), int(counts.max()), dtype=torch.int32)
    for r, ids in enumerate(pages.split(counts.tolist())):
        table[r, : len(ids)] = ids
    shape = (len(pages), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    caches = [torch.randn(shape, dtype=BF16, device="cuda") for _ in "kv"]
    rows = torch.cat([torch.zeros(1, dtype=torch.int32), qo_lens.cumsum(0, dtype=torch.int32)])
    q = torch.randn(int(rows[-1]), NUM_QO_HEADS, HEAD_DIM, dtype=BF16, device="cuda")
    return Step(cell, q, *caches, lens.cuda(), rows.cuda(), table.cuda())


class Ours:
    """Our call, planned once, as an engine does for all its layers.

    Args:
        step: what to run.
        lines: modules of one line each.
        both: nothing, or the module that runs both lines.
    """

    def __init__(
        self, step: Step, lines: Sequence[KernelSpec], both: Sequence[KernelSpec] = ()
    ) -> None:
        kernels = attention_cuda.load_lines(lines, both)
        workers = default_workers(step.q.device)
        batch = len(step.kv_lens)
        ints = host_plan.plan_buffer_ints(max_reqs=batch, num_workers=workers)
        plan = torch.empty(ints, dtype=torch.int32)
        host_plan.host_plan(
            plan_buffer=plan,
            qo_indptr=step.qo_indptr.cpu(),
            kv_lens=step.kv_lens.cpu(),
            num_qo_heads=NUM_QO_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            **DIMS,
            q_dtype=BF16,
            kv_dtype=BF16,
            causal=True,
            window_left=-1,
            num_workers=workers,
            split=0,
            many_rows_only=False,
            target="sm_90" if torch.cuda.get_device_capability()[0] == 9 else "cuda",
        )
        self.out = torch.empty_like(step.q)
        self.call: Callable[[], object] = partial(
            kernels.run,
            plan_buffer=plan.cuda(),
            partials=torch.empty(kernels.partial_floats(num_workers=workers), device="cuda"),
            q=step.q,
            k_cache=step.k,
            v_cache=step.v,
            out=self.out,
            lse=None,
            qo_indptr=step.qo_indptr,
            kv_lens=step.kv_lens,
            block_table=step.block_table,
            max_qo_len=max(qo_len for qo_len, _ in step.cell.requests),  # as engines know it
            sm_scale=1 / math.sqrt(HEAD_DIM),
            causal=True,
            num_workers=workers,
        )


def line_specs() -> tuple[KernelSpec, KernelSpec]:
    """Return the modules of one line each, few rows first."""
    return (
        attention_cuda.decode_spec(**DTYPES, **DIMS),
        attention_cuda.prefill_spec(**DTYPES, **DIMS),
    )


def one_launch(step: Step) -> Ours:
    """Return the call as layers make it: one launch where there may be prefill."""
    return Ours(step, line_specs(), (mixed.mixed_spec(**DTYPES, **DIMS),))


def two_launches(step: Step) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a call of decodes and then prefills, each planned as if it were alone."""
    edges = (0, step.cell.num_decodes, len(step.cell.requests))
    decode, prefill = line_specs()
    decodes = Ours(step.part(*edges[:2]), (decode,))
    prefills = Ours(step.part(*edges[1:]), (prefill,))

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        decodes.call()
        prefills.call()
        return decodes.out, prefills.out

    return call


def error(step: Step, out: torch.Tensor) -> float:
    """Largest error of `out` against float64, over some rows of the first and last request."""
    worst = 0.0
    group = NUM_QO_HEADS // NUM_KV_HEADS
    for r in (0, len(step.cell.requests) - 1):
        qo_len, context = step.cell.requests[r]
        pages = step.block_table[r, : -(-context // PAGE_SIZE)].long()
        k, v = (x[pages].flatten(0, 1)[:context].double() for x in (step.k, step.v))
        for i in torch.linspace(0, qo_len - 1, min(qo_len, NUM_CHECKED_ROWS)).long().tolist():
            row = int(step.qo_indptr[r]) + i
            seen = context - qo_len + i + 1
            q = step.q[row].double().view(NUM_KV_HEADS, group, HEAD_DIM)
            logits = torch.einsum("hgd,nhd->hgn", q, k[:seen]) / math.sqrt(HEAD_DIM)
            expected = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), v[:seen]).flatten(0, 1)
            worst = max(worst, float((out[row].double() - expected).abs().max()))
    return worst
