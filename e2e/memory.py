"""What an engine holds: memory of its processes, and of the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch

__all__ = ["family_bytes", "our_bytes"]


def family_bytes() -> dict[str, int]:
    """Count the bytes that this process and those it has started hold, and all that a GPU holds."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    held = {"host": sum(process.memory_info().rss for process in family)}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held["gpu"] = total - free
    return held


def our_bytes(roots: Iterable[Any]) -> int:
    """Count the bytes of tensors that objects of ours refer to, each storage once.

    Objects of other packages are not looked into: an engine's tensors are not ours.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    found = list(roots)
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            found += value.values()
        elif isinstance(value, (list, tuple)):
            found += value
        elif type(value).__module__.startswith("fi_backend."):
            found += getattr(value, "__dict__", {}).values()
    return sum(storages.values())
