"""What the peers of all benchmarks have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["Call", "load_peers"]

Call = Callable[[], object]
Step = TypeVar("Step")


def load_peers(makers: Mapping[str, Callable[[Step], Call]], step: Step) -> dict[str, Call]:
    """Plan each peer for a step; return by name the call that returns its output.

    A peer that does not import here, or refuses the step, is named and left out.
    """
    found = {}
    for name, make in makers.items():
        try:
            call = make(step)
            call()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as reason:
            print(f"{name} is not measured: {repr(reason)[:200]}")
            continue
        found[name] = call
    return found
