"""Stands in for torchvision, of which there is no CPU build."""

from __future__ import annotations

from unittest.mock import MagicMock

__version__ = "0.0"


def __getattr__(name: str) -> MagicMock:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
