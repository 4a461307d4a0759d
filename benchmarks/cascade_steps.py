"""Decode steps whose requests share prefixes: lengths, page tables, and the levels of cascades."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import decode_steps
from benchmarks.decode_steps import BF16, Step


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

    @property
    def num_branches(self) -> int:
        """Branches of all groups; request r is in branch r % num_branches."""
        return self.groups * self.branches

    def num_bytes(self) -> int:
        """Bytes of K and V, each page once."""
        prefixes = self.groups * self.shared + self.num_branches * self.behind
        tokens = prefixes + self.batch * self.own
        return 2 * tokens * self.num_kv_heads * self.head_dim * BF16.itemsize


def make_step(cell: Cell, device: str = "cuda") -> Step:
    """Draw q and the caches; pages are shuffled over the whole cache."""
    page = cell.page_size
    kv_len = cell.shared + cell.behind + cell.own
    prefix, behind = cell.shared // page, cell.behind // page
    more = -(-kv_len // page) - prefix - behind
    sizes = [cell.groups * prefix, cell.num_branches * behind, cell.batch * more]
    prefixes, branches, own = torch.randperm(sum(sizes), dtype=torch.int32).split(sizes)
    pages = [
        prefixes.view(cell.groups, prefix).repeat(cell.batch // cell.groups, 1),
        branches.view(cell.num_branches, behind).repeat(cell.batch // cell.num_branches, 1),
        own.view(cell.batch, more),
    ]
    shape = (sum(sizes), page, cell.num_kv_heads, cell.head_dim)
    heads = (cell.num_qo_heads, cell.num_kv_heads, cell.head_dim, page)
    return Step(
        decode_steps.Cell(cell.batch, kv_len, *heads),
        torch.randn(cell.batch, cell.num_qo_heads, cell.head_dim, dtype=BF16, device=device),
        *(torch.randn(shape, dtype=BF16, device=device) for _ in "kv"),
        torch.full((cell.batch,), kv_len, dtype=torch.int32, device=device),
        torch.arange(cell.batch + 1, dtype=torch.int32, device=device),
        torch.cat(pages, dim=1).to(device),
    )


@dataclass(frozen=True)
class Level:
    """A level of FlashInfer's cascade, int32: its entries are sets of rows that see the same keys.

    Attributes:
        qo_indptr: [num_entries + 1], first row of each entry.
        kv_indptr: [num_entries + 1], places in `kv_indices`.
        kv_indices: [*], pages of each entry.
        last_page_len: [num_entries], tokens in the last page of each.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor


def order_of(cell: Cell) -> torch.Tensor:
    """Return the requests, int64 [batch], with those of a group and of a branch side by side."""
    requests = range(cell.batch)
    return torch.tensor(sorted(requests, key=lambda r: (r % cell.groups, r % cell.num_branches, r)))


def levels_of(cell: Cell, step: Step) -> list[Level]:
    """Return what a cascade is told: prefixes, branches where there are some, and own keys."""
    table = step.block_table[order_of(cell).to(step.block_table.device)]
    prefix = cell.shared // cell.page_size
    inner = prefix + cell.behind // cell.page_size
    spans = [(cell.groups, 0, prefix), (cell.num_branches, prefix, inner)]
    levels = [
        _level(table[:: cell.batch // entries, begin:end], cell.batch, cell.page_size)
        for entries, begin, end in spans
        if end > begin
    ]
    last = (cell.own - 1) % cell.page_size + 1
    return [*levels, _level(table[:, inner:], cell.batch, last)]


def _level(pages: torch.Tensor, num_rows: int, last_page_len: int) -> Level:
    """Return the level whose entries have these pages, [num_entries, num_pages]."""
    entries, width = pages.shape
    places = torch.arange(entries + 1, dtype=torch.int32, device=pages.device)
    last = torch.full((entries,), last_page_len, dtype=torch.int32, device=pages.device)
    return Level(places * (num_rows // entries), places * width, pages.flatten(), last)
