"""What drafts of a speculative step may see: SGLang's booleans -> the bits that kernels read."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend import pack_masks
from fi_backend.errors import UnsupportedError

__all__ = ["MaskBits", "needs_mask"]


def needs_mask(batch: Any) -> bool:
    """Whether a step verifies drafts that are a tree. Those of a chain see what came before them.

    Raises:
        UnsupportedError: the requests have different numbers of drafts.
    """
    if not batch.forward_mode.is_target_verify():
        return False
    drafts = batch.spec_info
    if getattr(drafts, "ragged_verify_layout", None) is not None:
        raise UnsupportedError(
            "fi_backend: requests must have as many drafts each; got a ragged verification. "
            "Unset SGLANG_RAGGED_VERIFY_MODE"
        )
    return drafts.custom_mask is not None and getattr(drafts, "topk", 0) != 1


class MaskBits:
    """Masks of up to `max_requests`, at addresses that stay.

    Args:
        max_requests: most requests of a step.
        num_drafts: drafts of every request.
        max_keys: most keys of a request, drafts included.
        device: where they are.
    """

    def __init__(
        self, max_requests: int, num_drafts: int, max_keys: int, device: torch.device
    ) -> None:
        num_bytes = (num_drafts * max_keys + 7) // 8
        if max_requests * num_bytes >= 2**31:
            raise UnsupportedError(
                f"masks of a step must be below 2 GiB; {max_requests} requests with {num_drafts} "
                f"drafts and up to {max_keys} keys need {max_requests * num_bytes} bytes. "
                f"Lower --cuda-graph-max-bs or --context-length"
            )
        self._num_drafts = num_drafts
        self._bits = torch.zeros(max_requests, num_bytes, dtype=torch.uint8, device=device)
        self._indptr = num_bytes * torch.arange(max_requests + 1, dtype=torch.int32, device=device)

    def pack(self, masks: torch.Tensor, kv_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill in a step.

        Args:
            masks: bool [any], drafts x keys of each request.
            kv_lens: int32 [num_requests], drafts included.

        Returns:
            custom_mask and mask_indptr, as PagedAttention.run() takes them.
        """
        num_requests = kv_lens.shape[0]
        bits = self._bits[:num_requests]
        pack_masks(bits, masks, kv_lens, self._num_drafts)
        return bits.view(-1), self._indptr[: num_requests + 1]
