"""What the paged and the ragged prefill wrappers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fi_backend._page_table import check_fits, check_indptr, fill, to_device
from fi_backend._prefill_options import PrefillOptions
from fi_backend._wrapper import AttentionWrapper
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_tensor
from fi_backend.outer_levels import OuterLevels
from fi_backend.spec import AttentionSpec

__all__ = ["PrefillStep", "PrefillWrapper"]

_Mask = tuple[torch.Tensor | None, torch.Tensor | None]  # packed bytes, and offsets of requests


@dataclass(frozen=True)
class PrefillStep:
    """A step that plan() has checked; nothing has been copied to fixed buffers yet.

    Attributes:
        options: of plan().
        spec: the layer.
        metadata: qo_indptr, then the page table, where the caller has them.
        kv_lens: int32 [batch_size], on the host or on the device.
        rows: query rows, if the host knows them.
        max_qo_len: most query rows of a request, if the host knows them and no graph outlives them.
        mask: packed, on the device.
    """

    options: PrefillOptions
    spec: AttentionSpec
    metadata: dict[str, torch.Tensor]
    kv_lens: torch.Tensor
    rows: int | None
    max_qo_len: int | None
    mask: _Mask


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
        most = self._max_total_num_rows
        if rows is not None and most is not None and rows > most:
            raise ValueError(
                f"The total number of rows in qo_indptr {rows} in cuda graph mode cannot exceed "
                f"the number of rows set during initialization {most}"
            )

    def _resolve_mask(
        self, options: PrefillOptions, qo_indptr: torch.Tensor, kv_lens: torch.Tensor
    ) -> _Mask:
        """Check and pack the mask of a step, if it has one; nothing of an earlier plan changes.

        Args:
            options: of plan().
            qo_indptr: int32 [batch_size + 1], on the host or on the device.
            kv_lens: int32 [batch_size], keys of each request, likewise.
        """
        if options.custom_mask is None and options.packed_custom_mask is None:
            return None, None
        if qo_indptr.device != kv_lens.device:
            qo_indptr = to_device("qo_indptr", qo_indptr, self._device)
            kv_lens = to_device("kv_lens", kv_lens, self._device)
        resolved = options.mask(qo_indptr.diff(), kv_lens, self._device)
        if self.is_cuda_graph_enabled:
            names = ("custom_mask", "mask_indptr")
            for name, buffer, part in zip(names, self._mask_buffers, resolved, strict=True):
                if buffer is None:
                    raise ValueError(
                        f"{name}_buf must be initialized with a torch.Tensor in cuda graph mode if "
                        f"we use custom mask in attention computation; got None"
                    )
                assert part is not None
                check_fits(name, buffer, part)
        return resolved

    def _check_step(
        self,
        options: PrefillOptions,
        spec: AttentionSpec,
        metadata: dict[str, torch.Tensor],
        qo_lens: torch.Tensor | None,
        kv_lens: torch.Tensor,
    ) -> PrefillStep:
        """Refuse what the wrapper cannot plan, while the earlier plan is still whole.

        Args:
            options: of plan(), checked.
            spec: the layer.
            metadata: qo_indptr, then the page table, each on the host or on the device.
            qo_lens: query rows of each request, if the host knows them.
            kv_lens: int32 [batch_size], keys of each request, on the host or on the device.
        """
        self._check_spec(spec, options.split_tokens(spec.page_size))
        rows = None if qo_lens is None else int(qo_lens.sum())
        max_qo_len = None
        if qo_lens is not None and qo_lens.numel() and not self.is_cuda_graph_enabled:
            max_qo_len = int(qo_lens.max())
        if self.is_cuda_graph_enabled:
            self._check_batch_size(kv_lens.shape[0], self._buffers[0].shape[0] - 1)
            self._check_capacity(rows)
            self._check_staging(metadata)
        mask = self._resolve_mask(options, metadata["qo_indptr"], kv_lens)
        return PrefillStep(options, spec, metadata, kv_lens, rows, max_qo_len, mask)

    def _stage_batch(self, step: PrefillStep) -> PagedBatch:
        """Bring the batch of a checked step to where runs read it."""
        qo_indptr, page_indptr, *rest = self._stage(step.options.non_blocking, **step.metadata)
        return PagedBatch(
            qo_indptr,
            self._stage_lens(step.kv_lens),
            page_indptr=page_indptr,
            page_indices=rest[0] if rest else None,
            max_qo_len=step.max_qo_len,
        )

    def _plan_step(self, step: PrefillStep, outer: OuterLevels | None = None) -> None:
        """Bring a checked step to where runs read it, and plan it; `outer` as for plan()."""
        batch = self._stage_batch(step)
        mask, mask_indptr = step.mask
        if mask is not None and mask_indptr is not None and self.is_cuda_graph_enabled:
            mask_buffer, indptr_buffer = self._mask_buffers
            assert mask_buffer is not None
            assert indptr_buffer is not None
            fill("custom_mask", mask_buffer, mask)
            mask = mask_buffer  # all of it: a part of no elements has no address
            mask_indptr = fill("mask_indptr", indptr_buffer, mask_indptr)
        self._plan_batch(
            step.spec,
            batch,
            num_tokens=None if self.is_cuda_graph_enabled else step.rows,
            split_tokens=step.options.split_tokens(step.spec.page_size),
            mask=mask,
            mask_indptr=mask_indptr,
            outer=outer,
        )
        self._num_rows = step.rows
        if self.is_cuda_graph_enabled and self._max_total_num_rows is None:
            self._max_total_num_rows = step.rows

    def _check_rows(self, q: torch.Tensor) -> None:
        self._planned()
        if self._num_rows is not None and q.shape[0] != self._num_rows:
            raise ValueError(
                f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._num_rows}); q "
                f"must have shape [qo_indptr[-1], num_qo_heads, head_dim]"
            )
