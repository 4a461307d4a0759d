"""Decode steps whose requests share prefixes: ours finds these, a cascade is told.

One layer of a step in a CUDA graph, on a cold and clean L2. "fi_backend" plans in the graph, search
for shared pages included; "layer" is the attention alone, as all but the first layer of a model
see it; "unshared" has the search switched off. Cascades and peers are planned before, on the host,
and cascades get their rows in the order of groups. Errors are those of what a graph has computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import decode_peers
from benchmarks.cascade_steps import Cell, levels_of, make_step, order_of
from benchmarks.cuda_timing import capture, cold_calls
from benchmarks.decode_steps import BF16, Step, expect, largest_error
from benchmarks.peers import load_peers
from benchmarks.report import Row, print_row
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Plan, Workspace, plan

Call = Callable[[], torch.Tensor]

BASE = (
    Cell(128, 8192, 256),
    Cell(256, 32768, 256),
    Cell(32, 2048, 128),
    Cell(120, 6000, 250, groups=3),
    Cell(120, 8000, 250, groups=3, branches=4, behind=9600),
)
NOTHING_SHARED = (
    Cell(8, 0, 1024),
    Cell(16, 0, 1024),
    Cell(64, 0, 1024),
    Cell(128, 0, 2048),
    Cell(256, 0, 256),
)
# Ours alone, for the plot of prefix length and group size; what BASE has is not timed again.
SWEEP = tuple(
    cell
    for batch in (8, 16, 32, 64, 128, 256)
    for shared in (512, 1024, 2048, 4096, 8192, 16384, 32768)
    if (cell := Cell(batch, shared, 256)) not in BASE
)
MOST_SECONDS, MOST_SWEEP_SECONDS = 0.4, 0.25


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
        self._workspace = Workspace(step.q.device)
        self._layer = PagedAttention(self._spec, step.q.device)
        self._plan: Plan | None = None
        self._shares = shares
        self._out = torch.empty_like(step.q)
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

    def num_sharing(self) -> int:
        """Count the requests that share pages, as planned."""
        shares = self._plan.shares if self._plan is not None else None
        return 0 if shares is None else int((shares.groups.first_pages > 0).sum())

    def run(self) -> torch.Tensor:
        """Run a layer."""
        assert self._plan is not None
        step = self._step
        self._layer.run(self._plan, step.q, (step.k, step.v), out=self._out)
        return self._out

    def plan_and_run(self) -> torch.Tensor:
        """Plan the step, and run a layer."""
        self.plan()
        return self.run()


@dataclass(frozen=True)
class Contender:
    """A call, and the request of each row that it returns, int64 [batch]; None: in their order."""

    call: Call
    order: torch.Tensor | None = None

    def error(self, out: torch.Tensor, expected: dict[int, torch.Tensor]) -> float:
        """Return the largest error of an output against decode_steps.expect()."""
        if self.order is not None:
            out = out[self.order.argsort().to(out.device)]
        return largest_error(out, expected)


def ours_of(step: Step) -> dict[str, Contender]:
    """Return our calls, by the names of their rows; say how many requests share."""
    shared, unshared = Ours(step, shares=True), Ours(step, shares=False)
    print(f"{shared.num_sharing()} of {step.cell.batch} requests share", flush=True)
    return {
        "fi_backend": Contender(shared.plan_and_run),
        "fi_backend layer": Contender(shared.run),
        "fi_backend unshared": Contender(unshared.plan_and_run),
        "fi_backend unshared layer": Contender(unshared.run),
    }


def peers_of(cell: Cell, step: Step) -> dict[str, Contender]:
    """Return the calls of peers that import, and of cascades where something is shared."""
    without = decode_peers.load(
        num_heads=(cell.num_qo_heads, cell.num_kv_heads),
        head_dim=cell.head_dim,
        page_size=cell.page_size,
        kv_dtype=BF16,
        kv_lens=step.kv_lens,
    )
    calls = {name: make(step.k, step.v, step.block_table, step.q) for name, make in without.items()}
    found = {name: Contender(call) for name, call in calls.items()}  # type: ignore[arg-type]
    if cell.shared == 0:
        return found
    makers = {
        f"{of} cascade": partial(told_levels, of, cell) for of in ("flashinfer", "fi_backend")
    }
    order, told = order_of(cell), load_peers(makers, step)
    return found | {name: Contender(call, order) for name, call in told.items()}  # type: ignore[arg-type]


def told_levels(package: str, cell: Cell, step: Step) -> Call:
    """Plan the cascade of a package, whose rows are in the order of order_of()."""
    device = step.q.device
    levels = levels_of(cell, step)
    wrapper = importlib.import_module(package).MultiLevelCascadeAttentionWrapper(
        len(levels), torch.empty(512 << 20, dtype=torch.uint8, device=device), "NHD"
    )
    wrapper.plan(
        [level.qo_indptr.cpu() for level in levels],  # ours looks at these where nobody waits
        [level.kv_indptr for level in levels],
        [level.kv_indices for level in levels],
        [level.last_page_len for level in levels],
        cell.num_qo_heads,
        cell.num_kv_heads,
        cell.head_dim,
        cell.page_size,
        q_data_type=BF16,
    )
    q = step.q[order_of(cell).to(device)]
    return lambda: wrapper.run(q, (step.k, step.v))


def run_cell(cell: Cell, seconds: float, *, with_peers: bool) -> list[Row]:
    """Time one cell, check what its graphs compute, and return the rows."""
    torch.manual_seed(0)
    step = make_step(cell)
    contenders = ours_of(step) | (peers_of(cell, step) if with_peers else {})
    outs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        outs[name] = contenders[name].call()

    graphs = {name: capture([partial(keep, name)]) for name in contenders}
    times = cold_calls({name: graph.replay for name, graph in graphs.items()}, seconds=seconds)
    # One request of each branch, and the last one.
    expected = expect(step, {*range(cell.num_branches), cell.batch - 1})
    rows = []
    for name, time in times.items():
        outs[name].fill_(float("nan"))
        graphs[name].replay()
        error = contenders[name].error(outs[name], expected)
        rate = cell.num_bytes() / time * 1e-9
        rows.append(Row(cell.name, name, time * 1e6, "gbs", rate, error))
        print_row(rows[-1], times["fi_backend"] * 1e6)
    return rows


def run(cells: str, seconds: float) -> Iterator[list[Row]]:
    """Time the cells whose names contain `cells`; yield the rows of each."""
    for cell in (*BASE, *NOTHING_SHARED, *SWEEP):
        if cells in cell.name:
            sweeps = cell in SWEEP
            most = MOST_SWEEP_SECONDS if sweeps else MOST_SECONDS
            yield run_cell(cell, min(seconds, most), with_peers=not sweeps)
