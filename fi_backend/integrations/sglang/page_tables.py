"""SGLang's token table as the page tables of one step."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend import PagedBatch, gather_page_table
from fi_backend.integrations.sglang.kv_cache import window_slots
from fi_backend.integrations.sglang.metadata import StepRows

__all__ = ["PageTables", "TokenTable"]


class TokenTable:
    """Where SGLang keeps the cache slots of its requests.

    Args:
        req_to_token: int32 [max_requests, max_tokens], a slot for each token.
        pool: the pool that the slots are in.
        page_size: tokens a page holds.
    """

    def __init__(self, req_to_token: torch.Tensor, pool: Any, page_size: int) -> None:
        self.slots = req_to_token
        self.pool = pool
        self.page_size = page_size

    def is_page_table(self, rows: StepRows) -> bool:
        """Whether the kernels can read it as it is."""
        plain = self.page_size == 1 and rows.num_branches == 1
        return plain and window_slots(self.pool) is None

    def batch(self, rows: StepRows) -> PagedBatch:
        """Return the batch that reads the table itself; see is_page_table.

        A kernel does so when it runs. That is too late inside a CUDA graph: SGLang may change the
        table as soon as what comes before a graph's replay is done.
        """
        return PagedBatch(
            qo_indptr=rows.qo_indptr,
            kv_lens=(rows.seq_lens + rows.extra_tokens).to(torch.int32),
            block_table=self.slots,
            request_rows=rows.request_rows,
            max_qo_len=rows.max_qo_len,
        )

    def tables(self, max_rows: int, max_tokens: int | None = None) -> PageTables:
        """Reserve page tables of up to `max_rows`, for up to `max_tokens` each."""
        return PageTables(self, max_rows, max_tokens or self.slots.shape[1])


class PageTables:
    """Page tables at addresses that stay.

    Args:
        table: what they are gathered from.
        max_rows: most rows of a step.
        max_tokens: most tokens of a row.
    """

    def __init__(self, table: TokenTable, max_rows: int, max_tokens: int) -> None:
        self._table = table
        shape = (max_rows, -(-max_tokens // table.page_size))
        device = table.slots.device
        self._kv_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._pages = torch.zeros(shape, dtype=torch.int32, device=device)
        self._window_pages = None
        if window_slots(table.pool) is not None:
            self._window_pages = torch.zeros_like(self._pages)

    def gather(self, rows: StepRows) -> tuple[PagedBatch, PagedBatch | None]:
        """Fill in a step; return its batch, and the one of the window pool if there is that."""
        batch = self._gather(self._pages, rows, None)
        if self._window_pages is None:
            return batch, None
        return batch, self._gather(self._window_pages, rows, window_slots(self._table.pool))

    def _gather(
        self, pages: torch.Tensor, rows: StepRows, slot_map: torch.Tensor | None
    ) -> PagedBatch:
        count = rows.num_rows
        batch = PagedBatch(
            qo_indptr=rows.qo_indptr,
            kv_lens=self._kv_lens[:count],
            block_table=pages[:count],
            max_qo_len=rows.max_qo_len,
        )
        assert batch.block_table is not None
        gather_page_table(
            batch.block_table,
            batch.kv_lens,
            self._table.slots,
            rows.request_rows,
            rows.seq_lens,
            self._table.page_size,
            extra_tokens=rows.extra_tokens,
            slot_map=slot_map,
            num_branches=rows.num_branches,
            branch_tokens=rows.branch_tokens,
        )
        return batch
