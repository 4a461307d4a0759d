"""What layers of one process share: kernels by spec, plans by geometry."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend import AttentionSpec, PagedAttention

__all__ = ["attention_for", "geometry_key"]

_attentions: dict[tuple[AttentionSpec, torch.device], PagedAttention] = {}
_geometry_keys: dict[Any, int] = {}


def attention_for(spec: AttentionSpec, device: torch.device) -> PagedAttention:
    """Return the process's one PagedAttention for `spec`; layers that agree share it."""
    found = _attentions.get((spec, device))
    if found is None:
        found = _attentions[spec, device] = PagedAttention(spec, device)
    return found


def geometry_key(spec: AttentionSpec) -> int:
    """Return a number that stands for the spec's geometry: a cheap key of plans."""
    return _geometry_keys.setdefault(spec.geometry, len(_geometry_keys))
