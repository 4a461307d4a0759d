"""What plan() of the prefill wrappers takes beyond the page table and the head counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fi_backend._arguments import layer_spec, refuse, split_tokens, to_dtype
from fi_backend._custom_mask import resolve_mask
from fi_backend._page_table import check_bound, check_lens
from fi_backend.spec import AttentionSpec

__all__ = ["PrefillOptions"]


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """Optional arguments of plan() that the paged and the ragged wrapper share."""

    head_dim_vo: int | None = None
    custom_mask: torch.Tensor | None = None
    packed_custom_mask: torch.Tensor | None = None
    causal: bool = False
    pos_encoding_mode: str = "NONE"
    sm_scale: float | None = None
    window_left: int = -1
    logits_soft_cap: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    q_data_type: str | torch.dtype | None = "float16"
    kv_data_type: str | torch.dtype | None = None
    o_data_type: str | torch.dtype | None = None
    non_blocking: bool = True
    prefix_len_ptr: torch.Tensor | None = None
    token_pos_in_items_ptr: torch.Tensor | None = None
    token_pos_in_items_len: int = 0
    max_item_len_ptr: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    seq_lens_q: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None
    max_token_per_sequence: int | None = None
    max_sequence_kv: int | None = None
    fixed_split_size: int | None = None
    disable_split_kv: bool = False

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> PrefillOptions:
        """Pick the options out of a call's arguments, its locals() before any other statement."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})

    def check(
        self, operation: str, qo_lens: torch.Tensor | None, kv_lens: torch.Tensor | None
    ) -> None:
        """Refuse what no kernel of ours does, and check what the caller states twice.

        Lengths that only the device knows are None.
        """
        refuse(
            operation,
            prefix_len_ptr=self.prefix_len_ptr,
            token_pos_in_items_ptr=self.token_pos_in_items_ptr,
            token_pos_in_items_len=self.token_pos_in_items_len,
            max_item_len_ptr=self.max_item_len_ptr,
            block_tables=self.block_tables,
        )
        check_lens("seq_lens", self.seq_lens, kv_lens, "the key lengths")
        check_lens("seq_lens_q", self.seq_lens_q, qo_lens, "qo_indptr")
        check_bound("max_token_per_sequence", self.max_token_per_sequence, qo_lens)
        check_bound("max_sequence_kv", self.max_sequence_kv, kv_lens)

    def mask(
        self, qo_lens: torch.Tensor, kv_lens: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (packed mask, byte offsets of the requests) on `device`, or (None, None).

        Both lengths are on the host, or both on `device`.
        """
        return resolve_mask(
            self.custom_mask,
            self.packed_custom_mask,
            qo_lens,
            kv_lens,
            device,
            non_blocking=self.non_blocking,
        )

    def split_tokens(self, page_size: int) -> int:
        return split_tokens(self.fixed_split_size, self.disable_split_kv, page_size)

    def spec(
        self, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int
    ) -> AttentionSpec:
        """Describe the layer."""
        q_dtype = to_dtype("q_data_type", self.q_data_type, torch.float16)
        return layer_spec(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk,
            head_dim_vo=self.head_dim_vo,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=to_dtype("kv_data_type", self.kv_data_type, q_dtype),
            o_dtype=to_dtype("o_data_type", self.o_data_type, q_dtype),
            causal=self.causal,
            pos_encoding_mode=self.pos_encoding_mode,
            window_left=self.window_left,
            logits_soft_cap=self.logits_soft_cap,
            sm_scale=self.sm_scale,
            rope_scale=self.rope_scale,
            rope_theta=self.rope_theta,
            custom_mask=self.custom_mask is not None or self.packed_custom_mask is not None,
        )
