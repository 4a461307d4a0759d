"""The page table of a step, gathered from an engine's token table."""

from __future__ import annotations

from typing import Literal

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions

__all__ = ["gather_page_table", "page_table_spec"]


def page_table_spec(device_type: Literal["cpu", "cuda"]) -> KernelSpec:
    """Describe the module for "cpu" or "cuda"."""
    templates: tuple[str, ...] = ("page_table_cpu.cc.j2",)
    if device_type == "cuda":
        templates = ("page_table_cuda.cu.j2", "page_table_cuda_binding.cc.j2")
    return KernelSpec(name=f"page_table_{device_type}", target=device_type, templates=templates)


_gather_page_table = Functions("gather_page_table", page_table_spec)


def gather_page_table(
    *,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    token_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    extra_tokens: int,
    page_size: int,
    slot_map: torch.Tensor | None,
    num_branches: int,
    branch_tokens: int,
) -> None:
    """Write the pages and lengths of a step's requests; see fi_backend.gather_page_table."""
    _gather_page_table[page_table.device.type](
        page_table,
        kv_lens,
        token_table,
        request_rows,
        seq_lens,
        extra_tokens,
        page_size,
        slot_map,
        num_branches,
        branch_tokens,
        1 if page_table.is_cuda else torch.get_num_threads(),
    )
