"""Steps whose requests share pages, for the tests of both searches and of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Branch:
    """A node of a tree of prefixes: it goes on from its parent, -1 for none, by some pages."""

    parent: int
    num_pages: int


@dataclass(frozen=True)
class SharingStep:
    """Requests, each at a node of a tree of prefixes with some tokens of its own behind."""

    tree: tuple[Branch, ...]
    nodes: tuple[int, ...]  # of each request; -1 = it shares nothing
    own_lens: tuple[int, ...]  # tokens behind the node's pages
    qo_lens: tuple[int, ...]
    page_size: int
    table: str  # "block_table", "rows32", "rows64" or "csr"
    seed: int = 0

    def prefix(self, node: int) -> list[int]:
        """Return the pages of a node, from the root on."""
        if node < 0:
            return []
        branch = self.tree[node]
        first = sum(other.num_pages for other in self.tree[:node])
        return self.prefix(branch.parent) + list(range(first, first + branch.num_pages))

    def lengths(self) -> dict[str, torch.Tensor]:
        """Return qo_indptr and kv_lens."""
        pages = [len(self.prefix(node)) for node in self.nodes]
        lens = [n * self.page_size + own for n, own in zip(pages, self.own_lens, strict=True)]
        return dict(
            qo_indptr=torch.tensor([0, *self.qo_lens]).cumsum(0).to(torch.int32),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
        )

    def page_lists(self) -> tuple[list[list[int]], int]:
        """Return the page ids of each request, shuffled over the cache, and how many there are."""
        count = sum(branch.num_pages for branch in self.tree)
        lists = []
        for node, own in zip(self.nodes, self.own_lens, strict=True):
            more = -(-own // self.page_size)
            lists.append(self.prefix(node) + list(range(count, count + more)))
            count += more
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randperm(count, generator=generator).tolist()
        return [[ids[page] for page in pages] for pages in lists], count

    def page_table(self) -> dict[str, Any]:
        """Return the page table, with ids of no page where nothing may read."""
        lists, _ = self.page_lists()
        if self.table == "csr":
            counts = torch.tensor([0] + [len(pages) for pages in lists])
            flat = [page for pages in lists for page in pages]
            return dict(
                page_indptr=counts.cumsum(0).to(torch.int32),
                page_indices=torch.tensor(flat, dtype=torch.int32),
            )
        width = max((len(pages) for pages in lists), default=0) + 1
        table = torch.full((2 * len(lists) + 1, width), 1 << 30, dtype=torch.int32)
        rows = torch.arange(len(lists))
        if self.table != "block_table":
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.randperm(2 * len(lists) + 1, generator=generator)[: len(lists)]
        for row, pages in zip(rows.tolist(), lists, strict=True):
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        if self.table == "block_table":
            return dict(block_table=table)
        dtype = torch.int32 if self.table == "rows32" else torch.int64
        return dict(block_table=table, request_rows=rows.to(dtype))


@st.composite
def sharing_steps(draw: st.DrawFn, max_requests: int = 24, max_pages: int = 12) -> SharingStep:
    """Draw a tree of prefixes with requests at its nodes, in any order."""
    tree = tuple(
        Branch(draw(st.integers(-1, i - 1)), draw(st.integers(1, max_pages)))
        for i in range(draw(st.integers(0, 6)))
    )
    count = draw(st.integers(0, max_requests))

    def some(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    return SharingStep(
        tree,
        nodes=some(st.integers(-1, len(tree) - 1)),
        own_lens=some(st.one_of(st.integers(0, 3), st.integers(0, 90))),
        qo_lens=some(st.sampled_from([0, 1, 1, 1, 2, 3, 9, 40])),
        page_size=draw(st.sampled_from([1, 4, 16])),
        table=draw(st.sampled_from(["block_table", "rows32", "rows64", "csr"])),
        seed=draw(st.integers(0, 99)),
    )
