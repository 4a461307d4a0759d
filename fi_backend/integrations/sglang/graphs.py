"""Steps that CUDA graphs were captured with, and refilling them before a replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fi_backend.integrations.sglang import kv_cache
from fi_backend.integrations.sglang.metadata import FIMetadata, QueryRows
from fi_backend.integrations.sglang.page_tables import TokenTable
from fi_backend.integrations.sglang.verify_mask import MaskBits, needs_mask

__all__ = ["CapturedSteps"]


class CapturedSteps:
    """The steps of one backend's graphs; everything they refer to stays where it is.

    Args:
        table: SGLang's token table.
        rows: describes steps.
        make: makes a step of its batch, the window pool's batch and slots, and its mask.
        max_rows: most requests of a step, or branches of requests.
        max_tokens: most query rows of a step.
    """

    def __init__(
        self,
        table: TokenTable,
        rows: QueryRows,
        make: Callable[..., FIMetadata],
        max_rows: int,
        max_tokens: int,
    ) -> None:
        self._table = table
        self._rows = rows
        self._make = make
        self._max_rows = max_rows
        self._tables = table.tables(max_rows)
        device = table.slots.device
        self._qo_indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._window_out_slots = None
        if kv_cache.window_slots(table.pool) is not None:
            self._window_out_slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._mask_bits: MaskBits | None = None
        self._steps: dict[tuple[Any, int], FIMetadata] = {}

    def load(self, batch: Any) -> FIMetadata:
        """Refill the step of this mode and number of requests; make it if it is the first.

        This runs before each replay, not inside the graph: SGLang may change its token table as
        soon as the replay has been enqueued.

        Args:
            batch: a ForwardBatch, or the namespace that SGLang shows before a replay.
        """
        rows = self._rows.of(batch, self._qo_indptr)
        window_slots = self._load_window_slots(batch)
        full, window = self._tables.gather(rows)
        mask = self._load_mask(batch, full.kv_lens)
        key = (batch.forward_mode, rows.num_rows)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._make(full, window, window_slots, mask)
        step.replan()
        return step

    def _load_mask(
        self, batch: Any, kv_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not needs_mask(batch):
            return None
        if self._mask_bits is None:
            self._mask_bits = MaskBits(
                self._max_rows,
                batch.spec_info.draft_token_num,
                self._table.slots.shape[1],
                kv_lens.device,
            )
        return self._mask_bits.pack(batch.spec_info.custom_mask, kv_lens)

    def _load_window_slots(self, batch: Any) -> torch.Tensor | None:
        """Translate where the step writes; padding goes to slot 0, which is nobody's."""
        buffer = self._window_out_slots
        slots = getattr(batch, "out_cache_loc", None)
        slot_map = kv_cache.window_slots(self._table.pool)
        if buffer is None or slot_map is None or slots is None:
            return buffer
        buffer[: slots.shape[0]] = slot_map[slots]
        buffer[slots.shape[0] :].zero_()
        return buffer
