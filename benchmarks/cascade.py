"""Decode steps whose requests share prefixes: ours finds these, FlashInfer's cascade is told.

One layer of a step in a CUDA graph, on a cold and clean L2. "fi_backend" plans in the graph, search
for shared pages included; "layer" is the attention alone, as all but the first layer of a model
see it; "unshared" has the search switched off. Peers are planned before, on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import decode_peers, decode_steps
from benchmarks.cuda_timing import capture, cold_calls
from benchmarks.decode_steps import BF16, Step
from benchmarks.report import Row, print_row
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Plan, Workspace, plan

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """Groups of equal size, each with a prefix that its requests share, in turn in the batch.

    Behind it, each group has `branches` of equal size, with `behind` further tokens each.
    """

    batch: int
    shared: int
    own: int
    groups: int = 1
    branches: int = 1
    behind: int = 0
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def name(self) -> str:
        """The name used in results."""
        behind = f"+{self.behind}" if self.behind > 0 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        branches = f" of {self.branches} branches" if self.branches > 1 else ""
        return f"bs{self.batch} shared{self.shared}{behind} own{self.own}{groups}{branches}"

    def num_bytes(self) -> int:
        """Bytes of K and V, each page once."""
        prefixes = self.groups * (self.shared + self.branches * self.behind)
        tokens = prefixes + self.batch * self.own
        return 2 * tokens * self.num_kv_heads * self.head_dim * BF16.itemsize


BASE = (
    Cell(32, 2048, 128),
    Cell(128, 8192, 256),
    Cell(256, 32768, 256),
    Cell(120, 6000, 250, groups=3),
    Cell(120, 8000, 250, groups=3, branches=4, behind=9600),
    Cell(128, 0, 2048),
    Cell(8, 0, 1024),
)
PLOT = tuple(
    Cell(batch, shared, 256)
    for batch in (4, 16, 64, 256)
    for shared in (256, 1024, 4096, 16384)
    if (batch, shared) not in ((128, 8192), (256, 32768))
)


def make_step(cell: Cell) -> Step:
    """Draw q and the caches; pages are shuffled over the whole cache."""
    page = cell.page_size
    kv_len = cell.shared + cell.behind + cell.own
    prefix, behind = cell.shared // page, cell.behind // page
    more = -(-kv_len // page) - prefix - behind
    num_branches = cell.groups * cell.branches
    sizes = [cell.groups * prefix, num_branches * behind, cell.batch * more]
    prefixes, branches, own = torch.randperm(sum(sizes), dtype=torch.int32).split(sizes)
    pages = [
        prefixes.view(cell.groups, prefix).repeat(cell.batch // cell.groups, 1),
        branches.view(num_branches, behind).repeat(cell.batch // num_branches, 1),
        own.view(cell.batch, more),
    ]
    table = torch.cat(pages, dim=1)
    shape = (sum(sizes), page, cell.num_kv_heads, cell.head_dim)
    heads = (cell.num_qo_heads, cell.num_kv_heads, cell.head_dim, page)
    return Step(
        decode_steps.Cell(cell.batch, kv_len, *heads),
        torch.randn(cell.batch, cell.num_qo_heads, cell.head_dim, dtype=BF16, device="cuda"),
        *(torch.randn(shape, dtype=BF16, device="cuda") for _ in "kv"),
        torch.full((cell.batch,), kv_len, dtype=torch.int32, device="cuda"),
        torch.arange(cell.batch + 1, dtype=torch.int32, device="cuda"),
        table.cuda(),
    )


class Ours:
    """Our calls for a step: with the plan in them, and without."""

    def __init__(self, step: Step, *, shares: bool) -> None:
        cell = step.cell
        self._step = step
        self._spec = AttentionSpec(
            num_qo_heads=cell.num_qo_heads,
            num_kv_heads=cell.num_kv_heads,
            head_dim_qk=cell.head_dim,
            q_dtype=BF16,
            page_size=cell.page_size,
        )
        self._batch = PagedBatch(
            step.qo_indptr, step.kv_lens, block_table=step.block_table, max_qo_len=1
        )
        self._workspace = Workspace("cuda")
        self._layer = PagedAttention(self._spec, "cuda")
        self._plan: Plan | None = None
        self._shares = shares
        self.out = torch.empty_like(step.q)
        self.plan()

    def plan(self) -> None:
        """Plan the step anew."""
        self._plan = plan(
            self._spec,
            self._batch,
            self._workspace,
            into=self._plan,
            share_prefixes=self._shares,
        )

    def run(self) -> torch.Tensor:
        """Run a layer."""
        assert self._plan is not None
        step = self._step
        self._layer.run(self._plan, step.q, (step.k, step.v), out=self.out)
        return self.out

    def plan_and_run(self) -> torch.Tensor:
        """Plan the step, and run a layer."""
        self.plan()
        return self.run()


def calls_of(step: Step) -> dict[str, Call]:
    """Return our calls."""
    with_groups, without = Ours(step, shares=True), Ours(step, shares=False)
    return {
        "fi_backend": with_groups.plan_and_run,
        "fi_backend layer": with_groups.run,
        "fi_backend unshared": without.plan_and_run,
        "fi_backend unshared layer": without.run,
    }


def peers_of(step: Step, cell: Cell) -> dict[str, Call]:
    """Return the calls of peers that import."""
    found = decode_peers.load(
        num_heads=(cell.num_qo_heads, cell.num_kv_heads),
        head_dim=cell.head_dim,
        page_size=cell.page_size,
        kv_dtype=BF16,
        kv_lens=step.kv_lens,
    )
    calls = {name: make(step.k, step.v, step.block_table, step.q) for name, make in found.items()}
    with contextlib.suppress(ImportError):
        calls["flashinfer cascade"] = _flashinfer_cascade(step, cell)
    return calls  # type: ignore[return-value]


def _flashinfer_cascade(step: Step, cell: Cell) -> Call:
    import flashinfer

    if cell.shared == 0 or cell.groups > 1:
        raise ImportError("a level of FlashInfer's has rows of a group one after the other")
    page = cell.page_size
    prefix = cell.shared // page
    own = step.block_table[:, prefix:].contiguous()
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD"
    )

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    indptr = torch.arange(cell.batch + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        [ints(0, cell.batch), indptr],
        [ints(0, prefix), indptr * own.shape[1]],
        [step.block_table[0, :prefix].contiguous(), own.flatten()],
        [ints(page), ((step.kv_lens - 1) % page + 1)],
        cell.num_qo_heads,
        cell.num_kv_heads,
        cell.head_dim,
        page,
        q_data_type=BF16,
    )
    return lambda: wrapper.run(step.q, (step.k, step.v))


def run(cells: str, seconds: float) -> list[Row]:
    """Time the cells whose names contain `cells`; return their rows."""
    rows = []
    for cell in (*BASE, *PLOT):
        if cells not in cell.name:
            continue
        step = make_step(cell)
        calls = calls_of(step) | peers_of(step, cell)
        outs = {name: call().clone() for name, call in calls.items()}
        graphs = {name: capture([call]) for name, call in calls.items()}
        times = cold_calls(
            {name: graph.replay for name, graph in graphs.items()}, seconds=min(seconds, 0.4)
        )
        for name, time in times.items():
            rate = cell.num_bytes() / time * 1e-9
            error = decode_steps.error(step, outs[name])
            rows.append(Row(cell.name, name, time * 1e6, "gbs", rate, error))
            print_row(rows[-1], times["fi_backend"] * 1e6)
    return rows
