"""Stands in for SGLang's kernel package, of which there is no CPU build."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    class Missing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{name} has no CPU build")

    return Missing
