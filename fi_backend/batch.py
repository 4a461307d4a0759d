"""PagedBatch: what is fixed for one step, in the form the engine already has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fi_backend.checks import check_tensor

__all__ = ["PagedBatch"]


@dataclass(frozen=True)
class PagedBatch:
    """R requests, each with new query rows behind a table of cache pages.

    One of two page tables is given; no entry past a request's length is ever read.

    Attributes:
        qo_indptr: int32 [R + 1], first query row of each request; rows of a request are
            consecutive. Requests without rows are legal.
        kv_lens: int32 [R], cached tokens of each request, new ones included. May be 0.
        block_table: int32 [rows, max_pages], page ids; any row stride.
        request_rows: int32 or int64 [R], row of `block_table` for each request; row r if None.
        page_indptr: int32 [R + 1], first entry of each request in `page_indices`.
        page_indices: int32 [num_entries], page ids. None means that request r's keys are the
            consecutive tokens from page_indptr[r] on (ragged keys and values, page_size 1).
        max_qo_len: most query rows that a request has, or None if the host cannot tell. It saves a
            GPU the launch for requests with many rows. A promise: rows beyond it may be left
            out, and a CUDA graph holds all its replays to what it was captured with.
    """

    qo_indptr: torch.Tensor
    kv_lens: torch.Tensor
    block_table: torch.Tensor | None = None
    request_rows: torch.Tensor | None = None
    page_indptr: torch.Tensor | None = None
    page_indices: torch.Tensor | None = None
    max_qo_len: int | None = None

    @property
    def num_requests(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.qo_indptr.device

    @property
    def num_ragged_rows(self) -> int:
        """Rows of k and v that a ragged batch covers, 0 for a paged one. Reads a host value."""
        if self.page_indptr is None or self.page_indices is not None:
            return 0
        return int(self.page_indptr[-1])

    @classmethod
    def from_csr(
        cls,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        last_page_len: torch.Tensor,
        page_size: int,
    ) -> PagedBatch:
        """Build a batch from FlashInfer's page table.

        Args:
            qo_indptr: int32 [R + 1].
            kv_indptr: int32 [R + 1], counted in pages.
            kv_indices: int32 [num_pages_used], page ids.
            last_page_len: int32 [R], tokens in each request's last page.
            page_size: tokens a page holds.

        The tensors are checked when a step is planned: see :meth:`validate`.
        """
        pages = kv_indptr[1:] - kv_indptr[:-1]
        full = (pages - 1).clamp(min=0) * page_size
        kv_lens = torch.where(pages > 0, full + last_page_len, 0).to(torch.int32)
        return cls(qo_indptr, kv_lens, page_indptr=kv_indptr, page_indices=kv_indices)

    @classmethod
    def ragged(cls, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor) -> PagedBatch:
        """Build a batch whose keys lie one after the other.

        Args:
            qo_indptr: int32 [R + 1], first query row of each request.
            kv_indptr: int32 [R + 1], first key of each request.

        The tensors are checked when a step is planned: see :meth:`validate`.
        """
        return cls(qo_indptr, kv_indptr[1:] - kv_indptr[:-1], page_indptr=kv_indptr)

    def max_kv_len(self, page_size: int) -> int | None:
        """Tokens that a row of the block table holds, `page_size` each page; None without one."""
        return None if self.block_table is None else self.block_table.shape[1] * page_size

    def validate(self, page_size: int) -> None:
        """Check shapes, dtypes and devices; plan() checks the lengths.

        Args:
            page_size: tokens a page holds.

        Raises:
            TypeError: an argument is no tensor or has the wrong dtype.
            ValueError: a shape, device or row is not allowed.
        """
        device = self.qo_indptr.device
        if self.max_qo_len is not None and self.max_qo_len < 0:
            raise ValueError(f"max_qo_len must be at least 0 or None; got {self.max_qo_len}")
        check_tensor("kv_lens", self.kv_lens, shape=(None,), dtype=torch.int32, device=device)
        requests = self.num_requests
        check_tensor("qo_indptr", self.qo_indptr, shape=(requests + 1,), dtype=torch.int32)
        if self.block_table is not None:
            self._check_block_table(self.block_table, requests, device)
            return
        self._check_csr(requests, device)
        if self.page_indices is None and page_size != 1:
            raise ValueError(
                f"page_size must be 1 for a batch without page_indices; got {page_size}"
            )

    def _check_block_table(
        self, block_table: torch.Tensor, requests: int, device: torch.device
    ) -> None:
        if self.page_indptr is not None or self.page_indices is not None:
            raise ValueError("give block_table or page_indptr/page_indices, not both")
        check_tensor(
            "block_table",
            block_table,
            shape=(None, None),
            dtype=torch.int32,
            device=device,
            last_dim_contiguous=True,
        )
        rows = block_table.shape[0]
        if self.request_rows is not None:
            check_tensor(
                "request_rows",
                self.request_rows,
                shape=(requests,),
                dtype=(torch.int32, torch.int64),
                device=device,
            )
            if self.request_rows.is_cpu and requests:
                low, high = int(self.request_rows.min()), int(self.request_rows.max())
                if low < 0 or high >= rows:
                    raise ValueError(
                        f"request_rows must hold rows in [0, {rows}); got values in [{low}, {high}]"
                    )
        elif rows < requests:
            raise ValueError(
                f"block_table must have a row for each of the {requests} requests; got {rows}"
            )

    def _check_csr(self, requests: int, device: torch.device) -> None:
        if self.page_indptr is None:
            raise ValueError("give block_table or page_indptr; got neither")
        check_tensor(
            "page_indptr",
            self.page_indptr,
            shape=(requests + 1,),
            dtype=torch.int32,
            device=device,
        )
        if self.page_indices is not None:
            check_tensor(
                "page_indices",
                self.page_indices,
                shape=(None,),
                dtype=torch.int32,
                device=device,
            )
