"""What the paged and the ragged prefill wrappers share."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend._page_table import check_indptr, fill
from fi_backend._prefill_options import PrefillOptions
from fi_backend._wrapper import AttentionWrapper
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_tensor
from fi_backend.spec import AttentionSpec

__all__ = ["PrefillWrapper"]


class PrefillWrapper(AttentionWrapper):
    """Base of the prefill wrappers: row counts, custom masks and their fixed buffers."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        jit_args: list[Any] | None,
        jit_kwargs: dict[str, Any] | None,
        custom_mask_buf: torch.Tensor | None,
        mask_indptr_buf: torch.Tensor | None,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs
        )
        self._mask_buffers = (custom_mask_buf, mask_indptr_buf) if use_cuda_graph else (None, None)
        for name, buffer, dtype in (
            ("custom_mask_buf", self._mask_buffers[0], torch.uint8),
            ("mask_indptr_buf", self._mask_buffers[1], torch.int32),
        ):
            if buffer is not None:
                check_tensor(
                    name,
                    buffer,
                    shape=(None,),
                    dtype=dtype,
                    device=self._device,
                    last_dim_contiguous=True,
                )
        self._max_total_num_rows: int | None = None
        self._num_rows: int | None = None  # of the planned step, where the host knows them

    def _check_qo_indptr(self, qo_indptr: torch.Tensor, batch_size: int) -> torch.Tensor | None:
        """Check qo_indptr; return the query rows of each request, if the host knows them."""
        qo_indptr = check_indptr(
            "qo_indptr", qo_indptr, self._device, batch_size=batch_size, start_at_zero=True
        )
        return qo_indptr[1:] - qo_indptr[:-1] if qo_indptr.is_cpu else None

    def _check_capacity(self, rows: int | None) -> None:
        """Hold the rows of every step to those of the first one, which fixed the shapes."""
        if not self.is_cuda_graph_enabled or rows is None:
            return
        if self._max_total_num_rows is None:
            self._max_total_num_rows = rows
        elif rows > self._max_total_num_rows:
            raise ValueError(
                f"The total number of rows in qo_indptr {rows} in cuda graph mode cannot exceed "
                f"the number of rows set during initialization {self._max_total_num_rows}"
            )

    def _plan_step(
        self,
        options: PrefillOptions,
        spec: AttentionSpec,
        batch: PagedBatch,
        qo_lens: torch.Tensor | None,
        kv_lens: torch.Tensor | None,
    ) -> None:
        """Plan a step whose page table is staged already; stage its mask.

        Args:
            options: of plan().
            spec: the layer.
            batch: the step, on the device.
            qo_lens: query rows of each request, if the host knows them.
            kv_lens: keys of each request, if the host knows them.
        """
        if qo_lens is None or kv_lens is None:
            qo_indptr = batch.qo_indptr
            lens = (qo_indptr[1:] - qo_indptr[:-1], batch.kv_lens)
        else:
            lens = (qo_lens, kv_lens)
        mask, mask_indptr = options.mask(*lens, self._device)
        if mask is not None and mask_indptr is not None and self.is_cuda_graph_enabled:
            mask_buffer, indptr_buffer = self._mask_buffers
            if mask_buffer is None or indptr_buffer is None:
                missing = "custom_mask_buf" if mask_buffer is None else "mask_indptr_buf"
                raise ValueError(
                    f"{missing} must be initialized with a torch.Tensor in cuda graph mode if we "
                    f"use custom mask in attention computation; got None"
                )
            fill("custom_mask", mask_buffer, mask)
            mask = mask_buffer  # all of it: a part of no elements has no address
            mask_indptr = fill("mask_indptr", indptr_buffer, mask_indptr)
        rows = None if qo_lens is None else int(qo_lens.sum())
        self._plan_batch(
            spec,
            batch,
            num_tokens=None if self.is_cuda_graph_enabled else rows,
            split_tokens=options.split_tokens(spec.page_size),
            mask=mask,
            mask_indptr=mask_indptr,
        )
        self._num_rows = rows

    def _check_rows(self, q: torch.Tensor) -> None:
        self._planned()
        if self._num_rows is not None and q.shape[0] != self._num_rows:
            raise ValueError(
                f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._num_rows}); q "
                f"must have shape [qo_indptr[-1], num_qo_heads, head_dim]"
            )
