"""What plan() of the decode wrapper takes beyond the page table and the head counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fi_backend._arguments import layer_spec, refuse, split_tokens, to_dtype
from fi_backend.spec import AttentionSpec

__all__ = ["DecodeOptions", "merge_positional"]

_DEFAULT_DTYPE = "float16"
_KEYWORD_ONLY = ("window_right",)


@dataclass(frozen=True)
class DecodeOptions:
    """Optional arguments of plan(), in the order in which it once took them by position."""

    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float | None = None
    q_data_type: str | torch.dtype | None = _DEFAULT_DTYPE
    kv_data_type: str | torch.dtype | None = None
    o_data_type: str | torch.dtype | None = None
    data_type: str | torch.dtype | None = None
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    non_blocking: bool = True
    block_tables: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    fixed_split_size: int | None = None
    disable_split_kv: bool = False
    q_len_per_req: int = 1
    window_right: int = 0

    @classmethod
    def from_keywords(cls, operation: str, keywords: Mapping[str, Any]) -> DecodeOptions:
        """Take the keyword arguments of plan().

        Raises:
            TypeError: plan() has none of that name.
        """
        names = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in names:
                raise TypeError(
                    f"{operation}.plan: unknown argument {name!r}; it takes {', '.join(names)}"
                )
        return cls(**keywords)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> DecodeOptions:
        """Pick the options out of a call's arguments, its locals() before any other statement."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in names})

    def check(self, operation: str) -> None:
        """Refuse what no kernel of ours does."""
        refuse(operation, window_right=self.window_right, block_tables=self.block_tables)
        if self.q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be at least 1; got {self.q_len_per_req}")

    def split_tokens(self, page_size: int) -> int:
        return split_tokens(self.fixed_split_size, self.disable_split_kv, page_size)

    def spec(
        self, num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int
    ) -> AttentionSpec:
        """Describe the layer. New tokens of a request are causal among themselves."""
        q_data_type = self.q_data_type
        if self.data_type is not None and q_data_type in (None, _DEFAULT_DTYPE):
            q_data_type = self.data_type
        q_dtype = to_dtype("q_data_type", q_data_type, torch.float16)
        kv_default = to_dtype("data_type", self.data_type, q_dtype)
        return layer_spec(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            head_dim_vo=head_dim,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=to_dtype("kv_data_type", self.kv_data_type, kv_default),
            o_dtype=to_dtype("o_data_type", self.o_data_type, q_dtype),
            causal=True,
            pos_encoding_mode=self.pos_encoding_mode,
            window_left=self.window_left,
            logits_soft_cap=self.logits_soft_cap,
            sm_scale=self.sm_scale,
            rope_scale=self.rope_scale,
            rope_theta=self.rope_theta,
        )


def merge_positional(
    operation: str, positional: tuple[Any, ...], keywords: dict[str, Any]
) -> dict[str, Any]:
    """Name arguments that were passed by position.

    Raises:
        TypeError: there are too many, or one is passed by keyword too.
    """
    names = [field.name for field in fields(DecodeOptions) if field.name not in _KEYWORD_ONLY]
    if len(positional) > len(names):
        raise TypeError(
            f"{operation}: plan() takes at most {len(names)} optional arguments by position after "
            f"page_size; got {len(positional)}"
        )
    named = dict(zip(names, positional, strict=False))
    twice = sorted(named.keys() & keywords.keys())
    if twice:
        raise TypeError(f"{operation}: plan() got multiple values for argument {twice[0]!r}")
    return {**named, **keywords}
