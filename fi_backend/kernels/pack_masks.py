"""The attention masks of a step, one bit for each boolean."""

from __future__ import annotations

from typing import Literal

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions

__all__ = ["pack_masks", "pack_masks_spec"]


def pack_masks_spec(device_type: Literal["cpu", "cuda"]) -> KernelSpec:
    """Describe the module for "cpu" or "cuda"."""
    templates: tuple[str, ...] = ("pack_masks_cpu.cc.j2",)
    if device_type == "cuda":
        templates = ("pack_masks_cuda.cu.j2", "pack_masks_cuda_binding.cc.j2")
    return KernelSpec(name=f"pack_masks_{device_type}", target=device_type, templates=templates)


_pack_masks = Functions("pack_masks", pack_masks_spec)


def pack_masks(
    *, bits: torch.Tensor, masks: torch.Tensor, kv_lens: torch.Tensor, num_rows: int
) -> None:
    """Write the bits of a step's masks; see fi_backend.pack_masks."""
    _pack_masks[bits.device.type](bits, masks, kv_lens, num_rows)
